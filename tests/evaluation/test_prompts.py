"""Prompts from every kind of file."""

import json
import os
import sys
from pathlib import Path

import pytest

from inpo.common.errors import DataError
from inpo.evaluation.prompts import read_prompts

REAL_PARTI = Path(os.environ.get("INPO_PUBLISHED", "published")) / "PartiPrompts.tsv"


def write(folder: Path, name: str, text: str, encoding: str = "utf-8") -> str:
    (folder / name).write_text(text, encoding=encoding, newline="")
    return str(folder / name)


def test_a_text_file_has_one_prompt_a_line(tmp_path: Path) -> None:
    text = "a cat\r\n\r\n  a dog  \na cat\nsea\u2028side\n"
    assert read_prompts(write(tmp_path, "p.txt", text, "utf-8-sig")) == ["a cat", "a dog", "sea\u2028side"]


def test_parti_prompts_are_read_by_column_with_their_quotation_marks(tmp_path: Path) -> None:
    rows = [
        "Prompt\tCategory\tChallenge\tNote",
        'a sign that says "Hi"\tWorld\tBasic\t',
        '"G L E" in paint\tArts\tWriting\t"a note',
    ]
    got = read_prompts(write(tmp_path, "PartiPrompts.tsv", "\n".join(rows) + "\n"))
    assert got == ['a sign that says "Hi"', '"G L E" in paint']


@pytest.mark.parametrize("entries", [["a", "b"], [{"prompt": "a", "rank": [1]}, {"prompt": "b"}]])
def test_hpd_json_is_a_list_of_texts_or_objects(tmp_path: Path, entries: list[object]) -> None:
    assert read_prompts(write(tmp_path, "anime.json", json.dumps(entries))) == ["a", "b"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("p.txt", "\n \n", "No prompt found"),
        ("p.tsv", "Name\tNote\nx\ty\n", "No column of prompts"),
        ("p.json", '{"prompt": "a"}', "no list"),
        ("p.json", '["a", 3]', "entry 1"),
        ("p.json", '["a"', "not valid JSON"),
        ("p.json", '["a", "\\ud800 b"]', "half a character"),
        ("p.tsv", "Note\tPrompt\nx\ta cat\ny\n", "too few columns(.|\n)*line 3"),
        pytest.param("p.tsv", "Prompt\na cat\n" + "a" * 131_073, "no table(.|\n)*line 3", id="a long field"),
        ("p.csv", "prompt,note\na cat,x\n", "not read from this kind of file"),
        ("p.jsonl", '{"prompt": "a cat"}\n', "not read from this kind of file"),
        ("p.txt", "", "No prompt found"),
    ],
)
def test_what_is_wrong_is_said(tmp_path: Path, name: str, text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_prompts(write(tmp_path, name, text))


def test_prompts_of_any_script_are_read_once(tmp_path: Path) -> None:
    text = "海の上の赤い猫\nقطة حمراء\n\tтёмный лес \n🐱 émoji\n海の上の赤い猫\n"
    assert read_prompts(write(tmp_path, "p.txt", text)) == ["海の上の赤い猫", "قطة حمراء", "тёмный лес", "🐱 émoji"]


@pytest.mark.skipif(not REAL_PARTI.is_file(), reason=f"the published file is not at {REAL_PARTI}")
def test_the_published_parti_prompts_are_read_whole() -> None:
    prompts = read_prompts(str(REAL_PARTI))
    # By hand, with nothing of csv: the first column of every line but the head's.
    columns = [line.split("\t")[0].strip() for line in REAL_PARTI.read_text(encoding="utf-8").split("\n")[1:] if line]
    assert len(columns) == 1632
    assert prompts == list(dict.fromkeys(columns))
    assert "bond" in prompts


def test_a_file_of_another_encoding_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="UTF-8"):
        read_prompts(write(tmp_path, "p.txt", "grün", "latin-1"))


@pytest.mark.parametrize(
    "location",
    ["/no/such/file.txt", "prompts.txt", "./a/b", "data/promts.txt", "tests/promts", "a red cat/" * 40 + "x"],
)
def test_a_missing_file_is_no_hub_name(location: str) -> None:
    with pytest.raises(DataError, match="There are no prompts here"):
        read_prompts(location)


def test_the_hub_needs_a_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match="pip install datasets"):
        read_prompts("owner/name:train")
