"""Which pairs of which caches are trained on, and which are held out: known before any tensor is read."""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from inpo.common.cache import Cache, Shard
from inpo.common.cache.identity import check_one_run
from inpo.common.cache.labels import read_label_shards
from inpo.common.cache.store import PARALLEL_READS
from inpo.common.errors import CacheIncomplete, UsageError
from inpo.common.seeding import stable_hash, uniform
from inpo.common.text import plain_prompt, read_text, text_lines
from inpo.train.selection import IndexedShard, PairsOfShard, RecordSelection


@dataclass(frozen=True, kw_only=True, eq=False)
class Index:
    """Shards of all caches in a fixed order, training and held-out pairs apart."""

    training: tuple[IndexedShard, ...]
    held_out: tuple[IndexedShard, ...]
    fingerprint: str
    """Changes with any pair, label or selection: a stream's position is worth nothing under another index."""
    unknown: tuple[str, ...] = ()
    """A line for each list of pair ids that names pairs which no cache has."""

    def of(self, cache: Cache) -> "Index":
        """The part of the index that belongs to one of its caches."""
        return Index(
            training=tuple(shard for shard in self.training if shard.shard.cache is cache),
            held_out=tuple(shard for shard in self.held_out if shard.shard.cache is cache),
            fingerprint=self.fingerprint,
            unknown=self.unknown,
        )

    @property
    def num_records(self) -> int:
        return sum(shard.num_records for shard in self.training)

    @property
    def num_pairs(self) -> int:
        return sum(len(shard.rows) for shard in self.training)

    @property
    def widest(self) -> int:
        """As many images as a record has at most, trained on or held out."""
        return max(int(shard.sides.shape[1]) for shard in (*self.training, *self.held_out))


def build_index(caches: Sequence[Cache], *, soft: bool, held_out: float, **others: Any) -> Index:
    """Read the small arrays of every shard and decide what is used.

    Held-out pairs are chosen by the hash of the prompt alone (without case and blanks), so that a prompt is never on
    both sides and runs of other seeds hold out the same ones. With hard labels a record at 0.5 is left out, and of
    lists one that prefers nobody. Raises UsageError for a list of pair ids that cannot be read or names no pair of the
    caches, CacheIncomplete for labels or scores that are not there. `others`: more of a RecordSelection.
    """
    selection = RecordSelection(soft=soft, held_out=held_out, **others)
    check_one_run(caches)
    lists = {
        "--only": (selection.only, _read_list(selection.only, "--only")),
        "--except": (selection.excluded, _read_list(selection.excluded, "--except")),
    }
    shards = [shard for cache in caches for shard in cache]
    sets = {id(cache): read_label_shards(cache, selection.labels) if selection.labels else {} for cache in caches}

    def index_one(shard: Shard) -> tuple[IndexedShard, IndexedShard, int, list[str]]:
        found = PairsOfShard(shard, selection, sets[id(shard.cache)].get(shard.name))
        found.use(wanted=lists["--only"][1], unwanted=lists["--except"][1])
        whole = found.lists() if selection.lists else found.pairs()
        prompts = shard.prompts()[whole.group]
        aside = np.array([uniform("held-out", plain_prompt(str(each))) < selection.held_out for each in prompts], bool)
        return whole.part(~aside), whole.part(aside), found.digest(whole), found.ids

    with ThreadPoolExecutor(PARALLEL_READS) as pool:
        parts = list(pool.map(index_one, shards))
    index = Index(
        training=tuple(training for training, _, _, _ in parts if len(training.rows)),
        held_out=tuple(aside for _, aside, _, _ in parts if len(aside.rows)),
        fingerprint=f"{stable_hash(selection.held_out, *(digest for _, _, digest, _ in parts)):016x}",
        unknown=_unknown(lists, [each[3] for each in parts]),
    )
    if index.num_records == 0:
        raise CacheIncomplete(
            "No list is left to train on." if selection.lists else "No pair is left to train on.",
            where=", ".join(cache.location for cache in caches),
            got=f"{sum(cache.num_pairs for cache in caches)} committed pairs, "
            f"{sum(len(shard.rows) for shard in index.held_out)} of them held out",
            fix="check --only, --except, --labels, --timestep-range and held_out",
        )
    return index


def _read_list(path: Path | None, option: str) -> frozenset[str] | None:
    if path is None:
        return None
    text = read_text(
        path,
        what="The list of pair ids cannot be read.",
        error=UsageError,
        where=f"{option} {path}",
        fix="`inpo inspect filter CACHE --where CONDITION --out LIST` makes one",
    )
    return frozenset(line.strip() for line in text_lines(text) if line.strip())


def _unknown(
    lists: Mapping[str, tuple[Path | None, frozenset[str] | None]], ids: Sequence[Sequence[str]]
) -> tuple[str, ...]:
    """A line for each list with ids that no cache has; UsageError if it has no other ids.

    A line that begins with # is a comment, unless a pair is called so.
    """
    lines = []
    for option, (path, listed) in lists.items():
        missing = sorted((listed or frozenset()).difference(*ids))
        foreign = [pair_id for pair_id in missing if not pair_id.startswith("#")]
        if not listed or not foreign:
            continue
        named = len(listed) - len(missing) + len(foreign)
        if len(foreign) == named:
            raise UsageError(
                "No pair of the list is in the caches.",
                where=f"{option} {path}",
                expected=f"ids like {ids[0][0]!r}" if ids and len(ids[0]) else "ids of committed pairs",
                got=repr(foreign[0]),
                fix="`inpo inspect filter CACHE --where CONDITION --out LIST` makes a list of this cache's ids",
            )
        lines.append(f"{len(foreign)} of {named} ids in {option} {path} are in no cache, {foreign[0]!r} first")
    return tuple(lines)
