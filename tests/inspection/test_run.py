"""`run`: training runs on one page. The warnings are those of docs/training.md, and nothing that is missing ends it."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from inpo.common.recipe import DataSection, ModelSection, to_toml
from inpo.inspection.run_signs import SIGNS, warnings_of
from inpo.train.settings import TrainSettings
from inpo.train.sweep_samples import SampleScore
from inpo.train.sweep_table import SweepRow
from tests.html_page import Page

PROMPTS = ("a red cat", "</script><b>a dog</b>")


def line(step: int, **values: Any) -> dict[str, Any]:
    """A line of metrics, of a run that learns a little."""
    told = {"loss": 0.69, "implicit_accuracy": 0.6, "margin": 0.1, "win_advantage": 0.002, "lose_advantage": -0.001}
    return {"step": step, "gradient_norm": 1.0, "learning_rate": 1e-5} | told | values | {"by_timestep": bins(told)}


def held_out(accuracy: float, records: int = 100, **values: Any) -> dict[str, Any]:
    told = {f"held_out_{name}": value for name, value in values.items()}
    return told | {"held_out_implicit_accuracy": accuracy, "held_out_by_timestep": bins({"loss": 0.6}, records)}


def bins(told: dict[str, Any], records: int = 8) -> list[dict[str, Any]]:
    return [
        {"timesteps": [0, 500], "records": records // 2} | told,
        {"timesteps": [500, 1000], "records": records // 2} | told,
    ]


def strip(file: Path, prompts: tuple[str, ...] | None, count: int = 2) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    told = PngInfo()
    if prompts is not None:
        told.add_text("prompts", json.dumps(prompts))
    pixels = np.random.default_rng(0).integers(0, 255, (16, 16 * count, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, pnginfo=told)


def write_run(folder: Path, *, settings: dict[str, Any] | None = None, samples: tuple[int, ...] = (0, 10)) -> Path:
    """A whole run: metrics, configuration, samples."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [line(0, loss=0.6931, margin=0.0), line(10, **held_out(0.6)), line(20, **held_out(0.7, loss=0.65))]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in lines))
    train = TrainSettings(output=folder, beta=123.5, steps=20, **(settings or {}))
    (folder / "recipe.toml").write_text(
        to_toml({"model": ModelSection(model="m"), "data": DataSection(), "train": train})
    )
    for step in samples:
        strip(folder / "samples" / f"step-{step:08d}.png", PROMPTS)
    (folder / "pipeline").mkdir(exist_ok=True)
    return folder


