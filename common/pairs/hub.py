"""Data sets of the Hugging Face hub, named owner/name[:config][@revision][/split].

    name --hub_files--> hf:// locations of the files, at the commit that the revision is now

The files are read where they are, by ranges, through huggingface_hub's file system.
"""

import re
from difflib import get_close_matches
from pathlib import PurePosixPath
from typing import NamedTuple

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import OfflineModeIsEnabled, RepositoryNotFoundError, RevisionNotFoundError

from inpo.common.errors import DataError
from inpo.common.pairs.columns import brief
from inpo.common.pairs.files import one_line

_WORD = r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}"
_NAME = re.compile(
    rf"(?P<repository>{_WORD}/{_WORD})(?::(?P<config>{_WORD}))?"
    rf"(?:@(?P<revision>(?:refs/(?:convert|pr)/)?{_WORD}))?(?:/(?P<split>{_WORD}))?"
)
_SUFFIXES = (".parquet", ".tar", ".jsonl", ".json", ".csv", ".tsv")
"""Files that may hold pairs; of several kinds the first one here is taken."""
_NO_PAIRS = ("dataset_infos.json", "dataset_info.json", "state.json")
_PIECE = re.compile(r"(.+?)-\d{5}-of-\d{5}")


class HubName(NamedTuple):
    """A data set, and what of it."""

    repository: str
    config: str | None
    revision: str | None
    split: str | None


def parse_hub_name(location: str) -> HubName | None:
    """What a location names on the hub; None for what cannot be such a name, as a file's cannot."""
    found = _NAME.fullmatch(location)
    if found is None or PurePosixPath(location.partition("@")[0]).suffix.lower() in (*_SUFFIXES, ".gz", ".zip"):
        return None
    return HubName(**found.groupdict())


def hub_files(location: str, name: HubName) -> list[str]:
    """The files of a data set's split. Raises DataError: offline, not there, or several of which one must be named."""
    try:
        if constants.HF_HUB_OFFLINE:
            raise OfflineModeIsEnabled("HF_HUB_OFFLINE is set")
        info = HfApi().dataset_info(name.repository, revision=name.revision)
    except RevisionNotFoundError as error:
        raise _no_set(location, f"no revision {name.revision} of {name.repository}", "check the revision") from error
    except RepositoryNotFoundError as error:
        fix = "check the name; for a private or gated data set log in with `hf auth login`, or set HF_TOKEN"
        raise _no_set(location, "no data set of that name, here or on the hub", fix) from error
    except OfflineModeIsEnabled as error:
        raise _no_set(
            location, f"nothing of that name here, and the hub is not asked: {error}", _offline(name)
        ) from None
    except Exception as error:  # the client passes on what its own libraries raise
        got = f"nothing of that name here, and the hub does not answer: {one_line(error)[:200]}"
        raise _no_set(location, got, _offline(name)) from error
    files = [sibling.rfilename for sibling in info.siblings or ()]
    kept = _choose(location, name, [file for file in files if PurePosixPath(file).name not in _NO_PAIRS])
    return [f"hf://datasets/{name.repository}@{info.sha}/{file}" for file in kept]


def _choose(location: str, name: HubName, files: list[str]) -> list[str]:
    if name.config is not None:
        files = _named(location, "config", name.config, {file: _config_of(file) for file in files})
    kinds = [[file for file in files if PurePosixPath(file).suffix.lower() == suffix] for suffix in _SUFFIXES]
    files = next((each for each in kinds if each), [])
    if not files:
        raise _no_set(
            location,
            "no file that could hold pairs",
            f"see what is there: https://huggingface.co/datasets/{name.repository}/tree/{name.revision or 'main'}",
        )
    if name.config is None:
        _refuse_several(location, "config", {_config_of(file) for file in files}, f"{name.repository}:CONFIG")
    splits = {file: _split_of(file) for file in files}
    if name.split is not None:
        return _named(location, "split", name.split, splits)
    _refuse_several(location, "split", set(splits.values()), f"{location}/SPLIT")
    return files


def _config_of(file: str) -> str:
    """The folder that tells configurations apart: the first one that is not `data` and no split."""
    folders = [part for part in PurePosixPath(file).parts[:-1] if part != "data"]
    return folders[0] if folders else ""


def _split_of(file: str) -> str:
    path = PurePosixPath(file)
    piece = _PIECE.match(path.name)
    if piece:
        return piece[1]
    # Exported sets have SPLIT/0000.parquet.
    return path.parts[-2] if path.stem.isdecimal() and len(path.parts) > 1 else path.stem


def _named(location: str, what: str, wanted: str, of: dict[str, str]) -> list[str]:
    """The files of the wanted config or split."""
    found = [file for file, each in of.items() if each == wanted]
    if not found:
        there = sorted({each for each in of.values() if each})
        close = get_close_matches(wanted, there, n=1)
        raise _no_set(
            location,
            f"no {what} {wanted}; there are: {', '.join(map(brief, there[:20])) or 'none'}",
            f"is {close[0]} meant?" if close else f"name one of them, or leave the {what} out",
        )
    return found


def _refuse_several(location: str, what: str, found: set[str], how: str) -> None:
    if len(found) > 1:
        names = ", ".join(brief(each or "(none)") for each in sorted(found)[:20])
        raise _no_set(location, f"more than one {what}: {names}", f"name one: {how}")


def _offline(name: HubName) -> str:
    return (
        "check the network, HF_HUB_OFFLINE and HF_ENDPOINT; or download it where there is a network, `hf download "
        f"{name.repository} --repo-type dataset --local-dir DIR`, and pass the folder"
    )


def _no_set(location: str, got: str, fix: str) -> DataError:
    return DataError(
        "No pairs found.",
        where=location,
        expected="a local path, a URL, or a data set of the hub: owner/name[:config][@revision][/split]",
        got=got,
        fix=fix,
    )
