"""Label sets: P(win preferred) given to committed pairs later, beside the shards, which stay as they are.

    CACHE/labels/<set>/<shard>.json    {attempt, scorer, members, temperature, source,
                                         pairs: {pair id: {scores: [win, lose], label, by_record}}, checksum}

One document per shard, keyed by the attempt it was made for, and sealed: zarr's checksums do not reach here. A set is
complete when every committed shard has one.
"""

import re
from typing import Annotated

from pydantic import Field

from inpo.common.cache.document import (
    MAX_PAIRS_PER_SHARD,
    Attempt,
    Document,
    Location,
    PairId,
    Share,
    check_seal,
    load,
    sealed,
)
from inpo.common.cache.reader import Cache
from inpo.common.cache.store import CacheStore
from inpo.common.errors import CacheError, CacheIncomplete, CacheMismatch, UsageError, command

FILE = "file"
"""The scorer of labels that a file gave."""
SMPO_TEMPERATURE = 0.28201571 - 0.11543526
"""Of SmPO's released labels, in raw PickScore cosines: the range that its preprocessing divides them by."""
Score = Annotated[float, Field(ge=-1e30, le=1e30)]


class PairLabel(Document):
    """One pair's raw scores, in the scorer's own unit, and P(win preferred) made from them."""

    scores: tuple[Score, Score] | None
    """(win, lose); None: the label was given without."""
    label: Share
    """P(win preferred): of one scorer sigmoid((win - lose) / temperature), of several their vote or mean. Below 0.5 the
    side called lose is preferred."""
    by_record: tuple[Share, ...] = ()
    """P(win preferred) at each kept timestep, ascending, where the label differs between them: `label` is their mean.
    """


class LabelSet(Document):
    """The labels of one shard's pairs."""

    attempt: Attempt
    """The committed attempt that these pair ids belong to."""
    scorer: Annotated[str, Field(max_length=1000)]
    """A scorer's name; vote or mean of a combined set, file of one that a file gave."""
    members: tuple[Annotated[str, Field(max_length=100)], ...] = ()
    """Of a combined set the sets that it was made of."""
    temperature: Annotated[float, Field(gt=0, le=1e30)]
    """In the scorer's unit."""
    source: Location
    """Location of the pair source whose images were scored."""
    pairs: Annotated[dict[PairId, PairLabel], Field(max_length=MAX_PAIRS_PER_SHARD)]
    checksum: Annotated[str, Field(pattern="^([0-9a-f]{32})?$")] = ""
    """As in a commit."""

    def to_json(self) -> bytes:
        return sealed(self.model_dump(mode="json"))

    @classmethod
    def from_json(cls, data: bytes, where: str) -> "LabelSet":
        """Parse; raises CacheSchemaError for what is no label set, CacheCorrupt for one that was edited or damaged."""
        try:
            document = load(data, where)
            labels = cls._parse(document, where)
            check_seal(document, where, what="A label set", fix=_REMAKE)
        except CacheError as error:
            error.fix = _REMAKE
            raise
        return labels


_REMAKE = "the file was edited or damaged; restore it from a copy, or remove it: the same `inpo relabel` makes it again"


_SET_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


def check_set_name(name: str) -> str:
    """The name itself, or UsageError: it becomes a folder."""
    if not _SET_NAME.fullmatch(name):
        raise UsageError(
            "Bad name of a label set.",
            where="relabel --set, train --labels",
            expected="at most 100 letters, digits, dots, dashes, underscores, the first a letter or digit",
            got=repr(name),
            fix="choose another name; it becomes a folder",
        )
    return name


def write_labels(store: CacheStore, set_name: str, shard_name: str, labels: LabelSet) -> bool:
    """Write one shard's labels if there are none; False, and nothing written, if there are."""
    return store.put_new(f"labels/{check_set_name(set_name)}/{shard_name}.json", labels.to_json())


def label_sets(store: CacheStore) -> list[str]:
    """Names of the label sets of a cache, complete or not."""
    names = {path.split("/")[0] for path in store.listing("labels") if path.count("/") == 1}
    return sorted(name for name in names if _SET_NAME.fullmatch(name))


