"""Relabelling: a scorer's preference for every committed pair, from the source's images, as a label set.

Nothing is inverted again and no shard is touched: labels lie beside the shards, keyed by their attempts.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from scipy.special import expit

from inpo.common.cache import Cache, Shard
from inpo.common.cache.buckets import read_buckets
from inpo.common.cache.labels import LabelSet, PairLabel, label_sets, read_shard_labels, write_labels
from inpo.common.cache.store import CacheStore
from inpo.common.errors import CacheMismatch, DataError, UsageError
from inpo.common.pairs import ImageError, InputShard, Pair, PairSource, decode_image
from inpo.common.pairs.buckets import sort_pairs
from inpo.common.pairs.decode import image_digest
from inpo.common.pairs.files import possible_names
from inpo.common.pairs.names import known_names, renamed
from inpo.common.processes import processes
from inpo.common.scorer import Scorer, checked_scores

PAIRS_PER_BATCH = 16


@dataclass(frozen=True, kw_only=True)
class RelabelReport:
    """A label set as it stands."""

    num_shards: int
    num_pairs: int
    num_agreeing: int
    """Pairs in which the scorer prefers the side that the source prefers."""
    num_ties: int
    """Pairs with a label of exactly one half; hard objectives drop them."""
    num_replaced: int
    """Shards whose labels were for an attempt that is no longer committed, and were made anew."""


def preference(win: float, lose: float, *, temperature: float) -> float:
    """P(win preferred) = sigmoid((win - lose) / temperature): Bradley and Terry's model with the scores as rewards.

    For two images it is the softmax of score / temperature: how PickScore defines its preference (Kirstain et al.
    2023, Eq. 1), and the smoothed label of SmPO.
    """
    return float(expit((win - lose) / temperature))


def default_temperature(scorer: Scorer) -> float:
    """The scorer's own `preference_temperature`, at which its scores mean probabilities; 1 if it has none."""
    return float(getattr(scorer, "preference_temperature", 1.0))


def relabel_cache(
    cache: Cache,
    source: PairSource,
    scorer: Scorer,
    *,
    set_name: str,
    temperature: float,
    pairs_per_batch: int = PAIRS_PER_BATCH,
    on_pairs: Callable[[int], None] = lambda num_pairs: None,
) -> RelabelReport:
    """Label every committed pair that has none in this set; this process's share, if there are several.

    Raises UsageError if the set was begun with another
    scorer or temperature, DataError if the source is not the one the cache was made from, CacheMismatch if it lacks a
    committed pair.
    """
    state = processes()
    _check_settings(cache, set_name, scorer.name, temperature)
    inputs = _inputs(cache, source_of(cache, source))
    num_replaced = 0
    state.wait_for_everyone()
    for shard in list(cache)[state.process_index :: state.num_processes]:
        existing = read_shard_labels(cache.store, set_name, shard.name)
        if existing is not None and existing.attempt == shard.commit.attempt:
            on_pairs(shard.num_pairs)
            continue
        wanted = [str(pair_id) for pair_id in shard.read("pair/id")]
        input_shard = _input_of(shard, inputs, source.location)
        labels: dict[str, PairLabel] = {}
        committed = _pairs_of(shard, input_shard)
        while pairs := list(islice(committed, pairs_per_batch)):
            labels.update(_label(pairs, scorer, temperature))
            on_pairs(len(pairs))
        missing = [pair_id for pair_id in wanted if pair_id not in labels]
        if missing:
            raise CacheMismatch(
                "The source lacks committed pairs.",
                where=source.location,
                expected=f"pair {missing[0]} in {shard.name}",
                got=f"{len(missing)} of {len(wanted)} pairs are not there",
                fix="pass the source the cache was made from",
            )
        if existing is not None:
            cache.store.remove(f"labels/{set_name}/{shard.name}.json")
            num_replaced += 1
        made = LabelSet(
            attempt=shard.commit.attempt,
            scorer=scorer.name,
            temperature=temperature,
            source=source.place,
            pairs={pair_id: labels[pair_id] for pair_id in wanted},
        )
        write_labels(cache.store, set_name, shard.name, made)
    state.wait_for_everyone()
    return report(cache, set_name, num_replaced)


def source_of(cache: Cache, source: PairSource) -> PairSource:
    """What a cache was made from: the source, or of it what belongs to the cache's bucket, as it was sorted.
    Raises DataError if the source cannot be read, CacheSchemaError for a damaged list of buckets.
    """
    folder, _, name = cache.store.address.rstrip("/").rpartition("/")
    buckets = read_buckets(folder or "/") if re.fullmatch(r"\d+x\d+", name) else None
    if buckets is None or name not in buckets:
        return source
    sizes = [(int(height), int(width)) for height, width in (each.split("x") for each in buckets)]
    wanted = {commit.source.input_shard for commit in cache.commits.values()}
    shards = [each for each in source.shards if not wanted.isdisjoint(possible_names(source.files[each.name]))]
    found, failures = sort_pairs(source, shards, sizes, get=CacheStore(folder or "/").get)
    if failures:
        raise failures[0]
    return found.get(cache.manifest.resolution, source)


