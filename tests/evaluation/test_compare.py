"""Two folders against each other: the table, the notes, the picture."""

import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib import font_manager
from PIL import Image
from typer.testing import CliRunner

from inpo.common.errors import DataError, UsageError
from inpo.common.fonts import font_names
from inpo.evaluation.cli import app
from inpo.evaluation.compare import compare_folders, to_markdown
from inpo.evaluation.image_folder import ImageFolder
from inpo.evaluation.picture import choose_pairs, draw_picture
from inpo.evaluation.score import score_folder

SaveImages = Callable[..., Path]


@pytest.fixture
def folders(save_images: SaveImages, counting, tmp_path: Path) -> tuple[ImageFolder, ImageFolder]:
    """B is redder in 18 of 20 pairs, equal in one, and less red in one."""
    reds = list(range(40, 240, 10))
    changed = [*(red + 10 for red in reds[:18]), reds[18], reds[19] - 30]
    a, b = (ImageFolder(save_images(tmp_path / n, r)) for n, r in (("base", reds), ("tuned", changed)))
    for folder in (a, b):
        score_folder(folder, counting)
    return a, b


def test_the_table_says_who_wins(folders: tuple[ImageFolder, ImageFolder]) -> None:
    (comparison,) = comparisons = compare_folders(folders)
    (one,) = comparison.scored
    assert (one.scorer, one.statistics.wins, one.statistics.ties, one.statistics.losses) == ("counting", 18, 1, 1)
    assert one.statistics.win_rate == 0.925
    text = to_markdown(comparisons)
    assert text.startswith("tuned is better than base on 18 of 20 images (alike on 1) by counting.\n")
    assert "A: base, B: tuned" in text
    assert "| counting | 20 | 0.925 [" in text
    # Means and medians by hand: A is 40, 50, ... 230; B is 50, ... 220, then 220 again, and 200.
    a, b = list(range(40, 240, 10)), [*range(50, 230, 10), 220, 200]
    cells = [cell.strip() for cell in text.splitlines()[6].split("|")[1:-1]]
    head = [cell.strip() for cell in text.splitlines()[4].split("|")[1:-1]]
    row = dict(zip(head, cells, strict=True))
    shown = [float(row[name]) for name in ("mean A", "mean B", "median A", "median B")]
    assert shown == [float(f"{statistic(s):.4g}") for statistic in (np.mean, np.median) for s in (a, b)]
    assert float(row["mean of B - A"].split()[0]) == np.mean(b) - np.mean(a)
    assert float(row["median of B - A"].split()[0]) == 10
    assert "| B wins |" in text
    assert "narrow" not in text, "there are 20 prompts"
    back = to_markdown(compare_folders(folders[::-1]))
    assert "B does not win: it loses" in back


def test_scores_that_are_not_complete_are_left_out(folders: tuple[ImageFolder, ImageFolder], tmp_path: Path) -> None:
    """As they are where images were made after the scoring."""
    for folder in folders:
        lines = (folder.path / "scores-counting.jsonl").read_text().split("\n")
        (folder.path / "scores-begun.jsonl").write_text("\n".join(lines[:3] if folder is folders[1] else lines))
    text = to_markdown(compare_folders(folders))
    assert "| counting | 20 |" in text
    assert "- Left out, not every image has its score: begun." in text
    (folders[0].path / "scores-counting.jsonl").unlink()
    with pytest.raises(UsageError, match=r"every image of every folder\n.*begun; counting"):
        compare_folders(folders)


