"""What caches cost and hold, and their label sets with a share of the labels turned round."""

import json
from pathlib import Path

import numpy as np

from benchmarks.evidence.conditions import FLIPS, SCORERS, Cache, Pairs
from benchmarks.evidence.jobs import Step
from inpo.common.cache import open_cache
from inpo.common.cache.labels import read_labels
from inpo.common.durable import write_file
from inpo.common.models import open_model
from inpo.common.seeding import uniform
from inpo.precompute.plan import calls_per_image

_MARGINS = "margins"


def label_steps(cache: Cache, pairs: Pairs, *, soft: bool) -> list[Step]:
    """Write the sets `hard-5`, `hard-30` and, if asked for, those of the oracle's margins, `soft-5` and `soft-30`."""
    folder = cache.folder(pairs)
    steps: list[Step] = []
    if soft:
        steps.append(["relabel", str(folder), "--pairs", pairs.source, "--scorer", SCORERS[0], "--set", _MARGINS])
    for kind in ("hard", "soft") if soft else ("hard",):
        for flips in FLIPS:
            lines = folder.with_name(f"{cache.name}-{kind}-{flips}.jsonl")
            steps.append(lambda lines=lines, kind=kind, flips=flips: _write(lines, folder, kind, flips))
            steps.append(["relabel", str(folder), "--from", str(lines), "--set", f"{kind}-{flips}"])
    return steps


def _write(path: Path, folder: Path, kind: str, flips: int) -> None:
    """A pair that 5% turn is turned among the 30% too, whatever the cache."""
    cache = open_cache(str(folder))
    if kind == "soft":
        labels = [each for shard in read_labels(cache, _MARGINS).values() for each in shard.items()]
    else:
        labels = [
            (str(pair_id), float(label >= 0.5))
            for shard in cache
            for pair_id, label in zip(shard.read("pair/id"), shard.read("pair/label"), strict=True)
        ]
    lines = []
    for pair_id, label in labels:
        turned = uniform("turned label", pair_id) < flips / 100
        lines.append(json.dumps({"pair_id": pair_id, "label": 1 - label if turned else label}))
    write_file(path, "\n".join(lines) + "\n")


def network_calls(folder: Path, base: str) -> float:
    """What making a cache of pairs has cost: calls of the network for one image, on average."""
    return calls_per_image(open_cache(str(folder)).manifest, open_model(base))


def mean_error(folder: Path) -> float:
    """Mean reference error of all records of a cache."""
    sums = [(np.sum(values, dtype=np.float64), values.size) for values in _errors(folder)]
    total, count = (float(sum(part)) for part in zip(*sums, strict=True))
    return total / count


def _errors(folder: Path) -> list[np.ndarray]:
    return [np.asarray(shard.read("reference_error")) for shard in open_cache(str(folder))]
