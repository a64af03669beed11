"""The names that a cache has for input shards: what a source calls a file hangs on which other files lie beside it."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from pathlib import PurePosixPath
from typing import Any, cast

from inpo.common.errors import DataError, InpoError
from inpo.common.pairs.buckets import BucketShard
from inpo.common.pairs.files import possible_names
from inpo.common.pairs.pair import InputShard, PairSource, place_of

MadeFrom = Callable[[Collection[str]], Mapping[str, tuple[str, str]]]
"""(place of the source, fingerprint) of what a cache's input shards of these names were made from."""


def known_names(
    source: PairSource, known: Collection[str], made_from: MadeFrom
) -> tuple[dict[str, str], dict[str, DataError]]:
    """({input shard: the name that a cache has for it}, {input shard: why that cannot be told}), where the cache may
    have another than the source: files of one name have come beside it, or have gone.

    A name that tells more than the source's own (0000 of folder a) is known by the source's place, and any by the place
    of the file or its folder; else the content decides. Where the place is the same and no file has that content, one
    may have changed: to take it for new would bring its pairs twice.

    Args:
        known: the names of the cache's input shards.
        made_from: asked once, and only for names that are in question.
    """
    possible = {name: possible_names(file) for name, file in source.files.items()}
    unsettled = {
        shard.name: shard
        for shard in source.shards
        if any(each in known and each != shard.name for each in possible.get(shard.name, ()))
    }
    origins = made_from({each for name in unsettled for each in possible[name] if each in known}) if unsettled else {}
    names: dict[str, str] = {}
    unclear: dict[str, DataError] = {}
    own = {shard.name for shard in source.shards}
    for level in reversed(range(3)):  # the most telling first
        claims: dict[str, list[str]] = {}
        for name in unsettled:
            if name not in names:
                claims.setdefault(possible[name][level], []).append(name)
        for each in sorted(claims.keys() & origins.keys() - {*names.values()}):
            files = claims[each]
            if each in own and each not in files:
                continue
            place, fingerprint = origins[each]
            here = [name for name in files if place in _places(source.files[name])]
            if place == source.place and possible[files[0]].index(files[0]) <= level:
                here = files
            owner = here[0] if len(here) == 1 else _with_content(fingerprint, [unsettled[name] for name in files])
            if owner is not None:
                names[owner] = each
            elif place == source.place:
                unclear |= {name: _unclear(name, each, source) for name in files}
    return names, {name: error for name, error in unclear.items() if name not in names}


def renamed(shard: InputShard, name: str) -> InputShard:
    """The same input shard under another name, with what has been read of it."""
    if isinstance(shard, BucketShard):
        return replace(shard, base=renamed(shard.base, name))
    made = replace(cast(Any, shard), name=name)
    vars(made).update({key: value for key, value in vars(shard).items() if key != "name"})
    return cast(InputShard, made)


def _places(file: str) -> tuple[str, str]:
    """As a source's, of a file and of its folder."""
    return place_of(file), place_of(file.rpartition("/")[0] or "/" * file.startswith("/") or ".")


def _with_content(fingerprint: str, shards: Collection[InputShard]) -> str | None:
    for shard in shards:
        try:
            if shard.fingerprint() == fingerprint:
                return shard.name
        except InpoError:  # whoever reads it reports it
            continue
    return None


def _unclear(name: str, known: str, source: PairSource) -> DataError:
    return DataError(
        "Whether this file is in the cache already cannot be told, so that it is left out.",
        where=f"{source.place}: {name}",
        expected=f"among the files of this name the one that the cache's input shard {known} was made from",
        got=f"other rows in {PurePosixPath(source.files[name]).name}",
        fix="if it is that file, changed since, put it back as it was, or move the commits of that input shard away; "
        "if it is a new one, give it a name that no other file has",
    )