def read_shard_labels(store: CacheStore, set_name: str, shard_name: str) -> LabelSet | None:
    """One shard's labels, whatever attempt they are for; None if there are none."""
    path = f"labels/{check_set_name(set_name)}/{shard_name}.json"
    data = store.get(path)
    return None if data is None else LabelSet.from_json(data, store.path(path))


def sets_by_scorer(cache: Cache) -> dict[str, str]:
    """{label set: its scorer} of the sets that one scorer made. Sets without a label for any shard are left out."""
    found = {}
    for name in label_sets(cache.store):
        made = _labels_of_any(cache, name)
        if made is not None and made.scorer != FILE and not made.members:
            found[name] = made.scorer
    return found


def is_combined(cache: Cache, set_name: str) -> bool:
    """Whether a label set was made of others."""
    made = _labels_of_any(cache, set_name)
    return made is not None and bool(made.members)


def _labels_of_any(cache: Cache, set_name: str) -> LabelSet | None:
    """Those of the first shard that has labels of this set."""
    return next((each for shard in cache.shards if (each := read_shard_labels(cache.store, set_name, shard))), None)


def label_settings(cache: Cache, set_name: str) -> tuple[str, float] | None:
    """(scorer, temperature) of a label set, which all its shards share; None if no shard has labels.

    Raises CacheMismatch for a set of several settings.
    """
    found: tuple[str, float] | None = None
    for name in cache.shards:
        labels = read_shard_labels(cache.store, set_name, name)
        if labels is None:
            continue
        ours = (labels.scorer, labels.temperature)
        if found not in (None, ours):
            raise CacheMismatch(
                f"Label set {set_name!r} is a mixture: its shards were labelled with different settings.",
                where=cache.store.path(f"labels/{set_name}/{name}.json"),
                expected="scorer {}, temperature {:g}".format(*found) if found else None,
                got="scorer {}, temperature {:g}".format(*ours),
                fix="make a set of another name with one `inpo relabel`",
            )
        found = ours
    return found


def read_labels(cache: Cache, set_name: str) -> dict[str, dict[str, float]]:
    """{shard name: {pair id: P(win preferred)}} for every committed shard that has pairs. Raises as the next."""
    found = read_label_shards(cache, set_name)
    return {name: {pair_id: pair.label for pair_id, pair in labels.pairs.items()} for name, labels in found.items()}


def read_label_shards(cache: Cache, set_name: str) -> dict[str, LabelSet]:
    """{shard name: its labels} for every committed shard that has pairs.

    Raises CacheIncomplete if there is no such set or a shard has no labels yet, and CacheMismatch if a shard's labels
    were made for another attempt, or not for as many pairs as it has.
    """
    check_set_name(set_name)
    have = label_sets(cache.store)
    if set_name not in have:
        raise CacheIncomplete(
            f"This cache has no label set {set_name!r}.",
            where=cache.location,
            expected="a set that exists",
            got=f"sets here: {', '.join(have) or 'none'}",
            fix=f"`{command('relabel', cache.location, '--pairs', 'SRC', '--scorer', 'NAME', '--set', set_name)}` "
            "makes it",
        )
    found: dict[str, LabelSet] = {}
    missing: list[str] = []
    for name, shard in cache.shards.items():
        labels = read_shard_labels(cache.store, set_name, name)
        if labels is None:
            missing.append(name)
            continue
        if labels.attempt != shard.commit.attempt or len(labels.pairs) != shard.num_pairs:
            raise CacheMismatch(
                f"Label set {set_name!r} was made for other shards than the committed ones.",
                where=cache.store.path(f"labels/{set_name}/{name}.json"),
                expected=f"attempt {shard.commit.attempt}, {shard.num_pairs} pairs",
                got=f"attempt {labels.attempt}, {len(labels.pairs)} pairs",
                fix="run the same `inpo relabel` again: it replaces labels of attempts that are gone",
            )
        found[name] = labels
    if missing:
        raise CacheIncomplete(
            f"Label set {set_name!r} is not complete.",
            where=cache.location,
            expected=f"labels for {len(cache.shards)} shards",
            got=f"none for {len(missing)}: {', '.join(missing[:4])}{', ...' if len(missing) > 4 else ''}",
            fix="run the same `inpo relabel` again: it goes on where it stopped",
        )
    return found
