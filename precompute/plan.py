"""What a run will cost, before any model work: shards, pairs, network calls, bytes by array, free disk."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from inpo.common.cache.schema import Manifest
from inpo.common.cache.specs import ArraySpec
from inpo.common.cache.store import is_remote
from inpo.common.errors import StorageError
from inpo.common.inversion import build_path
from inpo.common.models import Model
from inpo.common.space import free_bytes, human_bytes
from inpo.common.spread import SPREAD_RECORDS
from inpo.precompute.tasks import ShardTask

_SAMPLED_PATHS = 200
_JSON_BYTES_PER_ARRAY = 700
_BYTES_PER_CHUNK = 20
"""16 of zarr's shard index and 4 of the checksum, per inner chunk (the price of reading one record alone)."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A cost estimate: the most. A pair has two images, a group and a prompt of its own, unless the cache's groups are
    rankings."""

    num_shards: int
    num_committed: int
    num_pairs: int
    """Rows still to be made: pairs at most, since ties and unreadable images give none."""
    num_images: int
    """Images that go through the network for them."""
    num_groups: int
    network_calls_per_image: float
    """Network evaluations per image, mean over the groups' own paths; one is one latent through the network."""
    bytes_by_array: dict[str, int]
    free_bytes: int | None
    """Free space where the cache lies; None for an object store."""

    @property
    def cache_bytes(self) -> int:
        return sum(self.bytes_by_array.values())

    @property
    def network_calls(self) -> int:
        measured = SPREAD_RECORDS * (self.num_shards - self.num_committed)
        return round(self.num_images * self.network_calls_per_image) + measured

    def to_json(self) -> dict[str, Any]:
        return {
            "num_shards": self.num_shards,
            "num_committed": self.num_committed,
            "num_pairs": self.num_pairs,
            "num_images": self.num_images,
            "num_groups": self.num_groups,
            "network_calls_per_image": self.network_calls_per_image,
            "network_calls": self.network_calls,
            "bytes_by_array": self.bytes_by_array,
            "cache_bytes": self.cache_bytes,
            "free_bytes": self.free_bytes,
        }


def make_plan(
    tasks: Sequence[ShardTask],
    committed: set[str],
    manifest: Manifest,
    model: Model,
    *,
    cache: str,
    calls: float | None = None,
) -> Plan:
    """Estimate what the tasks that are not committed yet will cost. `calls`: network calls per image, if they are not
    those of inverting it."""
    remaining = [task for task in tasks if task.name not in committed]
    num_pairs = sum(task.stop - task.start for task in remaining)
    sizes = [task.input_shard.group_sizes(task.start, task.stop) for task in remaining if manifest.group == "list"]
    num_images = sum(int(each.sum()) for each in sizes) if manifest.group == "list" else 2 * num_pairs
    num_groups = sum(map(len, sizes)) if manifest.group == "list" else num_pairs
    counts = manifest.lengths(num_images, num_groups, num_pairs) | {"prompt": num_groups}
    lengths = model.family.lengths(model.config, manifest.max_tokens)
    own = {
        spec.array(name).path: dict(zip(spec.axes, lengths[name], strict=True))
        for name, spec in manifest.conditions.items()
    }
    arrays = [*manifest.arrays, *manifest.text_specs.values()]
    bytes_by_array = {spec.path: _bytes_of(spec, counts | own.get(spec.path, {})) for spec in arrays}
    chunks = {"whole": 0, "prompt": num_groups, "image": num_images}
    chunks["image_record"] = num_images * manifest.timesteps_per_pair
    bytes_by_array["metadata"] = _JSON_BYTES_PER_ARRAY * len(arrays) * len(remaining)
    bytes_by_array["metadata"] += _BYTES_PER_CHUNK * sum(chunks[spec.chunking] for spec in arrays)
    return Plan(
        num_shards=len(tasks),
        num_committed=len(tasks) - len(remaining),
        num_pairs=num_pairs,
        num_images=num_images,
        num_groups=num_groups,
        network_calls_per_image=calls_per_image(manifest, model) if calls is None else calls,
        bytes_by_array=bytes_by_array,
        free_bytes=None if is_remote(cache) else free_bytes(Path(cache)),
    )


