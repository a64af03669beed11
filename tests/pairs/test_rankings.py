"""Rankings of which each row has one image: which rows belong together, and what breaks one."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from inpo.common.pairs import Skipped, open_source
from inpo.common.pairs.walk import Walk
from tests.pairs.lists import array, as_csv, as_lines, parquet, read, said

SINGLES: list[dict[str, Any]] = [{"image": f"images/{letter}.png", "rank": i} for i, letter in enumerate("abcd")]


@pytest.mark.parametrize("common", ["prompt_id", "prompt"])
def test_a_line_between_the_rows_of_a_ranking_that_cannot_be_understood_is_one_row(folder: Path, common: str) -> None:
    lines = [json.dumps(row | {common: "7", "prompt": "7"}) for row in SINGLES]
    plain = json.dumps({"win": "images/a.png", "lose": "images/b.png", "prompt": "p"})
    path = folder / "any.jsonl"
    path.write_text("\n".join([*lines[:2], "{oops", lines[2], "[]", lines[3], "{again", plain, "{oops"]))
    found = read(path)
    assert [said(item) for item in found] == [
        *("AB", "AC", "AD", "BC", "BD", "CD"),
        *["bad_metadata"] * 3,
        *("AB", "bad_metadata"),
    ]
    assert len({item.pair_id for item in found}) == len(found)
    told = [item.detail.partition(":")[0] for item in found if isinstance(item, Skipped)]
    assert told == ["line 3", "line 5", "line 7", "line 9"]
    assert [said(item) for item in read(path, pairs_from="best-worst")] == [
        "AD",
        *["bad_metadata"] * 3,
        *("AB", "bad_metadata"),
    ]


def test_rows_of_a_ranking_that_come_back_are_not_numbered_anew(folder: Path) -> None:
    rows = [row | {"prompt_id": 7, "prompt": "p"} for row in SINGLES]
    others = [row | {"prompt_id": 8} for row in rows[:2]]
    for write in (as_lines, as_csv, parquet):
        found = read(write(folder, [*rows[:2], *others, *rows[2:], others[0]]))
        assert [said(item) for item in found] == ["AB", "AB", "bad_metadata", "bad_metadata"]
        for item, number in zip(found[2:], "78", strict=True):
            assert isinstance(item, Skipped)
            assert item.detail.startswith("the rows of prompt_id")
            assert number in item.detail
            assert item.detail.endswith("do not lie together")


def test_rows_with_an_empty_list_id_are_of_no_list(folder: Path) -> None:
    """Not all of one list, whose prompts would differ."""
    for value in ("", None):
        rows = [row | {"prompt_id": value, "prompt": str(i)} for i, row in enumerate(SINGLES)]
        for write in (as_lines, as_csv):
            assert [said(item) for item in read(write(folder, rows))] == ["bad_metadata"] * 4


def test_a_ranking_that_goes_on_in_another_file_says_so(folder: Path) -> None:
    for number in (0, 2):
        rows = [row | {"prompt_id": 7, "prompt": "p"} for row in SINGLES[number : number + 2]]
        parquet(folder, rows).rename(folder / f"{number}.parquet")
    walk = Walk(source=open_source(str(folder)))
    found = [item for _, item in walk.rows(walk.readable_shards(walk.source.shards))]
    assert [said(item) for item in found] == ["AB", "duplicate_id"]
    assert isinstance(found[1], Skipped)
    assert found[1].detail == "an earlier row has this id; the rows of a ranking are to lie together, in one file"


@pytest.mark.parametrize("how", ["all", "adjacent", "best-worst"])
@pytest.mark.parametrize("write", [array, parquet])
def test_whether_pairs_are_of_lists_hangs_on_what_a_row_is(folder: Path, how: str, write: Callable[..., Path]) -> None:
    """And not on how many pairs it gives."""
    pair = {"win": "images/a.png", "lose": "images/b.png", "prompt": "p"}
    ranking = {"prompt": "p", "image_path": ["images/a.png", "images/b.png"], "human_preference": [1, 0]}
    single = {"prompt": "p", "image_path": "images/a.png", "rank": 1}
    for row, has_lists in (
        (pair, False),
        (pair | {"prompt_id": None}, False),
        (pair | {"prompt_id": "7"}, True),
        (ranking, True),
        (single, True),
    ):
        (shard,) = open_source(str(write(folder, [row, row])), pairs_from=how).shards
        assert shard.has_lists is has_lists, row
