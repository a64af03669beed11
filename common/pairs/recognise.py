"""What kind of source a location is."""

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import PurePosixPath

from inpo.common.choices import PairsFrom
from inpo.common.errors import DataError
from inpo.common.pairs.archives import may_be_archive
from inpo.common.pairs.columns import Reading, brief, column_map
from inpo.common.pairs.entries import LIST_SUFFIXES
from inpo.common.pairs.files import Listing, broken_link, exists, expand_pattern, is_folder, list_folder, shard_names
from inpo.common.pairs.folder import ListShard
from inpo.common.pairs.pair import InputShard, PairSource

EXPECTED = (
    "webdataset tars (*.tar: a file, a folder, a pattern such as pairs-{0000..0003}.tar), "
    "parquet files (*.parquet), a folder with pairs.jsonl, pairs.json, pairs.csv or pairs.tsv, "
    "or a data set of the hub (owner/name[:config][@revision][/split])"
)
LIST_NAMES = tuple(f"pairs{suffix}" for suffix in LIST_SUFFIXES)
DATA_FOLDER = "data"
"""Where the repositories of dataset hubs keep their files."""
SKIPPED_NAME = "skipped.jsonl"
"""What `inpo data pack` writes beside its tars: the rows that gave no pair."""
_PIECE = re.compile(r"(.+?)-\d{5}-of-\d{5}")
_SPLIT = re.compile(r"(?:.*[-_.])?(train|validation|valid|val|dev|test)", re.IGNORECASE)


def open_source(
    location: str,
    *,
    columns: Mapping[str, str] | str | None = None,
    pairs_from: PairsFrom = "all",
    allow_remote: bool = False,
    with_noise: bool = False,
) -> PairSource:
    """The pair source at a local path, fsspec URL, brace pattern or glob. Nothing but names is read yet.

    Args:
        columns: {what it is: the name of its column} where the names are not the known ones (columns.py).
        pairs_from: what of a ranking is compared.
        allow_remote: rows that name their images may name what lies below the file's folder; with this anything else.
        with_noise: read the noise that images were made from, where rows have it.

    Raises UsageError for columns that are none, DataError when nothing recognisable is there, when it cannot be
    reached, or when it is not clear which of several things is meant.
    """
    reading = Reading(
        columns=column_map(columns), pairs_from=pairs_from, allow_remote=allow_remote, with_noise=with_noise
    )
    files = expand_pattern(location)
    if not files:
        raise _nothing_there(location, [])
    if len(files) > 1:
        return _from_files(location, files, reading)
    if not exists(files[0]):
        from inpo.common.pairs.hub import hub_files, parse_hub_name  # a client that most sources do without

        name = parse_hub_name(location)
        if name is None:
            raise _nothing_there(location, files)
        return _from_files(location, hub_files(location, name), reading)
    folder = is_folder(files[0])
    if _kind(files[0]) is not None and not folder:
        return _from_files(location, files, reading)
    if not folder:
        raise _not_recognised(location, f"a file named {PurePosixPath(files[0]).name}")
    return _from_folder(location, reading)


def _from_folder(location: str, reading: Reading, *, around: Counter[str] | None = None) -> PairSource:
    """`around`: what lies beside this folder, where it is a repository's data."""
    listing = list_folder(location)
    names = [PurePosixPath(file).name for file in listing.files]
    lists = [file for file, name in zip(listing.files, names, strict=True) if name in LIST_NAMES]
    tars = [file for file in listing.files if _kind(file) == "tar"]
    parquets = [file for file in listing.files if _kind(file) == "parquet"]
    found = [group for group in (lists, tars, parquets) if group]
    if len(found) > 1 or len(lists) > 1:
        raise DataError(
            "This folder holds more than one source of pairs.",
            where=location,
            got=", ".join(PurePosixPath(group[0]).name for group in found)
            if len(found) > 1
            else " and ".join(PurePosixPath(file).name for file in lists),
            fix="name the one you mean, for example the file itself or a pattern such as train-*.parquet",
        )
    if found:
        not_read = (around or Counter()) + _beside(listing, found[0])
        return _from_files(location, found[0], reading, not_read=dict(sorted(not_read.items())))
    folders = {PurePosixPath(folder).name: folder for folder in listing.folders}
    if DATA_FOLDER in folders and around is None:
        return _from_folder(folders[DATA_FOLDER], reading, around=_beside(listing, [folders[DATA_FOLDER]]))
    got = ", ".join(map(brief, names[:8])) or "no files directly in it"
    if folders:
        got += f"; folders in it: {', '.join(map(brief, list(folders)[:8]))}"
    if listing.others:
        got += f"; pipes, sockets or devices: {', '.join(map(brief, listing.others[:8]))}"
    within = [name for name, folder in list(folders.items())[:8] if _holds_pairs(folder)]
    raise _not_recognised(location, f"a folder with {got}", within=within)