def _bytes_of(spec: ArraySpec, lengths: Mapping[str, int]) -> int:
    """Bytes of one array; text arrays by a typical length."""
    if spec.is_text:
        return lengths[spec.axes[0]] * {"image/id": 36, "text": 80}.get(spec.path, 16)
    return math.prod(lengths[axis] for axis in spec.axes) * np.dtype(spec.dtype).itemsize


def calls_per_image(manifest: Manifest, model: Model) -> float:
    """Mean number of network evaluations per image, counted on the paths of a sample of group ids.

    For fixed_point the maximum of iterations is counted.
    """
    total = 0.0
    levels = replace(manifest.levels.levels(), sampler=model.levels.sampler)
    for index in range(_SAMPLED_PATHS):
        path = build_path(
            manifest.inverter,
            levels,
            seed=manifest.seed,
            group_id=f"plan-{index}",
            timesteps_per_pair=manifest.timesteps_per_pair,
        )
        total += path.num_calls(manifest.inverter, measured=manifest.measure_inversion)
    return total / _SAMPLED_PATHS


def check_disk(plan: Plan, cache: str) -> None:
    """Raise StorageError if the cache will not fit where it is to lie."""
    if plan.free_bytes is not None and plan.cache_bytes > plan.free_bytes:
        worst = max(plan.bytes_by_array, key=lambda name: plan.bytes_by_array[name])
        raise StorageError(
            "The disk is too small for this cache.",
            where=cache,
            expected=f"{human_bytes(plan.cache_bytes)} free (largest array: {worst}, "
            f"{human_bytes(plan.bytes_by_array[worst])})",
            got=f"{human_bytes(plan.free_bytes)} free",
            fix="use --profile lean (about a quarter), fewer --timesteps-per-pair, --limit, or another --cache",
        )


def print_plan(plan: Plan, console: Console, *, hours: str | None = None) -> None:
    """The plan as a table. `hours`: of a device, in words."""
    table = Table(title="Plan", show_header=False)
    table.add_row("shards", f"{plan.num_shards} ({plan.num_committed} committed already)")
    table.add_row("pairs to make", f"{plan.num_pairs:,} at most, of {plan.num_images:,} images")
    per_image = f"{plan.network_calls_per_image:.2f} per image and {SPREAD_RECORDS} per shard"
    table.add_row("network calls", f"{plan.network_calls:,} latents, {per_image}")
    for name, size in sorted(plan.bytes_by_array.items(), key=lambda item: -item[1]):
        if size and size >= plan.cache_bytes / 1000:
            table.add_row(f"bytes of {name}", human_bytes(size))
    table.add_row("bytes in all", human_bytes(plan.cache_bytes))
    free = "object store" if plan.free_bytes is None else human_bytes(plan.free_bytes)
    table.add_row("free", free)
    if hours is not None:
        table.add_row("device hours", hours)
    console.print(table)


def print_needs(needs: Sequence[Mapping[str, Any]], network_dtype: str, console: Console) -> None:
    """What each stage will hold on a device, as `Need.to_json` has it, as a table."""
    memory = needs[0]["device_memory"]
    table = Table(title=f"Memory of each device, {network_dtype}, nothing compiled")
    for name in ("", *(need["what"] for need in needs)):
        table.add_column(name, justify="right" if name else "left")
    table.add_row("pairs", *(str(need["batch_size"]) for need in needs))
    for name in ("weights", "optimizer", "gradients", "shard", "activations", "peak"):
        table.add_row(name, *(human_bytes(need[name]) for need in needs))
    if memory is not None:
        most = (str(need["largest_batch_size"] or "none") for need in needs)
        table.add_row(f"most pairs in {memory / 2**30:.4g} GiB", *most)
    console.print(table)
