"""The blind study: what the page tells and does not tell, the key, and the tally by hand-made oracles."""

import base64
import io
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin
from typer.testing import CliRunner

from inpo.common.errors import DataError, UsageError
from inpo.evaluation.cli import app
from inpo.evaluation.image_folder import ImageFolder
from inpo.evaluation.statistics import wilson_interval
from inpo.evaluation.study import make_study, read_key
from inpo.evaluation.tally import agreement_of, count_answers

SaveImages = Callable[..., Path]
QUESTIONS = ("overall", "appeal", "alignment")
REDS = {"a": list(range(0, 120, 10)), "b": list(range(5, 125, 10))}


def shown(page: Path) -> dict:
    """What the page's script reads."""

    class Reader(HTMLParser):
        inside, text = False, ""

        def handle_starttag(self, tag: str, attrs: list) -> None:
            self.inside = tag == "script" and ("id", "data") in attrs

        def handle_data(self, data: str) -> None:
            self.text += data if self.inside else ""

    reader = Reader()
    reader.feed(page.read_text())
    return json.loads(reader.text)


def red(uri: str) -> int:
    return Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))).convert("RGB").getpixel((0, 0))[0]


@pytest.fixture(scope="module")
def study(save_images: SaveImages, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """DIR of a study of `secret-base` and `secret-tuned`, whose red values tell whose an image is."""
    folder = tmp_path_factory.mktemp("study")
    a, b = (save_images(folder / name, REDS[side]) for name, side in (("secret-base", "a"), ("secret-tuned", "b")))
    info = PngImagePlugin.PngInfo()
    info.add_text("Software", "made by secret-base")
    Image.new("RGB", (8, 8), (0, 40, 90)).save(a / "images" / "0.png", pnginfo=info)
    result = CliRunner().invoke(app, ["study", str(a), str(b), "--out", str(folder / "out")])
    assert result.exit_code == 0, result.output
    assert f"inpo evaluate study --tally ANSWERS.json --out {folder / 'out'}" in result.output
    return folder / "out"


def test_the_key_tells_what_the_page_does_not(study: Path) -> None:
    data, key = shown(study / "study.html"), json.loads((study / "key.json").read_text())
    assert data["study"] == key["study"]
    assert data["questions"] == list(QUESTIONS)
    assert len(data["pairs"]) == len(key["pairs"]) == 12
    assert {pair["prompt"] for pair in data["pairs"]} == {f"prompt $ number {n} \u2028 ü" for n in range(12)}
    lefts = set()
    for pair in data["pairs"]:
        own = key["pairs"][pair["pair"]]
        lefts.add(own["left"])
        number = int(re.search(r"number (\d+)", pair["prompt"])[1])
        sides = {own["left"]: red(pair["left"]), "ab".replace(own["left"], ""): red(pair["right"])}
        assert sides == {side: REDS[side][number] for side in "ab"}
        assert own["prompt"] == pair["prompt"]
        assert pair.keys() == {"pair", "prompt", "left", "right"}
        assert re.fullmatch("[0-9a-f]{16}", pair["pair"])
    assert lefts == {"a", "b"}
    assert [pair["prompt"] for pair in data["pairs"]] != [f"prompt $ number {n} \u2028 ü" for n in range(12)]
    text = (study / "study.html").read_text()
    assert "secret" not in text
    assert "http" not in text.replace("http-equiv", "")
    pictures = [base64.b64decode(pair[side].partition(",")[2]) for pair in data["pairs"] for side in ("left", "right")]
    assert not any(b"secret" in picture for picture in pictures)


def test_the_seed_decides_and_the_rest_does_not(save_images: SaveImages, tmp_path: Path) -> None:
    a, b = (ImageFolder(save_images(tmp_path / side, REDS[side])) for side in "ab")
    first = make_study(a, b, tmp_path / "one", most_pairs=5)
    assert first.num_pairs == 5
    make_study(a, b, tmp_path / "two", most_pairs=5)
    for name in ("study.html", "key.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    make_study(a, b, tmp_path / "seed", seed=1, most_pairs=5)
    make_study(a, b, tmp_path / "all")
    of = {name: shown(tmp_path / name / "study.html")["pairs"] for name in ("one", "seed", "all")}
    prompts = {name: [pair["prompt"] for pair in pairs] for name, pairs in of.items()}
    assert prompts["one"] == prompts["all"][:5] != prompts["seed"]
    assert [pair["left"] for pair in of["one"]] == [pair["left"] for pair in of["all"][:5]]  # sides do not move
    # The same again is the same study; another one would make the answers to this one useless.
    make_study(a, b, tmp_path / "one", most_pairs=5)
    with pytest.raises(UsageError, match="another study"):
        make_study(a, b, tmp_path / "one", seed=1, most_pairs=5)


def test_a_prompt_is_text_whatever_it_says(save_images: SaveImages, tmp_path: Path) -> None:
    folders = [save_images(tmp_path / side, [REDS[side][0]]) for side in "ab"]
    evil = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"
    for folder in folders:
        (folder / "images.jsonl").write_text(json.dumps({"prompt": evil, "seed": 0, "file": "images/0.png"}) + "\n")
    make_study(*map(ImageFolder, folders), tmp_path / "out")
    assert shown(tmp_path / "out" / "study.html")["pairs"][0]["prompt"] == evil
    assert "alert(1)</script>" not in (tmp_path / "out" / "study.html").read_text()
    (folders[0] / "images.jsonl").write_text('{"prompt": "\\ud800", "seed": 0, "file": "images/0.png"}\n')
    with pytest.raises(DataError, match="line 1"):  # half a character has no bytes
        ImageFolder(folders[0])


def test_equal_images_ask_nothing(save_images: SaveImages, tmp_path: Path) -> None:
    a = ImageFolder(save_images(tmp_path / "a", [1, 2, 3]))
    b = ImageFolder(save_images(tmp_path / "b", [1, 9, 3], size=8))
    made = make_study(a, b, tmp_path / "out")
    assert (made.num_pairs, made.notes) == (1, ("Pairs of equal images, left out: 2.",))
    with pytest.raises(DataError, match="nothing to choose"):
        make_study(a, a, tmp_path / "same")
    assert not (tmp_path / "same").exists()
    large = ImageFolder(save_images(tmp_path / "large", [1, 2, 3], size=200))
    made = make_study(a, large, tmp_path / "sizes")
    assert "differ in size" in made.notes[0]
    other = ImageFolder(save_images(tmp_path / "other", [1], seed=7))
    with pytest.raises(DataError, match="same --prompts and --seed"):
        make_study(a, other, tmp_path / "none")


def answers(study: Path, person: str, choose: Callable[[int, dict], str | None]) -> dict:
    """A person's file: `choose` gives a, b, tie or None for a pair's number and what the key says of it."""
    key = json.loads((study / "key.json").read_text())
    rows = []
    for number, (pair, own) in enumerate(key["pairs"].items()):
        if (model := choose(number, own)) is not None:
            choice = model if model == "tie" else "left" if own["left"] == model else "right"
            rows += [{"pair": pair, "question": question, "choice": choice} for question in QUESTIONS]
    return {"study": key["study"], "person": person, "answers": rows}


def save(folder: Path, *documents: object) -> list[Path]:
    files = [folder / f"{number}.json" for number in range(len(documents))]
    for file, document in zip(files, documents, strict=True):
        file.write_text(json.dumps(document))
    return files


def test_answers_are_unblinded_and_counted(study: Path, tmp_path: Path) -> None:
    one = answers(study, "p1", lambda number, _: "b" if number < 9 else "a")
    two = answers(study, "p2", lambda number, _: "b" if number < 9 else "tie")
    two["answers"] = [row for row in two["answers"] if row["question"] != "appeal"]
    result = CliRunner().invoke(app, ["study", "--tally", *map(str, save(tmp_path, one, two)), "--out", str(study)])
    assert result.exit_code == 0, result.output
    assert "| Overall preference | 2 | 24 | 18 | 3 | 3 | 0.812 [" in result.output
    assert "| Visual appeal | 1 | 12 | 9 | 0 | 3 | 0.750 [" in result.output
    assert "A: secret-base, B: secret-tuned" in result.output
    assert (study / "tally.md").read_text() in result.output
    document = json.loads((study / "tally.json").read_text())
    overall = document["questions"]["overall"]
    assert (document["num_people"], overall["people"], overall["answers"], overall["prompts"]) == (2, 2, 24, 12)
    # One trial per prompt: people who look at one prompt are not independent of each other.
    assert overall["win_rate_wilson"] == list(wilson_interval(0.8125 * 12, 12))
    assert overall["agreement"] == 9 / 12
    # By hand: chance is (18/24)^2 + 2 (3/24)^2 = 19/32.
    assert overall["kappa"] == pytest.approx((3 / 4 - 19 / 32) / (1 - 19 / 32))
    assert document["questions"]["appeal"]["kappa"] is None


def test_fleiss_kappa_of_a_published_table() -> None:
    """Fourteen raters, ten subjects, five categories: kappa 0.210 (Fleiss 1971, as textbooks print it)."""
    table = """0 0 0 0 14; 0 2 6 4 2; 0 0 3 5 6; 0 3 9 2 0; 2 2 8 1 1; 7 7 0 0 0; 3 2 6 3 0; 2 5 3 2 2; 6 5 2 1 0;
        0 2 2 3 7"""
    counts = np.array([[int(each) for each in line.split()] for line in table.split(";")])
    agreement, kappa = agreement_of(counts)
    assert round(agreement, 3) == 0.378
    assert round(kappa, 3) == 0.210
    alone = np.concatenate([counts, [[1, 0, 0, 0, 0]]])  # one answer agrees with nobody
    assert agreement_of(alone) == (agreement, kappa)
    assert agreement_of(np.array([[0, 0, 3]])) == (1.0, None)
    assert agreement_of(np.array([[0, 0, 1]])) == (None, None)


def test_answers_that_do_not_count_are_counted(study: Path, tmp_path: Path) -> None:
    good = answers(study, "p1", lambda number, _: "b" if number < 3 else None)
    first = good["answers"][0]
    odd = {"choice": "left", "question": "overall", "pair": "0" * 16}
    bad = [odd, {**odd, "pair": ["x"]}, {**first, "question": "taste"}, {**first, "choice": "both"}, "word"]
    other = answers(study, "p2", lambda number, _: "a" if number == 0 else None)
    turned = {"left": "right", "right": "left"}[other["answers"][0]["choice"]]
    again = {**other, "answers": [{**other["answers"][0], "choice": turned}]}
    files = save(tmp_path, {**good, "answers": [*good["answers"], *bad, first]}, good, other, again)
    counted = count_answers(read_key(study), files)
    assert dict(counted.skipped) == {
        "a pair that this study does not have": 3,
        "a question that this study does not ask": 1,
        "a choice that is none of left, tie, right": 1,
        "the same answer of one person again": 10,
        "answered in two ways by one person": 2,
    }
    assert [one.statistics.num_pairs for one in counted.questions] == [3, 4, 4]
    assert "- Not counted: 2 x answered in two ways by one person." in counted.to_markdown()
    assert count_answers(read_key(study), files[::-1]).questions == counted.questions  # the order of files is nobody's


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "no JSON"),
        ("[" * 100_000, "no JSON"),
        ("[]", "holds no answers"),
        ('{"study": 3, "person": "p", "answers": []}', "holds no answers"),
        ('{"study": "0123", "person": "p", "answers": []}', "another study"),
        ('{"study": "STUDY", "person": "p", "answers": []}', "no answer to count"),
        ('{"study": "STUDY", "person": "p", "answers": [{"pair": "x"}]}', "no answer to count"),
    ],
)
def test_files_that_are_no_answers_to_this_study(study: Path, tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "answers.json"
    file.write_text(text.replace("STUDY", read_key(study)["study"]))
    with pytest.raises(DataError, match=said) as caught:
        count_answers(read_key(study), [file])
    assert str(file) in str(caught.value)


def test_a_key_that_is_lost_or_damaged_and_options_that_do_not_go_together(study: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no study here"):
        read_key(tmp_path)
    whole = json.loads((study / "key.json").read_text())
    for damaged in ({}, [], {**whole, "a": 3}, {**whole, "pairs": {"x": {"prompt": "p", "left": "c"}}}):
        (tmp_path / "key.json").write_text(json.dumps(damaged))
        with pytest.raises(DataError, match="key cannot be read"):
            read_key(tmp_path)
    for words in (["x", "y", "z"], ["x"], ["--tally", "x", "--seed", "1"], ["--tally", "x", "--most-pairs", "1"]):
        result = CliRunner().invoke(app, ["study", *words, "--out", str(tmp_path / "new")])
        assert isinstance(result.exception, UsageError), result.output
