"""Prompts to evaluate on: a text file, the Parti-Prompts TSV, HPDv2's JSON, or a dataset on the hub."""

import csv
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from inpo.common.errors import DataError
from inpo.common.text import read_text, text_lines

EXPECTED = (
    "a text file (one prompt a line), a .tsv file with a Prompt column (Parti-Prompts), a .json list of prompts "
    "(HPDv2), or a hub dataset as OWNER/NAME[:SPLIT[:COLUMN]]"
)
_COLUMNS = ("prompt", "Prompt", "caption", "text")


def read_prompts(location: str) -> list[str]:
    """The distinct prompts behind `location`, in order of their first appearance, stripped of surrounding blanks.

    Raises DataError, naming the line or entry, for anything that holds no prompts.
    """
    path, kind = Path(location), _kind(Path(location))
    if kind == "a file":
        reader = _READERS.get(path.suffix.lower(), _read_lines)
        if path.suffix.lower() in _NOT_LINES:
            raise DataError(
                "Prompts are not read from this kind of file.",
                where=path,
                expected=EXPECTED,
                got=path.suffix,
                fix="its lines are no prompts: save them in one of these forms",
            )
        found = reader(path)
    elif kind != "nothing" or not _may_be_on_the_hub(location):
        raise DataError(
            "There are no prompts here.",
            where=location[:200],
            expected=EXPECTED,
            got=kind,
            fix="check --prompts; a folder here hides hub datasets whose owner is called like it",
        )
    else:
        found = _read_hub(location)
    for prompt in found:
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            raise DataError(
                "A prompt holds half a character, which has no bytes.",
                where=location,
                expected="text that UTF-8 has",
                got=ascii(prompt)[:200],
                fix="correct or remove it",
            ) from error
    prompts = list(dict.fromkeys(prompt.strip() for prompt in found if prompt.strip()))
    if not prompts:
        raise DataError(
            "No prompt found.",
            where=location,
            expected=EXPECTED,
            got="nothing, or only blank entries",
            fix="check --prompts",
        )
    return prompts


def _kind(path: Path) -> str:
    """What lies there."""
    try:
        return "a file" if path.is_file() else "a folder" if path.is_dir() else "nothing"
    except OSError as error:  # longer than a name may be
        return f"{error.strerror}"


def _may_be_on_the_hub(location: str) -> bool:
    """Whether it can be a hub dataset's name, and no file's that is not there."""
    name = location.split(":")[0]
    suffixes = {*_NOT_LINES, *_READERS, ".txt"}
    is_local = location.startswith(("/", ".", "~")) or Path(name).suffix.lower() in suffixes
    return name.count("/") == 1 and not is_local and not Path(name).parent.is_dir()


def _read_lines(path: Path) -> list[str]:
    return text_lines(_text(path))


def _text(path: Path) -> str:
    return read_text(path, what="The prompts cannot be read.", error=DataError, fix="check --prompts")


def _read_tsv(path: Path) -> list[str]:
    # Parti-Prompts writes quotation marks as they are, so they quote nothing.
    rows = csv.DictReader(text_lines(_text(path)), delimiter="\t", quoting=csv.QUOTE_NONE)
    found = []
    try:
        column = _column(rows.fieldnames or (), path)
        for row in rows:
            if row[column] is None:
                raise DataError(
                    "A row has too few columns.",
                    where=f"{path}, line {rows.line_num}",
                    expected=f"{len(rows.fieldnames or ())}, with {column}",
                    got=sum(v is not None for v in row.values()),
                    fix="correct that line; columns are separated by tabs",
                )
            found.append(row[column])
    except csv.Error as error:  # a field may have 131,072 characters
        raise DataError(
            "The prompts are no table.",
            where=f"{path}, line {rows.line_num + 1}",
            expected="columns separated by tabs, each field of 131,072 characters at most",
            got=str(error),
            fix="correct that line",
        ) from None
    return found


def _read_json(path: Path) -> list[str]:
    try:
        document = json.loads(_text(path))
    except (ValueError, RecursionError) as error:
        raise DataError(
            "The prompts are not valid JSON.", where=path, expected="a list", got=str(error), fix="correct the file"
        ) from None
    if not isinstance(document, list):
        raise DataError(
            "The JSON file is no list.",
            where=path,
            expected='["a prompt", ...] or [{"prompt": "..."}, ...]',
            got=type(document).__name__,
            fix="put the prompts into a list",
        )
    return [_json_entry(entry, f"{path}, entry {number}") for number, entry in enumerate(document)]


def _json_entry(entry: Any, where: str) -> str:
    prompt = entry.get("prompt") if isinstance(entry, dict) else entry
    if not isinstance(prompt, str):
        raise DataError(
            "No prompt in this entry.",
            where=where,
            expected="text, or an object with prompt",
            got=str(entry)[:200],
            fix="correct or remove the entry",
        )
    return prompt


def _read_hub(location: str) -> list[str]:
    name, split, column = (*location.split(":"), None, None)[:3]
    try:
        import datasets
    except ImportError:
        raise DataError(
            "Reading prompts from the hub needs the datasets package.",
            where=location,
            fix="pip install datasets, or give a file: " + EXPECTED.split(", or a hub")[0],
        ) from None
    try:
        splits = datasets.get_dataset_split_names(name)
        if split is None and len(splits) == 1:
            split = splits[0]
        table = datasets.load_dataset(name, split=split) if split in splits else None
    except Exception as error:  # the hub client raises many kinds; each means the data set could not be fetched
        got = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise DataError(
            "The prompts could not be fetched from the hub.",
            where=location,
            got=got,
            fix="check the name and the network",
        ) from error
    if table is None:
        raise DataError(
            "Which split?",
            where=location,
            expected=", ".join(splits),
            got=split or "none",
            fix=f"for example {name}:{splits[0]}",
        )
    chosen = column if column in table.column_names else None
    if column is None:
        chosen = _column(table.column_names, location)
    if chosen is None:
        raise DataError(
            "No such column.", where=location, expected=", ".join(table.column_names), got=column, fix="choose one"
        )
    return [str(value) for value in table[chosen] if value is not None]


def _column(names: Iterable[str], where: object) -> str:
    names = list(names)
    for name in _COLUMNS:
        if name in names:
            return name
    raise DataError(
        "No column of prompts.",
        where=where,
        expected=" or ".join(_COLUMNS),
        got=", ".join(names) or "none",
        fix="name the column so; for a hub dataset give it as OWNER/NAME:SPLIT:COLUMN",
    )


_NOT_LINES = (".csv", ".jsonl", ".ndjson", ".parquet", ".arrow", ".yaml", ".yml", ".toml", ".xml", ".html")
"""Files with a structure that a reader of lines would take for prompts."""
_READERS: dict[str, Callable[[Path], list[str]]] = {".tsv": _read_tsv, ".json": _read_json}
