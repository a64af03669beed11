"""Scores of a folder: resumable, checked, and through plugins."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from inpo.common.errors import DataError, UsageError
from inpo.common.scorer import checked_scores, load_scorer
from inpo.evaluation.cli import app
from inpo.evaluation.image_folder import ImageFolder
from inpo.evaluation.score import score_folder
from tests.evaluation.conftest import picture

REDS = [10, 250, 30, 40, 50]
SaveImages = Callable[..., Path]


def test_scores_are_the_scorers_own(save_images: SaveImages, counting, tmp_path: Path) -> None:
    folder = ImageFolder(save_images(tmp_path / "a", REDS))
    assert score_folder(folder, counting, batch_size=2) == 5
    lines = [json.loads(line) for line in (tmp_path / "a" / "scores-counting.jsonl").read_text().split("\n") if line]
    assert [line["score"] for line in lines] == REDS
    assert [line["prompt"] for line in lines] == [entry.prompt for entry in folder.entries]
    assert list(folder.scores("counting").values()) == REDS


def test_a_stopped_run_scores_only_what_is_left(save_images: SaveImages, counting, tmp_path: Path) -> None:
    folder = ImageFolder(save_images(tmp_path / "a", REDS))
    line = {"prompt": folder.entries[1].prompt, "seed": 0, "file": "images/1.png", "score": 7.5}
    # One whole line and one torn one, as a kill leaves them.
    part = tmp_path / "a" / "scores-counting.part-0.jsonl"
    part.write_text(json.dumps(line) + "\n" + '{"prompt": "x", "se')
    assert score_folder(folder, counting) == 4
    assert folder.entries[1].prompt not in counting.asked
    assert list(folder.scores("counting").values()) == [10, 7.5, 30, 40, 50]
    assert not part.exists()
    assert score_folder(folder, counting) == 0


def test_images_added_later_are_scored_later(save_images: SaveImages, counting, tmp_path: Path) -> None:
    path = save_images(tmp_path / "a", REDS)
    listing = (path / "images.jsonl").read_text()
    (path / "images.jsonl").write_text("\n".join(listing.split("\n")[:2]) + "\n")
    assert score_folder(ImageFolder(path), counting) == 2
    (path / "images.jsonl").write_text(listing)
    with pytest.raises(DataError, match="not complete"):
        ImageFolder(path).scores("counting")
    assert score_folder(ImageFolder(path), counting) == 3
    whole = ImageFolder(path).scores("counting")
    # A shorter list takes no score away.
    (path / "images.jsonl").write_text("\n".join(listing.split("\n")[:1]) + "\n")
    assert score_folder(ImageFolder(path), counting) == 0
    assert len(ImageFolder(path).scores("counting")) == 1
    (path / "images.jsonl").write_text(listing)
    assert score_folder(ImageFolder(path), counting) == 0
    assert ImageFolder(path).scores("counting") == whole


@pytest.mark.usefixtures("plugin")
def test_a_number_that_is_not_finite_is_refused_with_its_image(save_images: SaveImages, tmp_path: Path) -> None:
    folder = ImageFolder(save_images(tmp_path / "a", REDS))
    with pytest.raises(DataError, match=r"broken, images/0\.png"):
        score_folder(folder, load_scorer("broken"))
    assert folder.scorer_names() == []
    assert not list((tmp_path / "a").glob("scores-*"))


@pytest.mark.usefixtures("plugin")
def test_a_scorer_that_fails_ends_in_words_and_leaves_no_file(save_images: SaveImages, tmp_path: Path) -> None:
    folder = save_images(tmp_path / "a", REDS)
    done = CliRunner().invoke(app, ["score", str(folder), "--scorer", "failing"])
    assert isinstance(done.exception, DataError)
    assert re.search(r"failing, images/0\.png and 4 more\n.*KeyError: 'clip'\n.*--verbose", str(done.exception))
    assert not list(folder.glob("scores-*"))


class Unloaded:
    """What a tensor on a device does."""

    def __array__(self, *_: object, **__: object) -> np.ndarray:
        raise TypeError("can't convert")


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ([1.0], r"list of shape \(1,\)"),
        ([[1.0], [2.0]], r"list of shape \(2, 1\)"),
        (2.0, r"float of shape \(\)"),
        (None, "NoneType"),
        ("good", "str"),
        (["1.5", "2.5"], "list"),
        ([None, 1.0], "object"),
        ([[1.0], 2.0], "ValueError"),
        (iter([1.0, 2.0]), "list_iterator"),
        ({"a": 1.0, "b": 2.0}, "dict"),
        ([1j, 2j], "complex"),
        (Unloaded(), "Unloaded, of which numpy says TypeError: can't convert"),
    ],
)
def test_what_are_not_as_many_numbers_as_images_is_refused(
    counting, monkeypatch: pytest.MonkeyPatch, given: object, told: str
) -> None:
    monkeypatch.setattr(counting, "score", lambda images, prompts: given)
    with pytest.raises(DataError, match=rf"one number per image(.|\n)*counting, first(.|\n)*\(2,\)(.|\n)*{told}"):
        checked_scores(counting, [picture(1), picture(2)], ["a", "b"], ["first", "second"])


@pytest.mark.parametrize(
    "error", [MemoryError("no"), RuntimeError("CUDA error: out of memory"), DataError("x", fix="y")]
)
def test_what_has_words_of_its_own_keeps_them(counting, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def score(images: object, prompts: object) -> None:
        raise error

    monkeypatch.setattr(counting, "score", score)
    with pytest.raises(type(error)) as caught:
        checked_scores(counting, [picture(1)], ["a"], ["first"])
    assert caught.value is error


def test_whole_and_single_precision_numbers_are_scores(counting, monkeypatch: pytest.MonkeyPatch) -> None:
    for given in ((1, 2), np.float32([1, 2]), torch.tensor([1.0, 2.0])):
        monkeypatch.setattr(counting, "score", lambda images, prompts, given=given: given)
        assert checked_scores(counting, [picture(1), picture(2)], ["a", "b"], ["first", "second"]) == [1.0, 2.0]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "images" / "2.png").unlink(), "1 missing"),
        (lambda folder: (folder / "images.jsonl").write_text('{"prompt": "a", "seed": 1}\n'), "line 1"),
        (lambda folder: (folder / "images.jsonl").write_text("[]\n"), "no JSON object"),
        (lambda folder: (folder / "images.jsonl").write_text(""), "names no image"),
        (lambda folder: (folder / "images.jsonl").unlink(), "no folder of generated images"),
        (
            lambda folder: (folder / "images.jsonl").write_text((folder / "images.jsonl").read_text() * 2),
            "same prompt and seed",
        ),
        (lambda folder: (folder / "images.jsonl").write_bytes(b'{"prompt": "gr\xfcn"}\n'), "not UTF-8"),
    ],
)
def test_a_bad_folder_is_refused(
    save_images: SaveImages, tmp_path: Path, damage: Callable[[Path], object], message: str
) -> None:
    folder = save_images(tmp_path / "a", REDS)
    damage(folder)
    with pytest.raises(DataError, match=message):
        ImageFolder(folder)


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[:4],
        lambda data: data[:50],
        lambda data: data[:45] + b"\xff\xff" + data[47:],
        lambda data: data[:16] + b"\0\1\0\0\0\1\0\0" + data[24:],
    ],
    ids=["empty", "no header", "cut", "flipped", "says 65536 x 65536"],
)
def test_a_damaged_image_is_named(
    save_images: SaveImages, counting, tmp_path: Path, damage: Callable[[bytes], bytes]
) -> None:
    folder = save_images(tmp_path / "a", REDS)
    file = folder / "images" / "3.png"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(DataError, match=r"images/3\.png(.|\n)*evaluate generate"):
        score_folder(ImageFolder(folder), counting)


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "[1]",
        '{"prompt": "p", "seed": 0}',
        '{"prompt": ["p"], "seed": 0, "score": 1}',
        '{"prompt": "p", "seed": 0, "score": NaN}',
    ],
)
def test_a_damaged_file_of_scores_is_refused(save_images: SaveImages, counting, tmp_path: Path, line: str) -> None:
    folder = ImageFolder(save_images(tmp_path / "a", REDS))
    score_folder(folder, counting)
    file = tmp_path / "a" / "scores-counting.jsonl"
    file.write_text(file.read_text() + line + "\n")
    with pytest.raises(DataError, match=r"scores-counting\.jsonl, line 6(.|\n)*to do"):
        folder.scores("counting")


@pytest.mark.parametrize(
    ("command", "shown"),
    [("generate", "[default: 7.5]"), ("score", "[default: (32, of large"), ("generate", "NAME[:SPLIT[:COLUMN]]")],
)
def test_help_shows_what_stands_in_brackets(command: str, shown: str) -> None:
    result = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "200", "TERMINAL_WIDTH": "200"})
    assert shown in " ".join(result.output.replace("│", " ").split())


@pytest.mark.usefixtures("plugin")
@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("alias", "another name"),
        ("lost", "LostScorer"),
        ("absent", "no_such_package"),
        ("raising", "ValueError: no such device"),
        ("shy", "RuntimeError: no weights in this place"),
        ("mute", r"score\(images, prompts\)"),
        ("org/blue", "file's name"),
        ("red*", "file's name"),
        ("cold", r"temperature[\s\S]*got: +0\n"),
        ("hot", r"temperature[\s\S]*got: +nan\n"),
        ("wordy", "temperature"),
    ],
)
def test_a_scorer_that_is_registered_wrongly_is_refused(name: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        load_scorer(name)


@pytest.mark.usefixtures("plugin")
def test_the_command_finds_installed_scorers(save_images: SaveImages, tmp_path: Path) -> None:
    folder = save_images(tmp_path / "a", REDS)
    result = CliRunner().invoke(app, ["score", str(folder), "--scorer", "red"])
    assert result.exit_code == 0, result.output
    assert f"red: mean {np.mean(REDS):.4g} over 5 images" in result.output
    assert "device: " in result.output
    wrong = CliRunner().invoke(app, ["score", str(folder), "--scorer", "blue"])
    assert {"broken", "red"} <= set(str(wrong.exception).replace(",", " ").split())
    assert "device: " not in wrong.output
