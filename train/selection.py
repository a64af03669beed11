"""What is used of one shard: its pairs or its lists, with labels, scores and timesteps, before any tensor is read."""

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from inpo.common.cache import Shard
from inpo.common.cache.labels import LabelSet
from inpo.common.errors import CacheIncomplete, CacheMismatch, command
from inpo.common.seeding import stable_hash
from inpo.train.lists import advantages, by_score, preferences, win_rates


@dataclass(frozen=True, kw_only=True)
class RecordSelection:
    """Which records of the caches are used, and what is made of their labels and scores."""

    soft: bool
    """True: labels of one half are used."""
    held_out: float
    """Share of the prompts that is not trained on."""
    labels: str | None = None
    """A label set; None: the source's labels and scores."""
    only: Path | None = None
    excluded: Path | None = None
    """Lists of pair ids."""
    swap: bool = False
    """True: what the labels prefer is not preferred."""
    reverse_dropped: bool = False
    """True: the same where the caption was dropped."""
    timestep_range: tuple[int, int] | None = None
    """[low, high) of the timesteps; None: all."""
    rates: bool = False
    """True: the label is made of win rates where all images of a group have scores."""
    lists: bool = False
    """True: a record is a list, the images of a group that stand in its pairs."""
    scores: bool = False
    """True: every list needs scores."""
    score_temperature: float = 1.0
    """Unit of the source's own scores."""


@dataclass(frozen=True, kw_only=True, eq=False)
class IndexedShard:
    """A shard's usable pairs: rows, their images and their labels. Where records are lists: its groups' images."""

    shard: Shard
    rows: Int[np.ndarray, " used"]
    """Of the pairs, or of the groups."""
    sides: Int[np.ndarray, "used place"]
    """Rows of the images: win, lose; of a list all, and -1 where it is shorter than others."""
    group: Int[np.ndarray, " used"]
    label: Float[np.ndarray, " used"]
    """P(win preferred), the mean over records; the objective swaps the sides where it is below 0.5. 1 for lists."""
    by_record: Float[np.ndarray, "used record"] | None = None
    """P(win preferred) at each record, where it differs between them."""
    usable: Bool[np.ndarray, "used record"] | None = None
    """Which records are used; None: all."""
    above: Bool[np.ndarray, "used place place"] | None = None
    """Of lists: who is preferred to whom."""
    advantage: Float[np.ndarray, "used place"] | None = None
    """Of lists: each image's advantage by its score; 0 without scores."""

    @property
    def num_images(self) -> int:
        """Distinct images of the pairs."""
        return len(np.unique(self.sides[self.sides >= 0]))

    @property
    def num_records(self) -> int:
        return len(self.rows) * self.num_kept if self.usable is None else int(self.usable.sum())

    @property
    def num_kept(self) -> int:
        """K."""
        return self.shard.cache.manifest.timesteps_per_pair

    def labels(
        self, pairs: Int[np.ndarray, " record"], records: Int[np.ndarray, " record"]
    ) -> Float[np.ndarray, " record"]:
        """P(win preferred) of some records: positions in `rows`, and which of the K."""
        found: np.ndarray = self.label[pairs] if self.by_record is None else self.by_record[pairs, records]
        return found

    @property
    def used_labels(self) -> Float[np.ndarray, " label"]:
        """P(win preferred) of all that is used, as often as it differs between a pair's records."""
        if self.by_record is None:
            return self.label
        found: np.ndarray = self.by_record.ravel() if self.usable is None else self.by_record[self.usable]
        return found

    @property
    def first_two(self) -> "IndexedShard":
        """Its pairs, or the first two images of its lists."""
        return replace(self, sides=self.sides[:, :2], above=None, advantage=None)

    def part(self, mask: Bool[np.ndarray, " used"]) -> "IndexedShard":
        """Some of its rows."""
        kept: dict[str, Any] = {"shard": self.shard}
        for each in fields(self):
            value = getattr(self, each.name)
            if each.name != "shard" and value is not None:
                kept[each.name] = value[mask]
        return IndexedShard(**kept)


