"""Every text file that a user writes is decoded alike: recipes, lists of ids, prompts."""

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from inpo.common.errors import InpoError
from inpo.common.recipe import read_recipe
from inpo.common.text import read_text
from inpo.evaluation.prompts import read_prompts
from inpo.train.index import _read_list

TEXTS: dict[str, tuple[str, Callable[[Path], object], object]] = {
    "recipe.toml": ('[data]\npairs = "naïve"\n', lambda path: dict(read_recipe(path)), {"data": {"pairs": "naïve"}}),
    "ids.txt": ("naïve\n猫 1\n", lambda path: _read_list(path, "--except"), frozenset({"naïve", "猫 1"})),
    "prompts.txt": ("naïve\n猫\n", lambda path: read_prompts(str(path)), ["naïve", "猫"]),
    "prompts.tsv": ("Prompt\tNote\nnaïve\tx\n", lambda path: read_prompts(str(path)), ["naïve"]),
    "prompts.json": ('["naïve"]', lambda path: read_prompts(str(path)), ["naïve"]),
}


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_utf8_with_or_without_its_mark(tmp_path: Path, name: str, mark: str, end: str) -> None:
    text, read, expected = TEXTS[name]
    (tmp_path / name).write_bytes((mark + text.replace("\n", end)).encode())
    assert read(tmp_path / name) == expected


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be", "utf-32"])
def test_utf16_is_named(tmp_path: Path, name: str, encoding: str) -> None:
    text, read, _ = TEXTS[name]
    (tmp_path / name).write_bytes(text.replace("猫", "cat").encode(encoding))
    with pytest.raises(InpoError, match="UTF-16") as caught:
        read(tmp_path / name)
    assert name in str(caught.value)
    assert "save the file as UTF-8" in str(caught.value)


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_other_bytes_are_named_with_their_place(tmp_path: Path, name: str, mark: bytes) -> None:
    text, read, _ = TEXTS[name]
    data = mark + text.replace("猫", "cat").encode("latin-1")
    (tmp_path / name).write_bytes(data)
    at = data.index(b"\xef", len(mark))
    line = data[:at].count(b"\n") + 1
    with pytest.raises(InpoError, match=f"0xef at position {at}, line {line}, is not UTF-8: Latin-1"):
        read(tmp_path / name)


def test_signs_that_end_no_line(tmp_path: Path) -> None:
    (tmp_path / "ids.txt").write_text("a\u2028b\rc\x0bd\n", encoding="utf-8", newline="")
    assert _read_list(tmp_path / "ids.txt", "--except") == {"a\u2028b", "c\x0bd"}
    (tmp_path / "prompts.txt").write_text("a\u2028b\rc\x85d\n", encoding="utf-8", newline="")
    assert read_prompts(str(tmp_path / "prompts.txt")) == ["a\u2028b", "c\x85d"]


@pytest.mark.parametrize(("problem", "advice"), [(FileNotFoundError, "correct the path"), (PermissionError, "owner")])
def test_what_to_do_follows_from_what_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, problem: type[OSError], advice: str
) -> None:
    code = {FileNotFoundError: errno.ENOENT, PermissionError: errno.EACCES}[problem]

    def refuse(path: Path) -> bytes:
        raise OSError(code, os.strerror(code), str(path))

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(InpoError, match=advice):
        read_text(tmp_path / "list", what="It cannot be read.", error=InpoError)
