"""Workers that make a cache from another one: its x0, texts, groups and pairs, and another network.

No image, VAE or text encoder is needed. With errors_only the points stay too, and each record costs one call.
"""

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float16
from torch import Tensor

from inpo.common.cache import Cache, CacheWriter, Commit, Shard, ShardData, TextCommit, TextData, open_cache
from inpo.common.cache.commits import skipped_rows
from inpo.common.cache.derive import coarse, split
from inpo.common.conditions import Condition
from inpo.common.denoiser import Denoiser
from inpo.common.inversion import Group, Inverted, evaluate_points, invert, own_noise
from inpo.common.models import Model
from inpo.common.spread import measure_spread
from inpo.precompute.components import WHOLE, Share, fit, in_words, load_denoiser
from inpo.precompute.phases import Phase
from inpo.precompute.settings import PrecomputeSettings
from inpo.precompute.worker import OF_IMAGES, num_unsettled, skipped_row


@dataclass(frozen=True, kw_only=True)
class CopyTask:
    """One shard of the other cache."""

    name: str
    num_rows: int


@dataclass(kw_only=True, eq=False)
class TextCopier:
    """Copies text shards: who was trained has the text encoders that it had."""

    source: Cache
    writer: CacheWriter

    def is_committed(self, task: CopyTask) -> bool:
        return self.writer.is_committed(task.name, TextCommit)

    def read(self, task: CopyTask) -> TextData:
        shard = self.source.texts.need(task.name)
        return TextData(
            arrays={path: shard.read_stored(path) for path in self.writer.manifest.text_specs},
            cut=shard.commit.cut,
            not_finite=shard.commit.not_finite,
        )

    def compute(self, item: TextData) -> TextData:
        return item

    def write(self, task: CopyTask, data: TextData) -> TextCommit | None:
        return self.writer.write_texts(task.name, data)

    def close(self) -> None:
        """Nothing is held."""