class PairsOfShard:
    """The pairs of a shard with their labels and scores, before it is decided which are used."""

    def __init__(self, shard: Shard, selection: RecordSelection, labels: LabelSet | None) -> None:
        self.shard = shard
        self.selection = selection
        self.ids = [str(pair_id) for pair_id in shard.read("pair/id")]
        self.sides, self.group = shard.sides(), shard.groups()
        self.in_set = labels is not None
        num_records = shard.cache.manifest.timesteps_per_pair
        self.usable = np.ones((len(self.ids), num_records), bool)
        if labels is None:
            label = shard.read("pair/label").astype(np.float64)[:, None]
            self.score = shard.read("image/score").astype(np.float64) / selection.score_temperature
        else:
            label, self.score = self._of_set(labels, num_records)
        self.label = np.broadcast_to(label, self.usable.shape).copy()
        if selection.rates:
            self._take_rates()
        reverse = np.full(len(self.ids), selection.swap)
        if selection.reverse_dropped:
            reverse ^= shard.dropped()[self.group]
        self.label[reverse] = 1 - self.label[reverse]
        self.reversed_groups = set(self.group[reverse].tolist())

    def _of_set(
        self, labels: LabelSet, num_records: int
    ) -> tuple[Float[np.ndarray, "pair _"], Float[np.ndarray, " image"]]:
        """P(win preferred) by a label set, and scores in units of its temperature."""
        shard = self.shard
        missing = [pair_id for pair_id in self.ids if pair_id not in labels.pairs]
        if missing:
            raise CacheIncomplete(
                f"The label set {self.selection.labels!r} lacks pairs.",
                where=f"{shard.cache.location}, shard {shard.name}",
                expected=f"{len(self.ids)} labels",
                got=f"{len(labels.pairs)}; missing {missing[0]!r}, ...",
                fix="run `inpo relabel` again with the same --set: it completes the set",
            )
        score = np.full(shard.num_images, np.nan)
        rows = []
        for pair_id, sides in zip(self.ids, self.sides.tolist(), strict=True):
            pair = labels.pairs[pair_id]
            rows.append(pair.by_record or (pair.label,) * num_records)
            if len(rows[-1]) != num_records:
                raise CacheMismatch(
                    f"The label set {self.selection.labels!r} has another number of labels than the pair has records.",
                    where=f"{shard.cache.location}, shard {shard.name}, pair {pair_id}",
                    expected=num_records,
                    got=len(rows[-1]),
                    fix="make the set again for this cache, one label per kept timestep",
                )
            if pair.scores is not None:
                score[sides] = np.array(pair.scores) / labels.temperature
        return np.array(rows, dtype=np.float64), score

    def _take_rates(self) -> None:
        """Labels from win rates, in the groups whose images all have scores."""
        for group in np.unique(self.group).tolist():
            pairs = np.flatnonzero(self.group == group)
            images, local = self._images(pairs)
            if np.isfinite(self.score[images]).all():
                win, lose = win_rates(self.score[images])[local].T
                self.label[pairs] = ((1 + win - lose) / 2)[:, None]

    def use(self, *, wanted: frozenset[str] | None, unwanted: frozenset[str] | None) -> None:
        """Decide which records are used."""
        kept = [(wanted is None or each in wanted) and each not in (unwanted or ()) for each in self.ids]
        self.usable &= np.array(kept, bool)[:, None]
        if not self.selection.soft and not self.selection.lists:
            self.usable &= self.label.astype(np.float32) != 0.5  # as the loss sees it
        if self.selection.timestep_range is not None:
            low, high = self.selection.timestep_range
            timestep = self.shard.read("timestep")[self.group]
            self.usable &= (low <= timestep) & (timestep < high)

    def pairs(self) -> IndexedShard:
        rows = np.flatnonzero(self.usable.any(axis=1))
        usable, label = self.usable[rows], self.label[rows].astype(np.float32)
        constant = bool((label == label[:, :1]).all())
        return IndexedShard(
            shard=self.shard,
            rows=rows,
            sides=self.sides[rows],
            group=self.group[rows],
            label=label[:, 0] if constant else label.mean(axis=1),
            by_record=None if constant else label,
            usable=None if usable.all() else usable,
        )

    def lists(self) -> IndexedShard:
        """The images of each group that stand in its usable pairs."""
        used = self.usable.any(axis=1)
        found = []
        for group in np.unique(self.group[used]).tolist():
            pairs = np.flatnonzero(used & (self.group == group))
            images, local = self._images(pairs)
            sign = -1.0 if group in self.reversed_groups else 1.0
            score = sign * self.score[images]
            scored = bool(np.isfinite(score).all())
            if scored and not self.in_set:
                above = by_score(score)
            else:
                above = preferences(len(images), local, self.label[pairs].mean(axis=1))
            if self.selection.scores and not scored:
                raise self._without_scores(group)
            if above.any() or self.selection.scores:
                advantage = advantages(score) if scored else np.zeros(len(images))
                found.append((group, pairs[0], images, above, advantage))
        place = max((len(images) for _, _, images, _, _ in found), default=2)
        groups = np.array([group for group, *_ in found], dtype=np.int64)
        sides = np.full((len(found), place), -1)
        above = np.zeros((len(found), place, place), bool)
        advantage = np.zeros((len(found), place), np.float32)
        for row, (_, _, images, prefers, weight) in enumerate(found):
            size = len(images)
            sides[row, :size], above[row, :size, :size], advantage[row, :size] = images, prefers, weight
        usable = self.usable[[first for _, first, *_ in found]]
        return IndexedShard(
            shard=self.shard,
            rows=groups,
            sides=sides,
            group=groups,
            label=np.ones(len(found), np.float32),
            usable=None if usable.all() else usable,
            above=above,
            advantage=advantage,
        )

    def _images(self, pairs: Int[np.ndarray, " pair"]) -> tuple[Int[np.ndarray, " image"], Int[np.ndarray, "pair 2"]]:
        """Rows of the images of some pairs, and the pairs in numbers of them."""
        images, local = np.unique(self.sides[pairs], return_inverse=True)
        return images, local.reshape(-1, 2)

    def _without_scores(self, group: int) -> CacheIncomplete:
        location = self.shard.cache.location
        return CacheIncomplete(
            "The objective needs a score of every image, and some have none.",
            where=f"{location}, shard {self.shard.name}, group {self.shard.read('group/id')[group]}",
            expected="scores of the source, or a label set with scores",
            got=f"label set {self.selection.labels}" if self.in_set else "image/score is NaN",
            fix=f"`{command('relabel', location, '--pairs', 'SRC', '--scorer', 'pickscore', '--set', 'NAME')}` makes "
            "some; then train with --labels NAME",
        )

    def digest(self, whole: IndexedShard) -> int:
        """Changes with whatever is used of the shard."""
        parts = (whole.rows, whole.sides, whole.label, whole.by_record, whole.usable, whole.above, whole.advantage)
        return stable_hash(self.shard.commit.attempt, *("" if each is None else each.tobytes().hex() for each in parts))