def _inputs(cache: Cache, source: PairSource) -> dict[str, InputShard]:
    """The input shards by the names that the cache has for them. Raises DataError where one's cannot be told."""
    sources = {commit.source.input_shard: commit.source for commit in cache.commits.values()}
    names, unclear = known_names(
        source, sources, lambda asked: {name: (sources[name].location, sources[name].fingerprint) for name in asked}
    )
    for error in unclear.values():
        raise error
    shards = [renamed(each, names.get(each.name, each.name)) for each in source.shards]
    return {each.name: each for each in shards}


def _label(pairs: Sequence[Pair], scorer: Scorer, temperature: float) -> dict[str, PairLabel]:
    images, names = [], []
    for pair in pairs:
        for side, data in (("win", pair.win), ("lose", pair.lose)):
            name = f"pair {pair.pair_id}, {side}"
            try:
                images.append(decode_image(data))
            except ImageError as error:
                raise DataError(
                    "An image of a committed pair cannot be read.",
                    where=name,
                    expected="the image that was inverted",
                    got=str(error),
                    fix="restore it in the source; shards labelled so far stay labelled",
                ) from error
            names.append(name)
    scores = checked_scores(scorer, images, [pair.prompt for pair in pairs for _ in range(2)], names)
    return {
        pair.pair_id: PairLabel(scores=(win, lose), label=preference(win, lose, temperature=temperature))
        for pair, win, lose in zip(pairs, scores[0::2], scores[1::2], strict=True)
    }


def _pairs_of(shard: Shard, input_shard: InputShard) -> Iterator[Pair]:
    """The committed pairs among the shard's rows; as in the cache, the first row with an id counts. Raises DataError
    for one whose images are not those of the cache, or stand on other sides.
    """
    ids = shard.read("image/id")
    sides = zip(ids[shard.read("pair/win")], ids[shard.read("pair/lose")], strict=True)
    wanted = dict(zip(map(str, shard.read("pair/id")), sides, strict=True))
    for item in input_shard.rows(*shard.commit.source.rows):
        if not isinstance(item, Pair) or (committed := wanted.pop(item.pair_id, None)) is None:
            continue
        for side, data, digest in zip(("win", "lose"), (item.win, item.lose), committed, strict=True):
            if image_digest(data) != digest:
                raise DataError(
                    "An image of a committed pair is not the one that was inverted.",
                    where=f"pair {item.pair_id}, {side}",
                    expected=f"a file with digest {digest}",
                    got=image_digest(data),
                    fix="restore it in the source; shards labelled so far stay labelled",
                )
        yield item


def _input_of(shard: Shard, inputs: dict[str, InputShard], location: str) -> InputShard:
    source = shard.commit.source
    found = inputs.get(source.input_shard)
    if found is None:
        raise DataError(
            "The source lacks a file that the cache was made from.",
            where=location,
            expected=f"{source.input_shard} (for shard {shard.name})",
            got=", ".join(sorted(inputs)[:5]),
            fix=f"the cache was made from {source.location}; pass that source",
        )
    fingerprint = found.fingerprint()
    if fingerprint != source.fingerprint:
        raise DataError(
            "A file of the source is not what the cache was made from.",
            where=f"{location}, {source.input_shard}",
            expected=f"fingerprint {source.fingerprint}",
            got=fingerprint,
            fix=f"the cache was made from {source.location}; pass that source, unchanged",
        )
    return found


def _check_settings(cache: Cache, set_name: str, scorer: str, temperature: float) -> None:
    if set_name not in label_sets(cache.store):
        return
    for shard in cache:
        labels = read_shard_labels(cache.store, set_name, shard.name)
        if labels is not None and (labels.scorer, labels.temperature) != (scorer, temperature):
            raise UsageError(
                f"Label set {set_name!r} was made with other settings.",
                where=cache.location,
                expected=f"scorer {labels.scorer}, temperature {labels.temperature:g} (in the set)",
                got=f"scorer {scorer}, temperature {temperature:g} (this run)",
                fix="pass another --set name, or repeat the set's settings; for --combine, which labels by each scorer "
                f"at its own temperature, give {cache.store.path(f'labels/{set_name}')} another name, or remove it",
            )


def report(cache: Cache, set_name: str, num_replaced: int) -> RelabelReport:
    """A set as it stands."""
    num_shards = num_pairs = num_agreeing = num_ties = 0
    for shard in cache:
        labels = read_shard_labels(cache.store, set_name, shard.name)
        if labels is not None:
            num_shards += 1
            num_pairs += len(labels.pairs)
            num_agreeing += sum(pair.label > 0.5 for pair in labels.pairs.values())
            num_ties += sum(pair.label == 0.5 for pair in labels.pairs.values())
    return RelabelReport(
        num_shards=num_shards,
        num_pairs=num_pairs,
        num_agreeing=num_agreeing,
        num_ties=num_ties,
        num_replaced=num_replaced,
    )