def _holds_pairs(folder: str) -> bool:
    with suppress(DataError):  # of another owner, as lost+found: what was asked for is the one above
        files = list_folder(folder).files
        return any(_kind(file) != "list" or PurePosixPath(file).name in LIST_NAMES for file in filter(_kind, files))
    return False


def _beside(listing: Listing, taken: list[str]) -> Counter[str]:
    """What a folder holds beside what is taken of it. A list names the images and folders that belong to it."""
    not_read: Counter[str] = Counter()
    kind = _kind(taken[0])
    with_list = kind == "list"
    images = _image_suffixes() if with_list else frozenset()
    for file in set(listing.files) - set(taken):
        suffix = PurePosixPath(file).suffix.lower()
        of_list = with_list and (suffix in images or may_be_archive(file))
        of_pack = kind == "tar" and PurePosixPath(file).name == SKIPPED_NAME
        if not (of_list or of_pack):
            not_read[f"file *{brief(suffix)}" if suffix else "file without a suffix"] += 1
    not_read["hidden file or folder"] += listing.hidden
    not_read["pipe, socket or device"] += len(listing.others)
    for folder in set() if with_list else set(listing.folders) - set(taken):
        not_read[f"folder {brief(PurePosixPath(folder).name)}"] += 1
    return +not_read


def _image_suffixes() -> frozenset[str]:
    """Of the formats that images are read in."""
    from PIL import Image  # which many a source needs later, or in other processes

    from inpo.common.pairs.images import FORMATS

    return frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in FORMATS)


def _from_files(
    location: str, files: list[str], reading: Reading, *, not_read: dict[str, int] | None = None
) -> PairSource:
    kinds = {_kind(file) for file in files}
    if len(kinds) > 1 or None in kinds:
        raise _not_recognised(location, ", ".join(PurePosixPath(file).name for file in files[:8]))
    if not any(exists(file) for file in files):
        raise _nothing_there(location, files)
    kind = kinds.pop()
    if kind == "list":
        if len(files) > 1:
            raise _not_recognised(location, f"{len(files)} lists of pairs; one is read at a time")
    else:
        _refuse_mixed_splits(location, files)
    named_files = dict(sorted(zip(shard_names(files), files, strict=True)))
    shards = [_shard_type(kind)(name=name, file=file, reading=reading) for name, file in named_files.items()]
    named = {"tar": "webdataset", "list": "folder"}.get(str(kind), "parquet")
    return PairSource(location=location, shards=tuple(shards), kind=named, not_read=not_read or {}, files=named_files)


def _shard_type(kind: str | None) -> Callable[..., InputShard]:
    # Imported here because webdataset imports torch, which processes that only decode images do without.
    if kind == "tar":
        from inpo.common.pairs.tars import TarShard

        return TarShard
    if kind == "parquet":
        from inpo.common.pairs.parquet import ParquetShard

        return ParquetShard
    return ListShard


def _refuse_mixed_splits(location: str, files: list[str]) -> None:
    """Published datasets keep train, validation and test in one folder, as <split>-00000-of-00645 or by these words:
    never mix them.
    """
    pieces, words = Counter[str](), Counter[str]()
    for file in files:
        piece, word = _PIECE.match(PurePosixPath(file).name), _SPLIT.fullmatch(PurePosixPath(file).stem)
        pieces[piece[1] if piece else ""] += 1
        words[word[1].lower() if word else ""] += 1
    splits = pieces if any(pieces) else Counter({word: count for word, count in words.items() if word})
    if len(splits) > 1:
        raise DataError(
            "These files belong to more than one split.",
            where=location,
            expected="one split",
            got=", ".join(f"{name or 'no split'} ({count} files)" for name, count in sorted(splits.items())),
            fix="name one of them, or a pattern such as FOLDER/train-*.parquet",
        )


def _kind(location: str) -> str | None:
    suffix = PurePosixPath(location).suffix.lower()
    return {".tar": "tar", ".parquet": "parquet", **dict.fromkeys(LIST_SUFFIXES, "list")}.get(suffix)


def _nothing_there(location: str, files: list[str]) -> DataError:
    target = broken_link(files[0]) if files else None
    if not files:
        got = "no file matches the pattern"
    elif target is not None:
        got = f"{files[0]}, a symbolic link to {target}, which is not there"
    else:
        got = "nothing of that name" if len(files) == 1 else f"none of {len(files)} names is there, from {files[0]}"
    return DataError("No pairs found.", where=location, expected=EXPECTED, got=got, fix="check the path or URL")


def _not_recognised(location: str, got: str, *, within: Sequence[str] = ()) -> DataError:
    """`within`: folders in it that hold files of such a kind."""
    compressed = re.search(r"\.(tgz|(tar|jsonl?|[ct]sv)\.\w+)\b", got)
    fix = "uncompress it first: rows are read by seeking" if compressed else "see docs/data.md for the three kinds"
    if within:
        fix = "name a folder in it: " + " or ".join(f"{location.rstrip('/')}/{brief(name)}" for name in within)
    return DataError("This is no source of pairs.", where=location, expected=EXPECTED, got=got, fix=fix)