@dataclass(kw_only=True, eq=False)
class RefreshWorker:
    """Makes shards anew from those of another cache."""

    source: Cache
    writer: CacheWriter
    denoiser: Denoiser
    pairs_per_batch: int
    errors_only: bool

    def is_committed(self, task: Any) -> bool:
        return self.writer.is_committed(task.name)

    def read(self, task: Any) -> tuple[Shard, dict[str, np.ndarray]]:
        """What stays as it is."""
        shard, specs = self.source.shards[task.name], self.writer.manifest.specs
        made = {*OF_IMAGES, "delta_prev", "residual", "eps_ref", "x0", "x0_scale", "target_scale", "timestep"}
        return shard, {path: shard.read(path) for path in specs if path not in made}

    def compute(self, item: tuple[Shard, dict[str, np.ndarray]]) -> ShardData:
        clock = time.perf_counter()
        with in_words(self.pairs_per_batch):
            shard, arrays = item
            images = np.arange(shard.num_images)
            is_compact, manifest = self.writer.manifest.profile == "compact", self.writer.manifest
            x0 = torch.from_numpy(shard.read("x0"))
            if is_compact and self.source.manifest.profile != "compact":
                x0 = coarse(x0)
            caption = Condition.of(shard, images)
            inverted = self._records(shard, arrays, x0, caption)
            made = {name: getattr(inverted, name).numpy() for name in OF_IMAGES}
            for name in (*manifest.extra, *(["residual"] if inverted.residual is not None else [])):
                is_kept = name == "delta_prev" and self.errors_only
                made[name] = shard.read(name) if is_kept else getattr(inverted, name).numpy()
            arrays = arrays | made | {"x0": x0.numpy(), "timestep": inverted.timestep.numpy()}
            kept = inverted.finite.numpy()[shard.sides()].all(axis=1)
            skipped = self._skipped(shard, arrays, kept)
            group_of = arrays["image/group"].tolist()
            rows = np.unique(shard.sides()[kept]).tolist()
            spread = (
                measure_spread(
                    self.denoiser,
                    inverted,
                    rows,
                    group_of=group_of,
                    caption=caption,
                    images_per_batch=2 * self.pairs_per_batch,
                )
                if rows
                else None
            )
        arrays = _subset(arrays, self.writer, kept)
        counts = {name: count for name, count in shard.commit.counts.items() if name == "cut_prompt"}
        if "residual" in arrays:
            sides = np.stack([arrays["pair/win"], arrays["pair/lose"]], axis=1)
            counts["fixed_point_not_converged"] = num_unsettled(manifest, arrays["residual"], sides)
        for name in ("x0", "target") if is_compact and arrays else ():
            arrays[name], arrays[f"{name}_scale"] = split(arrays[name])
        return ShardData(
            arrays={path: arrays[path] for path in manifest.specs} if arrays else {},
            texts=shard.commit.texts if arrays else (),
            source=shard.commit.source,
            skipped=skipped,
            counts={name: count for name, count in counts.items() if count},
            spread=spread,
            seconds={"invert": time.perf_counter() - clock},
        )

    def _records(
        self, shard: Shard, arrays: dict[str, np.ndarray], x0: Float16[Tensor, "image c h w"], caption: Condition
    ) -> Inverted:
        manifest, images = self.writer.manifest, np.arange(shard.num_images)
        batch, group_of = 2 * self.pairs_per_batch, arrays["image/group"]
        if self.errors_only:
            return evaluate_points(
                self.denoiser,
                x0,
                torch.from_numpy(shard.read("target")),
                torch.from_numpy(shard.read("timestep")),
                group_of=group_of.tolist(),
                caption=caption,
                extra=tuple(name for name in manifest.extra if name == "eps_ref"),
                images_per_batch=batch,
            )
        sizes = np.bincount(group_of).tolist()
        return invert(
            self.denoiser,
            x0,
            [Group(id=str(name), num_images=size) for name, size in zip(arrays["group/id"], sizes, strict=True)],
            identity=manifest.inverter,
            seed=manifest.seed,
            timesteps_per_pair=manifest.timesteps_per_pair,
            caption=caption,
            empty=Condition.empty(shard, images),
            measure_inversion=manifest.measure_inversion,
            extra=manifest.extra,
            compact=manifest.profile == "compact",
            own_noise=own_noise(shard) if manifest.inverter.name == "tracked" else None,
            images_per_batch=batch,
        )

    def _skipped(
        self, shard: Shard, arrays: dict[str, np.ndarray], kept: Bool[np.ndarray, " pair"]
    ) -> list[dict[str, Any]]:
        """The rows that gave no pair before, and those that give none now."""
        path, store = f"skipped/{shard.name}/{shard.commit.attempt}.jsonl", self.source.store
        listed = skipped_rows(store.get(path) or b"", store.path(path)) if shard.commit.skipped else []
        before = [row.model_dump() for row in listed]
        gone = {row["row"] for row in before}
        rows = [row for row in range(*shard.commit.source.rows) if row not in gone]
        lost = [
            skipped_row(str(name), "not_finite", "a stored tensor of the inversion is NaN or infinite", row)
            for name, row, fine in zip(arrays["pair/id"], rows, kept, strict=False)
            if not fine
        ]
        return sorted([*before, *lost], key=lambda row: int(row["row"]))

    def write(self, task: Any, data: ShardData) -> Commit | None:
        return self.writer.write(task.name, data)

    def close(self) -> None:
        """Nothing is held but the network."""


def _subset(
    arrays: dict[str, np.ndarray], writer: CacheWriter, kept: Bool[np.ndarray, " pair"]
) -> dict[str, np.ndarray]:
    """The arrays of some pairs, and of the images and groups that they stand on."""
    win, lose, group = arrays["pair/win"], arrays["pair/lose"], arrays["image/group"]
    images = np.unique([win[kept], lose[kept]])
    groups = np.unique(group[images])
    rows = {"image": images, "group": groups, "pair": np.flatnonzero(kept)}
    owners = {path: spec.axes[0] for path, spec in writer.manifest.specs.items()}
    found = {path: values[rows[owners[path]]] for path, values in arrays.items() if path in owners}
    found["image/group"] = np.searchsorted(groups, group[images]).astype(group.dtype)
    for path, side in (("pair/win", win), ("pair/lose", lose)):
        found[path] = np.searchsorted(images, side[kept]).astype(side.dtype)
    return found if len(images) else {}


def _text_copier(
    model: Model, writer: CacheWriter, settings: PrecomputeSettings, device: torch.device, share: Share = WHOLE
) -> TextCopier:
    return TextCopier(source=open_cache(settings.like or ""), writer=writer)


def _refresh_worker(
    model: Model, writer: CacheWriter, settings: PrecomputeSettings, device: torch.device, share: Share = WHOLE
) -> RefreshWorker:
    with in_words(None):
        denoiser = load_denoiser(model, writer.manifest, device)
    return RefreshWorker(
        source=open_cache(settings.like or ""),
        writer=writer,
        denoiser=denoiser,
        pairs_per_batch=fit(denoiser, model, writer.manifest, settings, share),
        errors_only=settings.errors_only,
    )


COPIED_TEXTS = Phase(name="texts", kind=TextCommit, load=_text_copier)
REFRESHED = Phase(name="images", kind=Commit, load=_refresh_worker)