def test_it_reproduces_from_what_is_saved(folders: tuple[ImageFolder, ImageFolder], tmp_path: Path) -> None:
    a, b = (str(folder.path) for folder in folders)
    for name in ("one", "two"):
        result = CliRunner().invoke(app, ["compare", a, b, "--out", str(tmp_path / name)])
        assert result.exit_code == 0, result.output
    for file in ("comparison.json", "comparison.md", "comparison.png"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    document = json.loads((tmp_path / "one" / "comparison.json").read_text())
    assert document["num_pairs"] == 20
    found = document["scorers"]["counting"]
    assert (found["win_rate"], found["verdict"]) == (0.925, "B wins")
    # One interval is told everywhere: here its lower end is Wilson's and its upper end the bootstrap's.
    low, high = found["win_rate_wilson"][0], found["win_rate_bootstrap"][1]
    assert found["win_rate_interval"] == [low, high]
    assert low < found["win_rate_bootstrap"][0]
    assert high > found["win_rate_wilson"][1]
    assert f"0.925 [{low:.3f}, {high:.3f}]" in result.output


def test_the_same_folder_twice_is_a_tie_and_no_error(folders: tuple[ImageFolder, ImageFolder]) -> None:
    result = CliRunner().invoke(app, ["compare", str(folders[0].path), str(folders[0].path)])
    assert result.exit_code == 0
    assert "0.500" in result.output
    assert "B does not win: no difference shown" in result.output
    assert "same folder" in result.output


@pytest.mark.usefixtures("plugin")
def test_folders_of_other_prompts_are_refused_before_any_scoring(save_images: SaveImages, tmp_path: Path) -> None:
    a, b = save_images(tmp_path / "a", [1, 2]), save_images(tmp_path / "b", [1, 2], seed=5)
    result = CliRunner().invoke(app, ["compare", str(a), str(b), "--scorer", "red"])
    assert isinstance(result.exception, DataError)
    assert "same --prompts and --seed" in str(result.exception)
    assert not list(tmp_path.rglob("scores-*"))


@pytest.mark.usefixtures("plugin")
def test_scores_that_are_not_there_are_made(folders: tuple[ImageFolder, ImageFolder]) -> None:
    result = CliRunner().invoke(app, ["compare", *(str(folder.path) for folder in folders), "--scorer", "red"])
    assert result.exit_code == 0, result.output
    assert "| red | 20 | 0.925" in result.output


def test_images_on_one_side_only_and_other_settings_are_noted(
    save_images: SaveImages, counting, tmp_path: Path
) -> None:
    a, b = save_images(tmp_path / "a", [1, 2, 3]), save_images(tmp_path / "b", [1, 2])
    (a / "generate.json").write_text('{"guidance": 7.5, "resolution": "1024", "max_tokens": 77}')
    (b / "generate.json").write_text('{"guidance": 3.0, "resolution": "832x512", "max_tokens": 9}')
    for folder in (a, b):
        score_folder(ImageFolder(folder), counting)
    text = to_markdown(compare_folders([ImageFolder(a), ImageFolder(b)]))
    assert "only in A, not compared: 1" in text
    assert "With fewer than 20 prompts, here 2, the intervals of means are too narrow" in text
    for words in ("guidance is 7.5 in A and 3.0", "resolution is 1024 in A and 832x512", "max_tokens is 77 in A and 9"):
        assert f"The settings differ: {words} in B." in text


def test_nothing_to_compare_is_refused(save_images: SaveImages, counting, tmp_path: Path) -> None:
    a, b = save_images(tmp_path / "a", [1]), save_images(tmp_path / "b", [1], seed=9)
    with pytest.raises(DataError, match="--seed"):
        compare_folders([ImageFolder(a), ImageFolder(b)])
    c = save_images(tmp_path / "c", [1])
    score_folder(ImageFolder(a), counting)
    with pytest.raises(UsageError, match="no scores in common"):
        compare_folders([ImageFolder(a), ImageFolder(c)])
    with pytest.raises(DataError, match=f"inpo evaluate score {c}"):
        compare_folders([ImageFolder(a), ImageFolder(c)], ["counting"])


def test_prompts_of_any_script_are_drawn_without_complaint(
    save_images: SaveImages, counting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Warnings are errors here: matplotlib warns for every sign that it has no glyph for."""
    block = TTGlyphPen(None)
    for number, point in enumerate(((0, 0), (0, 900), (900, 900), (900, 0))):
        (block.lineTo if number else block.moveTo)(point)
    block.closePath()
    builder = FontBuilder(1000)
    builder.setupGlyphOrder([".notdef", "cat"])
    builder.setupCharacterMap({ord("猫"): "cat"})
    builder.setupGlyf({".notdef": TTGlyphPen(None).glyph(), "cat": block.glyph()})
    builder.setupHorizontalMetrics({".notdef": (1000, 0), "cat": (1000, 0)})
    builder.setupHorizontalHeader(ascent=900, descent=-100)
    builder.setupNameTable({"familyName": "Cats Only", "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    builder.save(tmp_path / "cats.ttf")
    monkeypatch.setattr(font_manager.fontManager, "ttflist", list(font_manager.fontManager.ttflist))
    folders = [ImageFolder(save_images(tmp_path / name, [0, 0])) for name in "ab"]
    for folder in folders:
        listing = folder.path / "images.jsonl"
        listing.write_text(listing.read_text().replace("number 0", "猫" * 20).replace("number 1", "قطة 🐱 тёмный"))
        score_folder(ImageFolder(folder.path), counting)
    comparisons = compare_folders([ImageFolder(folder.path) for folder in folders])

    def darkness() -> int:
        drawn = Image.open(io.BytesIO(draw_picture(comparisons))).convert("L")
        return int((np.asarray(drawn) < 90).sum())

    boxes = darkness()
    font_manager.fontManager.addfont(tmp_path / "cats.ttf")
    assert font_names("a 猫") == ["DejaVu Sans", "Cats Only"]
    assert font_names("a cat") == ["DejaVu Sans"]
    assert darkness() > boxes + 20 * 50  # twenty full blocks


def test_the_picture_shows_the_best_the_worst_and_others() -> None:
    differences = np.array([0.1 * index for index in range(-10, 10)])
    keys = [(f"p{index}", 0) for index in range(20)]
    improved, worsened, random = choose_pairs(differences, keys)
    assert improved == [19, 18, 17, 16]
    assert worsened == [0, 1, 2, 3]
    assert len(random) == 4
    assert not {*random} & {*improved, *worsened}
    assert choose_pairs(differences, keys)[2] == random


def test_nothing_is_called_improved_that_is_not() -> None:
    improved, worsened, random = choose_pairs(np.array([-1.0, 0.0]), [("a", 0), ("b", 0)])
    assert (improved, worsened, random) == ([], [0], [1])


@pytest.mark.parametrize("size", [8, 700])
def test_the_picture_holds_the_images_in_their_places(
    save_images: SaveImages, counting, tmp_path: Path, size: int
) -> None:
    a = ImageFolder(save_images(tmp_path / "a", [0, 0], size=size))
    b = ImageFolder(save_images(tmp_path / "b", [255, 255], size=size))
    for folder in (a, b):
        score_folder(folder, counting)
    comparisons = compare_folders([a, b])
    drawn = np.asarray(Image.open(io.BytesIO(draw_picture(comparisons))).convert("RGB"))
    dark = np.argwhere((drawn == (0, 40, 90)).all(axis=-1))
    bright = np.argwhere((drawn == (255, 40, 90)).all(axis=-1))
    # Both are there, as large as each other, A to the left of B in the same rows.
    assert len(dark) > 20_000
    assert abs(len(dark) - len(bright)) < 0.05 * len(dark)
    assert dark[:, 1].min() < bright[:, 1].min()
    assert {*dark[:, 0]} == {*bright[:, 0]}


def test_a_comparison_by_recipe_does_not_wait_for_diffusers(
    folders: tuple[ImageFolder, ImageFolder], tmp_path: Path
) -> None:
    """It opens no model, though a recipe can name one."""
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('[model]\nmodel = "some/model"\n[evaluate]\nscorers = ["counting"]\n')
    command = ["evaluate", "compare", "--recipe", str(recipe), *(str(folder.path) for folder in folders)]
    code = f"import sys, inpo.cli; inpo.cli.app({command}, standalone_mode=False); print('diffusers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
    assert "| counting | 20 |" in done.stdout
    assert done.stdout.split()[-1] == "False"


def test_several_folders_are_compared_with_the_first(folders: tuple[ImageFolder, ...], save_images, counting) -> None:
    a, b = folders
    c = ImageFolder(save_images(a.path.parent / "third", [red - 1 for red in range(40, 200, 10)]))
    score_folder(c, counting)
    out = a.path.parent / "out"
    words = ["compare", *(str(folder.path) for folder in (a, b, c)), "--out", str(out)]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    # Only the 16 prompts that all have: B is redder in all of them, C in none.
    assert "| counting | B | 16 | 1.000 [" in result.output
    assert "| counting | C | 16 | 0.000 [" in result.output
    assert "| B wins |" in result.output
    assert "| C does not win: it loses |" in result.output
    assert "A: base, B: tuned, C: third. Every model against A." in result.output
    assert "Images of A that not every folder has, not compared: 4." in result.output
    document = json.loads((out / "comparison.json").read_text())
    assert [(each["letter"], each["b"]["name"]) for each in (document, *document["others"])] == [
        ("B", "tuned"),
        ("C", "third"),
    ]
    assert document["others"][0]["scorers"]["counting"]["wins"] == 0
    # Three images of the first prompt beside each other, in this order.
    drawn = np.asarray(Image.open(out / "comparison.png").convert("RGB"))
    begins = [np.argwhere((drawn == (red, 40, 90)).all(axis=-1))[0] for red in (40, 50, 39)]
    assert len({int(row) for row, _ in begins}) == 1
    assert begins[0][1] < begins[1][1] < begins[2][1]
    lonely = CliRunner().invoke(app, ["compare", str(a.path)])
    assert isinstance(lonely.exception, UsageError)
