"""Which pairs of which caches are trained on, and which are held out: known before any tensor is read."""

import unicodedata
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int

from inpo.common.cache import Cache, Shard
from inpo.common.cache.identity import check_one_run
from inpo.common.cache.labels import read_labels
from inpo.common.errors import CacheIncomplete, UsageError
from inpo.common.seeding import stable_hash, uniform
from inpo.common.text import read_text, text_lines

_THREADS = 16


@dataclass(frozen=True, kw_only=True, eq=False)
class IndexedShard:
    """A shard's usable pairs: rows, their images and their labels."""

    shard: Shard
    rows: Int[np.ndarray, " used"]
    sides: Int[np.ndarray, "used 2"]
    """Rows of the images: win, lose."""
    group: Int[np.ndarray, " used"]
    label: Float[np.ndarray, " used"]
    """P(win preferred); the objective swaps the sides where it is below 0.5."""

    @property
    def num_images(self) -> int:
        """Distinct images of the pairs."""
        return len(np.unique(self.sides))

    @property
    def num_records(self) -> int:
        return len(self.rows) * self.shard.cache.manifest.timesteps_per_pair


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


def build_index(
    caches: Sequence[Cache],
    *,
    soft: bool,
    held_out: float,
    labels: str | None = None,
    only: Path | None = None,
    excluded: Path | None = None,
) -> Index:
    """Read the small arrays of every shard and decide what is used.

    Held-out pairs are chosen by the hash of the prompt alone (without case and blanks), so that a prompt is never on
    both sides and runs of other seeds hold out the same ones. With hard labels a pair at 0.5 is left out. Raises
    UsageError for a list of pair ids that cannot be read or names no pair of the caches.
    """
    check_one_run(caches)
    wanted = _read_list(only, "--only")
    unwanted = _read_list(excluded, "--except")
    shards = [shard for cache in caches for shard in cache]
    label_sets = {id(cache): read_labels(cache, labels) if labels else None for cache in caches}

    def index_one(shard: Shard) -> tuple[IndexedShard, IndexedShard, int, list[str]]:
        ids = [str(pair_id) for pair_id in shard.read("pair/id")]
        sides, group = shard.sides(), shard.groups()
        prompts = shard.prompts()[group]
        label_set = label_sets[id(shard.cache)]
        if label_set is None:
            label = shard.read("pair/label").astype(np.float64)
        else:
            found = label_set.get(shard.name, {})
            missing = [pair_id for pair_id in ids if pair_id not in found]
            if missing:
                raise CacheIncomplete(
                    f"The label set {labels!r} lacks pairs.",
                    where=f"{shard.cache.location}, shard {shard.name}",
                    expected=f"{len(ids)} labels",
                    got=f"{len(found)}; missing {missing[0]!r}, ...",
                    fix="run `inpo relabel` again with the same --set: it completes the set",
                )
            label = np.array([found[pair_id] for pair_id in ids], dtype=np.float64)
        use = np.array([(wanted is None or each in wanted) and each not in (unwanted or ()) for each in ids], bool)
        if not soft:
            use &= label != 0.5
        aside = np.array([uniform("held-out", _plain(str(prompt))) < held_out for prompt in prompts], bool)

        def part(mask: np.ndarray) -> IndexedShard:
            rows = np.flatnonzero(mask)
            return IndexedShard(
                shard=shard, rows=rows, sides=sides[rows], group=group[rows], label=label[rows].astype(np.float32)
            )

        digest = stable_hash(shard.commit.attempt, *np.flatnonzero(use).tolist(), *label[use].tolist())
        return part(use & ~aside), part(use & aside), digest, ids

    with ThreadPoolExecutor(_THREADS) as pool:
        parts = list(pool.map(index_one, shards))
    index = Index(
        training=tuple(training for training, _, _, _ in parts if len(training.rows)),
        held_out=tuple(aside for _, aside, _, _ in parts if len(aside.rows)),
        fingerprint=f"{stable_hash(held_out, *(digest for _, _, digest, _ in parts)):016x}",
        unknown=_unknown({"--only": (only, wanted), "--except": (excluded, unwanted)}, [each[3] for each in parts]),
    )
    if index.num_records == 0:
        raise CacheIncomplete(
            "No pair is left to train on.",
            where=", ".join(cache.location for cache in caches),
            got=f"{sum(cache.num_pairs for cache in caches)} committed pairs, "
            f"{sum(len(shard.rows) for shard in index.held_out)} of them held out",
            fix="check --only, --except, --labels and held_out",
        )
    return index


def _plain(prompt: str) -> str:
    """The prompt without what people vary without meaning another one: case, blanks, the way accents are coded."""
    return " ".join(unicodedata.normalize("NFC", unicodedata.normalize("NFC", prompt).casefold()).split())


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