def write_comparison(folder: Path, model: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    told = {"num_pairs": 24, "win_rate": 0.75, "win_rate_wilson": [0.6, 0.8], "mean_a": 1.0, "mean_b": 2.0}
    told["win_rate_interval"] = [0.55, 0.88]
    sides = [{"name": name, "settings": {"names": {"model": each}}} for name, each in (("base", "m"), ("new", model))]
    other = {
        "letter": "AC",
        "b": {"name": "third"},
        "scorers": {"oracle": {"win_rate": 0.25, "verdict": "B does not win"}},
    }
    document = {
        "others": [other],
        "letter": "B",
        "a": sides[0],
        "b": sides[1],
        "notes": ["<i>told</i>"],
        "scorers": {"oracle": told | {"verdict": "B wins"}},
    }
    (folder / "comparison.json").write_text(json.dumps(document))
    strip(folder / "comparison.png", None)
    return folder


@pytest.fixture
def page_of(inspect, tmp_path):
    def make(*words: object, code: int = 0) -> Page:
        done = inspect("run", *words, "--out", tmp_path / "page.html")
        assert done.code == code, done.out
        return Page((tmp_path / "page.html").read_text(encoding="utf-8"))

    return make


def texts(page: Page, *tags: str) -> list[str]:
    return [text.strip() for tag in tags or page.text for text in page.text.get(tag, []) if text.strip()]


def test_a_run_is_curves_samples_comparison_and_configuration(page_of, tmp_path):
    run = write_run(tmp_path / "runs" / "one")
    write_comparison(tmp_path / "runs" / "compare", str(run / "pipeline"))
    write_comparison(tmp_path / "runs" / "others", str(tmp_path / "elsewhere"))
    (tmp_path / "loop").symlink_to("loop")
    write_comparison(tmp_path / "runs" / "broken", str(tmp_path / "loop"))
    page = page_of(run)
    titles = texts(page, "h3")
    for title in ("Loss", "Held-out accuracy", "Accuracy by timestep", "Win advantage by timestep", "Gradient norm"):
        assert title in titles
    # A grid of two prompts over two steps, the first on top; each picture names its prompt and step.
    pictures = [attributes["alt"] for tag, attributes in page.tags if tag == "img" and "step" in attributes["alt"]]
    assert pictures == [f"{prompt}, step {step}" for step in (0, 10) for prompt in PROMPTS]
    assert {"oracle", "0.75", "0.55 to 0.88", "B wins", "0.25", "AC does not win", "<i>told</i>"} <= {
        *texts(page, "td", "th", "li")
    }
    assert sum("others" in text for text in texts(page)) == 0
    named = page_of(run, "--compare", tmp_path / "runs" / "others")
    assert sum("others" in text for text in texts(named)) == 1
    again = page_of(run, "--compare", tmp_path / "runs" / "compare")  # it was found already
    assert sum(tag == "img" and "scores" in a["alt"] for tag, a in again.tags) == 1
    # What differs from the defaults comes first; the rest is there too.
    rows = texts(page, "th")
    assert rows.index("train.beta") < rows.index("train.seed")
    assert any(text.startswith("step 20 of 20 · inpo · its result: pipeline/ · ") for text in texts(page, "p"))
    assert "123.5" in texts(page, "td")
    html = (tmp_path / "page.html").read_text()
    assert not re.search(r"https?://|@import|<b>a dog", html)
    assert all(a.get(name, "data:").startswith(("data:", "#")) for _, a in page.tags for name in ("src", "href"))


def test_runs_stand_side_by_side(page_of, tmp_path):
    one = write_run(tmp_path / "a" / "run")
    two = write_run(tmp_path / "b" / "run", settings={"learning_rate": 3e-4})
    page = page_of(one, two)
    assert {"a/run", "b/run"} <= {*texts(page, "th"), *texts(page, "h3")}
    # A row in which the runs differ is marked, and no other one is, but for their folders.
    html = (tmp_path / "page.html").read_text()
    assert re.findall(r'class="differs"><th scope="row">([^<]*)', html) == ["train.output", "train.learning_rate"]
    assert {"1e-05", "0.0003"} <= {*texts(page, "td")}
    assert [attributes["alt"] for tag, attributes in page.tags if tag == "img"].count("a red cat, column 3") == 1
    curves = [attributes for tag, attributes in page.tags if tag == "polyline"]
    assert sum(attributes["class"] == "s1" for attributes in curves) >= 6  # the second run's lines, beside the first's


def test_a_sweeps_folder_stands_for_its_runs(page_of, tmp_path):
    for name in ("inpo", "poly", "late"):
        write_run(tmp_path / "sweep" / name)
    (tmp_path / "sweep/late/metrics.jsonl").unlink()
    score = SampleScore(win_rate=0.75, mean=1.0, reference_mean=0.5, num_prompts=8)
    scored = SweepRow(name="inpo", output=tmp_path, settings={}, scores={"oracle": score})
    failed = SweepRow(name="hinge", output=tmp_path, settings={}, failed="A <b>loss</b>.")
    late = SweepRow(name="late", output=tmp_path, settings={}, failed="No labels.")
    told = json.dumps([each.to_json() for each in (scored, failed, late)])
    other = "Not in sweep.json, and so of another sweep or of one that goes on: poly."
    preferred = "inpo: oracle prefers its last samples to the reference's at 0.75 of 8 prompts"
    for written, notes in (
        (told, [preferred, "hinge failed: A <b>loss</b>.", "late failed: No labels.", other]),
        ("{}", ["sweep.json cannot be read: not a list of runs"]),
    ):
        (tmp_path / "sweep" / "sweep.json").write_text(written)
        page = page_of(tmp_path / "sweep")
        assert texts(page, "h1") == ["inpo, late, poly"]
        assert texts(page, "li")[: len(notes)] == notes


def test_a_run_that_failed_at_once_is_not_shown_by_an_earlier_ones_numbers(page_of, inspect, tmp_path):
    sweep = tmp_path / "sweep"
    for name in ("inpo", "poly"):
        write_run(sweep / name)
    done = SweepRow(name="inpo", output=sweep / "inpo", settings={}, last={"step": 3}, failed="NaN at step 4.")
    failed = SweepRow(name="poly", output=sweep / "poly", settings={}, failed="Other settings.")
    (sweep / "sweep.json").write_text(json.dumps([done.to_json(), failed.to_json()]))
    page = page_of(sweep)
    assert texts(page, "h1") == ["inpo"]
    notes = ["inpo failed: NaN at step 4.", "poly failed: Other settings."]
    assert texts(page, "li")[:3] == [*notes, "poly/ holds an earlier run's numbers, which are not shown."]
    assert texts(page_of(sweep / "poly"), "h1") == ["poly"]
    # No run is left to show: the error names the folders, which may be asked for.
    (sweep / "sweep.json").write_text(json.dumps([failed.to_json(), failed.to_json() | {"name": "inpo"}]))
    done = inspect("run", sweep, "--out", tmp_path / "none.html")
    assert done.code == 1
    assert re.search(rf"Every run(.|\n)*in inpo, poly(.|\n)*inspect run {sweep}/inpo {sweep}/poly", done.out)


def spoil_metrics(text: str):
    def spoil(run: Path) -> None:
        (run / "metrics.jsonl").write_text(text)

    return spoil


def remove(name: str):
    def spoil(run: Path) -> None:
        (run / name).unlink()

    return spoil


def replace(name: str, content: str | bytes):
    def spoil(run: Path) -> None:
        (run / name).parent.mkdir(exist_ok=True)
        (run / name).write_bytes(content.encode() if isinstance(content, str) else content)

    return spoil


SPOILT = {
    "no metrics": (remove("metrics.jsonl"), "There are no curves"),
    "no recipe": (remove("recipe.toml"), "The configuration is not known"),
    "a recipe that is no TOML": (replace("recipe.toml", "beta = "), "The configuration is not known"),
    "a recipe of another hand": (
        replace("recipe.toml", "[train]\nbeta = 123.5\nx = [\n1]\n"),
        "all settings are shown",
    ),
    "a recipe of bytes": (replace("recipe.toml", b"\xff\xfe\x00"), "The configuration is not known"),
    "half a line": (spoil_metrics('{"step": 0, "loss": 1}\n{"step": 1, "lo'), "1 of 2 lines cannot be read"),
    "lines of other things": (spoil_metrics('[]\n7\n{"step": "a"}\n\n{}\n'), "There are no curves"),
    "numbers that are none": (
        spoil_metrics(
            '{"step": 3, "loss": "x", "margin": null, "by_timestep": [1, {"timesteps": [0]}, {"timesteps": [0, "b"]}], '
            '"held_out_implicit_accuracy": 1, "held_out_by_timestep": 5, "gradient_norm": 1' + "0" * 400 + "}"
        ),
        "not finite",
    ),
    "numbers out of all proportion": (
        spoil_metrics(
            '{"step": 1, "loss": 1e308, "margin": 0}\n{"step": 2, "loss": -1e308, "margin": 1e99, '
            '"held_out_implicit_accuracy": 7, "held_out_by_timestep": [{"timesteps": [0, 9], "records": 5}]}\n'
            '{"step": 1e300}\n{"step": -1}'
        ),
        "2 of 4 lines cannot be read",
    ),
    "half a surrogate pair": (
        replace("comparison.json", '{"scorers": {"\\ud800": {"win_rate": 1}}}'),
        "win rate over A",
    ),
    "a sample that is cut": (replace("samples/step-00000010.png", b"\x89PNG\r\n\x1a\n"), "cannot be read"),
    "a sample of no step": (replace("samples/step-x.png", b""), "a red cat"),
    "a comparison that is none": (replace("comparison.json", "[]"), "cannot be read"),
    "a comparison of another form": (
        replace("comparison.json", '{"scorers": {"a": 1, "b": {"win_rate": "x"}}}'),
        "win rate",
    ),
}


@pytest.mark.parametrize("spoilt", SPOILT)
def test_what_is_missing_or_spoilt_is_said_and_hides_nothing_else(page_of, tmp_path, spoilt):
    spoil, words = SPOILT[spoilt]
    run = write_run(tmp_path / "run")
    spoil(run)
    page = page_of(run)
    assert words in " ".join(texts(page))
    assert sum(tag == "img" for tag, _ in page.tags) >= 2
    assert "metrics" in spoilt or "123.5" in texts(page, "td") or "recipe" in spoilt


def test_a_run_that_has_just_begun_says_what_is_not_there(page_of, tmp_path):
    run = write_run(tmp_path / "run", samples=())
    (run / "metrics.jsonl").unlink()
    (run / "pipeline").rmdir()
    words = " ".join(texts(page_of(run)))
    for part in (
        "not finished",
        "There is no number to draw",
        "There are no samples to show",
        "no comparison of this run",
    ):
        assert part in words


def test_a_strip_that_does_not_name_its_prompts_is_one_picture(page_of, tmp_path):
    run = write_run(tmp_path / "run", samples=())
    strip(run / "samples" / "step-00000005.png", None, count=3)
    words = " ".join(texts(page_of(run)))
    assert "do not name their prompts" in words
    assert "no sample of step 0" in words


def test_a_prompt_that_is_asked_for_twice_has_two_columns(page_of, tmp_path):
    run = write_run(tmp_path / "run", samples=())
    strip(run / "samples" / "step-00000000.png", ("a cat", "a cat"))
    pictures = [a["alt"] for tag, a in page_of(run).tags if tag == "img" and a["alt"]]
    assert pictures == ["a cat, step 0", "a cat (2), step 0"]


def test_many_steps_are_spread_evenly_with_the_first_and_the_last(page_of, tmp_path):
    run = write_run(tmp_path / "run", samples=tuple(range(0, 100, 2)))
    page = page_of(run)
    assert "12 of 50 steps are shown" in " ".join(texts(page))
    steps = [int(a["alt"].split()[-1]) for tag, a in page.tags if tag == "img" and a["alt"]]
    assert (steps[0], steps[-1], len(steps)) == (0, 98, 24)


def test_what_is_no_run_is_refused(inspect, states, tmp_path):
    write_run(tmp_path / "runs" / "one")
    (tmp_path / "none").mkdir()
    for folder, words in (
        (tmp_path / "missing", "no folder"),
        (tmp_path / "none", "an empty folder"),
        (tmp_path / "runs", f"inpo inspect run {tmp_path / 'runs' / 'one'}"),
        (states("healthy"), "inspect report"),
    ):
        done = inspect("run", folder, "--out", tmp_path / "page.html")
        assert (done.code, "not the folder of a run" in done.out, words in done.out) == (1, True, True), done.out
    one = tmp_path / "runs" / "one"
    done = inspect("run", one, one / ".." / "one", "--out", tmp_path / "page.html")
    assert (done.code, "given twice" in done.out) == (2, True)
    done = inspect("run", one, "--compare", tmp_path / "none", "--out", tmp_path / "page.html")
    assert (done.code, "no comparison here" in done.out) == (1, True)
    assert not (tmp_path / "page.html").exists()


START = line(0, loss=0.6931, margin=0.0)
LATER = range(10, 100, 10)
SHOWN = {
    "learns": ([START, *(line(step, loss=0.5, margin=1.0) for step in LATER)], []),
    "no step yet": ([START], []),
    "steps too small": ([START, *(line(step, loss=0.6930, margin=1e-3) for step in LATER)], ["steps too small"]),
    "turned": ([START, *(line(step, **held_out(0.9 if step < 50 else 0.6)) for step in LATER)], ["memorising"]),
    "never told held-out pairs apart": (
        [START, *(line(step, implicit_accuracy=0.95, **held_out(0.5, 200)) for step in LATER)],
        ["memorising"],
    ),
    "both fall": (
        [START, *(line(step, win_advantage=-0.026, lose_advantage=-0.032, margin=6e-2) for step in LATER)],
        ["gets worse"],
    ),
    "both fall, held out": (
        [START, *(line(s, **held_out(0.6, margin=3.0, win_advantage=-0.02, lose_advantage=-0.03)) for s in LATER)],
        ["gets worse"],
    ),
    "only the lose falls": ([START, *(line(s, win_advantage=0.01, lose_advantage=-0.1) for s in LATER)], []),
    "saturated": ([START, *(line(step, loss=1e-4, margin=40.0) for step in LATER)], ["saturated"]),
    "norm grows": ([START, *(line(step, gradient_norm=float(step**2)) for step in LATER)], ["rate too high"]),
    "overflows": ([START, *(line(step, skipped_updates=step / 2) for step in LATER)], ["overflow"]),
    "scaler at its start": ([START, *(line(step, skipped_updates=1) for step in range(100, 200, 10))], []),
    "not finite": ([START, line(10), line(20, loss=None)], ["not finite"]),
    "held out not finite": ([START, line(10), line(20, held_out_loss=None)], ["not finite"]),
    "few records": ([START, *(line(step, **held_out(0.6, 28)) for step in LATER)], ["chance"]),
}


@pytest.mark.parametrize("name", SHOWN)
def test_the_signs_of_the_document_are_seen_in_the_numbers(name):
    metrics, expected = SHOWN[name]
    found = [each.sign.likely for each in warnings_of(metrics)]
    assert len(found) == len(expected), found
    assert all(words in likely for words, likely in zip(expected, found, strict=True))


def test_the_rules_are_the_documents_table():
    document = (Path(__file__).parents[2] / "docs/training.md").read_text()
    table = document.split("| you see | likely | try |\n|---|---|---|\n")[1].split("\n\n")[0]
    rows = [tuple(cell.strip() for cell in row.strip("|").split("|")) for row in table.splitlines()]
    assert rows == [(sign.see, sign.likely, sign.advice) for sign in SIGNS]
