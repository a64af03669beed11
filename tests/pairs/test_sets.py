"""Public data sets as they are published: each one's exact columns, in the container it comes in."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from inpo.common.pairs import Pair, Skipped, open_source
from inpo.data.cli import app
from tests.pairs.lists import FILES, array, as_csv, as_lines, parquet, read, said, struct

PICK = {
    "are_different": True,
    "best_image_uid": "u",
    "caption": "p",
    "created_at": None,
    "has_label": True,
    "image_0_uid": "u",
    "image_0_url": "https://a",
    "image_1_uid": "v",
    "image_1_url": "https://b",
    "jpg_0": FILES["a.png"],
    "jpg_1": FILES["b.png"],
    "label_0": 0.0,
    "label_1": 1.0,
    "model_0": "m",
    "model_1": "n",
    "ranking_id": 5,
    "user_id": 6,
    "num_example_per_prompt": 1,
}
HPDV3 = {
    "prompt": "p",
    "path1": "images/a.png",
    "path2": "images/b.png",
    "model1": "flux",
    "model2": "real_images",
    "confidence": 0.97,
    "choice_dist": [12, 4],
}
VOTES = {
    "prompt": "p",
    "image1": struct("a.png"),
    "image2": struct("b.png"),
    "votes_image1": 3,
    "votes_image2": 7,
    "model1": "m",
    "model2": "n",
    "detailed_results": '[{"userDetails": {}}]',
    "image1_path": "x",
    "image2_path": "y",
}
RATED = {"overall_rating": 5, "image_text_alignment_rating": 4, "fidelity_rating": 6, "classification": "People"}
_RANKED = [("x-1", "a.png", 2), ("x-1", "b.png", 1), ("x-1", "c.png", 2), ("y-2", "d.png", 1), ("y-2", "e.png", 4)]
TWO_LISTS = [
    RATED | {"image": struct(name), "prompt_id": prompt_id, "prompt": prompt_id, "rank": rank}
    for prompt_id, name, rank in _RANKED
]

SETS: dict[str, tuple[str, Callable[..., Path], list[dict[str, Any]], list[tuple[str, str, float] | str]]] = {
    "Pick-a-Pic v1, v2": (
        "Pick-a-Pic",
        parquet,
        [PICK, PICK | {"ranking_id": 6, "label_0": 0.5, "label_1": 0.5}, PICK | {"ranking_id": 7, "has_label": False}],
        [("5", "BA", 1.0), "tie", "unlabelled"],
    ),
    "Pick-a-Pic, whole labels and no has_label": (
        "Pick-a-Pic",
        parquet,
        [{k: int(v) if k.startswith("label_") else v for k, v in PICK.items() if k != "has_label"}],
        [("5", "BA", 1.0)],
    ),
    "HPDv3": (
        "HPDv3",
        array,
        [HPDV3, HPDV3 | {"choice_dist": None, "prompt": "q"}, HPDV3 | {"choice_dist": [5, 5], "prompt": "r"}],
        [("", "AB", 0.75), ("", "AB", 1.0), "tie"],
    ),
    "HPDv3++": (
        "HPDv3++",
        array,
        [{"prompt": "p", "path1": "images/b.png", "path2": "images/a.png"}],
        [("", "BA", 1.0)],
    ),
    "Rapidata": (
        "Rapidata votes",
        parquet,
        [VOTES, VOTES | {"votes_image1": 4, "votes_image2": 4}, VOTES | {"votes_image1": 0, "votes_image2": 0}],
        [("train-00000-of-00001/0", "BA", 0.7), "tie", "unlabelled"],
    ),
    "HPDv2, test": (
        "HPDv2",
        array,
        [{"prompt": "p", "image_path": ["images/a.png", "images/b.png", "images/c.png"], "rank": [1, 0, 2]}],
        [("", "BA", 1.0), ("", "AC", 1.0), ("", "BC", 1.0)],
    ),
    "HPDv2, train": (
        "HPDv2",
        array,
        [{"prompt": "p", "image_path": ["images/a.png", "images/b.png"], "human_preference": [0, 1]}],
        [("", "BA", 1.0)],
    ),
    "ImageRewardDB": (
        "ImageRewardDB",
        parquet,
        TWO_LISTS,
        [("x-1.0-1", "BA", 1.0), "tie", ("x-1.1-2", "BC", 1.0), ("y-2.0-1", "DE", 1.0)],
    ),
    "ImageRewardDB, groups": (
        "ImageRewardDB",
        parquet,
        [{"prompt_id": "x-1", "prompt": "p", "image": [struct("a.png"), struct("b.png")], "rank": [2, 1]}],
        [("x-1.0-1", "BA", 1.0)],
    ),
    "ImageRewardDB, pairs": (
        "ImageRewardDB, pairs",
        parquet,
        [{"prompt_id": "x-1", "prompt": "p", "img_better": struct("c.png"), "img_worse": struct("a.png")}],
        [("train-00000-of-00001/0", "CA", 1.0)],
    ),
    "chosen and rejected": (
        "chosen and rejected",
        parquet,
        [{"prompt": "p", "chosen": struct("c.png"), "rejected": struct("a.png")}],
        [("train-00000-of-00001/0", "CA", 1.0)],
    ),
}


@pytest.mark.parametrize("name", SETS)
def test_a_published_set_is_recognised_and_read(folder: Path, name: str) -> None:
    title, write, rows, expected = SETS[name]
    path = write(folder, rows)
    found = read(path)
    assert [said(item) for item in found] == [each if isinstance(each, str) else each[1] for each in expected]
    for item, each in zip(found, expected, strict=True):
        if isinstance(item, Pair):
            assert item.label == pytest.approx(each[2])
            assert each[0] in ("", item.pair_id)
    result = CliRunner().invoke(app, ["columns", str(path), "--json"])
    report = json.loads(result.stdout)
    assert (result.exit_code, report["recognised"], report["problem"]) == (0, title, None)
    assert list(report["columns"]) == list(rows[0])
    assert len(report["rows"]) == min(3, len(expected))


def test_scores_of_a_list_come_with_its_pairs_and_a_rank_is_turned_round(folder: Path) -> None:
    pairs = [item for item in read(parquet(folder, TWO_LISTS)) if isinstance(item, Pair)]
    assert [(pair.list, pair.scores) for pair in pairs] == [
        ("x-1", (-1.0, -2.0)),
        ("x-1", (-1.0, -2.0)),
        ("y-2", (-1.0, -4.0)),
    ]


@pytest.mark.parametrize(
    ("how", "expected"),
    [("all", ["BA", "AC", "AD", "BC", "BD", "tie"]), ("adjacent", ["BA", "AC", "tie"]), ("best-worst", ["BD"])],
)
@pytest.mark.parametrize("write", [array, parquet])
def test_what_of_a_ranking_is_compared(folder: Path, how: str, expected: list[str], write: Callable[..., Path]) -> None:
    images = [f"images/{letter}.png" for letter in "abcd"]
    row = {"id": "r", "prompt": "p", "images": images, "ranks": [2, 1, 3, 3]}
    path = write(folder, [row, row | {"id": "s"}])
    found = read(path, pairs_from=how)
    assert [said(item) for item in found] == 2 * expected
    names = {item.pair_id: said(item) for item in read(path)}
    assert all(names[item.pair_id] == said(item) for item in found)  # an id means the same two images
    assert len({open_source(str(path), pairs_from=how).shards[0].fingerprint() for how in ("all", how)}) == (
        1 if how == "all" else 2
    )


def as_bytes(folder: Path, rows: list[dict[str, Any]]) -> Path:
    held = [{k: (folder / v).read_bytes() if str(v).startswith("images/") else v for k, v in r.items()} for r in rows]
    return parquet(folder, held)


@pytest.mark.parametrize("seed", range(12))
def test_whatever_the_names_win_and_lose_are_never_exchanged_or_mixed(folder: Path, seed: int) -> None:
    """Names are drawn from those that mean something and from others, columns in any order: the map alone decides."""
    draw = random.Random(seed)
    known = ["win", "lose", "chosen", "rejected", "jpg_0", "jpg_1", "prompt", "caption", "label", "label_1", "rank"]
    names = draw.sample([*known, "score", "image", "votes_win", "a b", "x=y", "Lose", "choice_dist"], 4)
    win, lose, prompt, label = names
    spare = draw.sample([name for name in known if name not in names], 3)
    rows = []
    for number in range(6):
        better, worse = draw.sample(sorted(FILES), 2)
        row = {
            win: f"images/{better}",
            lose: f"images/{worse}",
            prompt: f"{better} over {worse}",
            label: 0.5 + 0.08 * number,
        }
        row |= {name: f"images/{worse}" for name in spare}
        keys = draw.sample(list(row), len(row))
        rows.append({key: row[key] for key in keys})
    rows = [{key: row[key] for key in rows[0]} for row in rows]
    columns = {"win": win, "lose": lose, "prompt": prompt, "label": label}
    for write in (as_lines, array, as_csv, as_bytes):
        found = read(write(folder, rows), columns=columns)
        assert isinstance(found[0], Skipped)
        assert found[0].reason == "tie"
        for row, item in zip(rows[1:], found[1:], strict=True):
            assert isinstance(item, Pair), item
            better, worse = item.prompt.split(" over ")
            assert (item.win, item.lose) == (FILES[better], FILES[worse])
            assert item.prompt == row[prompt]
            assert item.label == pytest.approx(float(row[label]))


def test_chosen_columns_may_say_the_opposite_of_their_names(folder: Path) -> None:
    path = as_lines(folder, [{"chosen": "images/a.png", "rejected": "images/b.png", "prompt": "p"}])
    assert [said(item) for item in read(path)] == ["AB"]
    assert [said(item) for item in read(path, columns="win=rejected,lose=chosen")] == ["BA"]


def test_a_chosen_column_that_a_row_lacks_is_not_made_up(folder: Path) -> None:
    rows = [{"win": "images/a.png", "lose": "images/b.png", "prompt": str(i), "how_sure": 0.9} for i in range(2)]
    del rows[1]["how_sure"]
    good, bad = read(as_lines(folder, rows), columns={"label": "how_sure"})
    assert isinstance(good, Pair)
    assert good.label == 0.9
    assert isinstance(bad, Skipped)
    assert bad.reason == "bad_metadata"
    assert "no field how_sure; found: win, lose, prompt" in bad.detail


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ("wim=good", "is 'win' meant?"),
        ("win", "expected ROLE=COLUMN"),
        ("win=good,chosen=bad", "a role is named twice"),
        ("win=good,lose=good", "a column is named twice"),
        ("win=good,lose=bda", "is 'bad' meant?"),
        ("win=", "is to be a name"),
    ],
)
def test_columns_that_cannot_be_are_refused_with_what_is_meant(folder: Path, columns: str, words: str) -> None:
    path = parquet(folder, [{"good": b"A", "bad": b"B", "text": "p"}])
    with pytest.raises(Exception, match=words.replace("?", r"\?")) as caught:
        read(path, columns=columns)
    assert type(caught.value).__name__ in ("UsageError", "DataError")


@pytest.mark.parametrize(
    ("votes", "label", "expected"),
    [
        ((3, 1), None, 0.75),
        ((3, 1), 1.0, 0.75),
        ((3, 1), 0.0, "bad_label"),
        ((2, 2), 1.0, "bad_label"),
        ((3, None), None, "bad_label"),
        ((-1, 4), None, "bad_label"),
        (("many", 4), None, "bad_label"),
        ((None, None), None, 1.0),
        ((None, None), 0.6, 0.6),
    ],
)
def test_votes_are_a_soft_label_and_agree_with_a_hard_one(
    folder: Path, votes: tuple[Any, Any], label: float | None, expected: object
) -> None:
    row = {"win": "images/a.png", "lose": "images/b.png", "prompt": "p", "votes_win": votes[0], "votes_lose": votes[1]}
    row |= {} if label is None else {"label": label}
    (item,) = read(as_lines(folder, [row]))
    assert (item.reason if isinstance(item, Skipped) else item.label) == expected


@pytest.mark.parametrize(
    ("score", "is_kept"), [(3.4e38, True), (-3.4e38, True), (1e39, False), (-1e39, False), (1e300, False)]
)
def test_a_score_is_finite_as_a_cache_keeps_it(folder: Path, score: float, is_kept: bool) -> None:
    row = {"win": "images/a.png", "lose": "images/b.png", "prompt": "p", "score_win": score, "score_lose": 1.0}
    (item,) = read(as_lines(folder, [row]))
    assert isinstance(item, Skipped) != is_kept
    if isinstance(item, Skipped):
        assert item.reason == "bad_label"


def test_rows_of_one_list_with_several_prompts_give_no_pair(folder: Path) -> None:
    rows = [row | {"prompt": row["prompt"] if i != 1 else "other"} for i, row in enumerate(TWO_LISTS)]
    found = read(parquet(folder, rows))
    assert [said(item) for item in found] == ["bad_metadata"] * 3 + ["DE"]


def test_a_source_of_which_nothing_can_be_used_says_why_and_what_it_has(folder: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"wim": "images/a.png", "lose": "images/b.png", "prompt": "p", "id": str(i)} for i in range(4)
    ]
    rows += [{"win": "images/gone.png", "lose": "images/b.png", "prompt": "p", "id": "lost"}]
    path = as_lines(folder, rows)
    for command in (["check", str(path), "--decode-workers", "0"], ["pack", str(path), str(folder / "out")]):
        result = CliRunner().invoke(app, command)
        text = " ".join((result.output + str(result.exception or "")).split())
        assert result.exit_code == 1
        assert "4 x bad_metadata" in text
        assert "for instance 0: no field win or chosen" in text
        assert "is 'wim' meant?" in text
        assert "1 x missing_image" in text
        assert "for instance lost: win: no file images/gone.png" in text
        assert "fields found: wim, lose, prompt, id, win" in text
        assert "--columns win=NAME,lose=NAME,... says what they are" in text
