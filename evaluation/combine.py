"""Label sets made of others or of a file, without looking at an image."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from inpo.common.cache import Cache
from inpo.common.cache.document import PairId, Share
from inpo.common.cache.labels import FILE, LabelSet, PairLabel, read_label_shards, read_shard_labels, write_labels
from inpo.common.errors import DataError, UsageError
from inpo.common.printable import shown
from inpo.common.text import read_text, text_lines
from inpo.evaluation.relabel import RelabelReport, report
from inpo.evaluation.settings import CombineName


class _Row(BaseModel):
    """A line of a file of labels."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    pair_id: PairId
    label: Share | Annotated[list[Share], Field(min_length=1)]
    """P(win preferred); a list has one for each kept timestep, ascending."""


def combine_sets(cache: Cache, members: Sequence[str], *, how: CombineName, set_name: str) -> RelabelReport:
    """Make a set of complete sets of one scorer each.

    vote: the label is the share of scorers that prefer the win, a tie counting half; no scores, since votes are of
    pairs, not of images. mean: the mean of their labels, and of their scores in units of their temperatures. Raises
    CacheIncomplete for a member that is not complete, UsageError if the set is there with other settings.
    """
    read = {name: read_label_shards(cache, name) for name in members}

    def label(shard: str, pair_id: str) -> PairLabel:
        pairs = [(sets[shard], sets[shard].pairs[pair_id]) for sets in read.values()]
        if how == "mean":
            labels = [pair.label for _, pair in pairs]
            scores = [np.array(pair.scores) / labelled.temperature for labelled, pair in pairs if pair.scores]
            return _pair(
                float(np.mean(labels)), np.mean(scores, axis=0).tolist() if len(scores) == len(pairs) else None
            )
        votes = [float(np.sign(pair.label - 0.5)) / 2 + 0.5 for _, pair in pairs]
        return _pair(sum(votes) / len(votes), None)

    source = next(iter(read[members[0]].values())).source
    return _write(cache, set_name, how, source, label, members=tuple(members))


def read_file(cache: Cache, file: Path, *, set_name: str) -> RelabelReport:
    """Make a set of a file with a JSON object a line: `pair_id`, and `label`, P(win preferred), or a list of them, one
    for each kept timestep. Raises DataError for a line that is not such, and for a committed pair without one.
    """
    rows = dict(_rows(file, cache.manifest.timesteps_per_pair))

    def label(shard: str, pair_id: str) -> PairLabel:
        if pair_id not in rows:
            raise DataError(
                "The file has no label for a committed pair.",
                where=file,
                expected=f"a line with pair_id {pair_id!r} (shard {shard})",
                got=f"{len(rows)} other pairs",
                fix="add its line; `inpo inspect filter CACHE --where 'label >= 0'` lists all pairs",
            )
        return rows[pair_id]

    return _write(cache, set_name, FILE, shown(str(file)), label)


def _rows(file: Path, num_records: int) -> Mapping[str, PairLabel]:
    text = read_text(file, what="The file of labels cannot be read.", error=UsageError, where=f"--from {file}")
    rows: dict[str, PairLabel] = {}
    for number, line in enumerate(text_lines(text), start=1):
        if not line.strip():
            continue
        try:
            row = _Row.model_validate(json.loads(line))
        except (ValueError, RecursionError):  # pydantic's own is a ValueError
            raise _bad_line(file, number, line[:200], num_records) from None
        by_record = tuple(row.label) if isinstance(row.label, list) else ()
        if row.pair_id in rows or len(by_record) not in (0, num_records):
            got = f"pair {row.pair_id!r} again" if row.pair_id in rows else f"{len(by_record)} labels"
            raise _bad_line(file, number, got, num_records)
        mean = float(np.mean(row.label))
        rows[row.pair_id] = PairLabel(scores=None, label=mean, by_record=by_record)
    return rows


def _bad_line(file: Path, number: int, got: str, num_records: int) -> DataError:
    return DataError(
        "A line of the file gives no label.",
        where=f"{file}, line {number}",
        expected='{"pair_id": "...", "label": P}, P in [0, 1], or a list of as many as there are kept timesteps '
        f"({num_records}); each pair once",
        got=got,
        fix="correct that line",
    )


def _pair(label: float, scores: Sequence[float] | None) -> PairLabel:
    return PairLabel(scores=None if scores is None else (scores[0], scores[1]), label=label)


def _told(labels: LabelSet) -> str:
    members = f" ({', '.join(labels.members)})" if labels.members else ""
    return f"labels of {labels.scorer}{members} from {labels.source}"


def _write(
    cache: Cache,
    set_name: str,
    scorer: str,
    source: str,
    label: Callable[[str, str], PairLabel],
    *,
    members: tuple[str, ...] = (),
) -> RelabelReport:
    """Write the set for every committed shard, whole; one that says something else is refused."""
    made = {
        shard.name: LabelSet(
            attempt=shard.commit.attempt,
            scorer=scorer,
            members=members,
            temperature=1.0,
            source=source,
            pairs={pair_id: label(shard.name, pair_id) for pair_id in map(str, shard.read("pair/id"))},
        )
        for shard in cache
    }
    there = {name: read_shard_labels(cache.store, set_name, name) for name in made}
    gone = [name for name, existing in there.items() if existing and existing.attempt != made[name].attempt]
    for name, existing in there.items():
        if existing and name not in gone and existing.to_json() != made[name].to_json():
            raise UsageError(
                f"Label set {set_name!r} is there already, and says something else.",
                where=cache.location,
                expected=f"a new name, or the {_told(existing)} that are there",
                got=f"other {_told(made[name])} (shard {name})",
                fix="pass another --set name",
            )
    for name in gone:
        cache.store.remove(f"labels/{set_name}/{name}.json")
    for name, labels in made.items():
        write_labels(cache.store, set_name, name, labels)
    return report(cache, set_name, len(gone))
