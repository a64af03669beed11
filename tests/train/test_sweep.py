"""Several runs from one cache, one table at the end, and one page."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from accelerate.state import AcceleratorState
from PIL import Image
from typer.testing import CliRunner

from inpo.cli import app
from inpo.common.errors import UsageError
from inpo.inspection.run_page import make_run_page
from inpo.train.output import claim_output
from inpo.train.sweep import read_sweep

PROMPT = "a small red ball on the left at night"


def write(folder: Path, text: str) -> Path:
    file = folder / "sweep.toml"
    file.write_text(text)
    return file


def test_lists_are_all_their_combinations(tmp_path: Path) -> None:
    file = write(
        tmp_path,
        '[[run]]\nobjective = ["inpo", "poly"]\nbeta = [500, 2000]\n[[run]]\nname = "flat"\nobjective = "linear"\n'
        'adam_betas = [0.9, 0.99]\n[[run]]\nname = "few"\ntimestep_range = [[0, 100], [100, 1000]]\n',
    )
    planned = {each.name: each.values for each in read_sweep(file)}
    assert planned["inpo-beta-500"] == {"objective": "inpo", "beta": 500}
    assert planned["flat"] == {"objective": "linear", "adam_betas": [0.9, 0.99]}
    assert len(planned) == 7
    assert sorted(str(each.get("timestep_range")) for each in planned.values() if "timestep_range" in each) == [
        "[0, 100]",
        "[100, 1000]",
    ]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("objective = 1", "tables"),
        ("[[run]]\nobjektive = 1", "cannot have"),
        ("[[run]]\noutput = 'x'", "cannot have"),
        ("[[run]]\nname = 1", "cannot have"),
        ("[[run]]\nname = '../x'", "Bad name"),
        ("[[run]]\nname = 'sweep.md'", "the sweep's own table"),
        ("[[run]]\nname = 'sweep.json'", "the sweep's own table"),
        ("[[run]]\n[[run]]\n", "one name"),
        ("[[run]]\nbeta = [", "TOML"),
        ("", "tables"),
        ("run = []", "no run"),
        ("[[run]]\nobjective = []", "no run"),
        ("[[run]]\nname = 'a'\n[[run]]\nname = 'b'\nbeta = []", "no run"),
    ],
)
def test_what_is_no_sweep_is_refused(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        read_sweep(write(tmp_path, text))


def test_values_in_place_of_a_file_are_told_what_a_sweep_is() -> None:
    with pytest.raises(UsageError) as raised:
        read_sweep(Path("objective=inpo,ipo"))
    assert "TOML file of tables [[run]]" in str(raised.value.fix)


def test_runs_follow_each_other_and_are_compared(world: Any, cache: str, tmp_path: Path) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    file = write(tmp_path, '[[run]]\nobjective = ["inpo", "capo"]\n[[run]]\nname = "v"\nloss_space = "v"\n')
    words = ["train", "--cache", cache, "--model", str(world.model.folder), "--output", str(tmp_path / "out")]
    words += ["--steps", "2", "--batch-size", "2", "--log-every", "1", "--evaluate-every", "1", "--held-out", "0.5"]
    words += ["--held-out-records", "8"]
    words += ["--tracker", "none", "--sample-every", "2", "--sample-steps", "1", "--sample-prompts", PROMPT]
    words += ["--sweep", str(file), "--sweep-scorer", "toyworld-oracle"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 1, done.output  # capo: the labels of this cache are hard
    assert "needs soft labels" in done.output
    found = {each["name"]: each for each in json.loads((tmp_path / "out/sweep.json").read_text())}
    assert set(found) == {"inpo", "capo", "v"}
    assert found["capo"]["failed"]
    for name in ("inpo", "v"):
        lines = [json.loads(line) for line in (tmp_path / "out" / name / "metrics.jsonl").read_text().splitlines()]
        assert found[name]["last"]["loss"] == lines[-1]["loss"]
        assert [each["step"] for each in found[name]["held_out"]] == [1, 2]
        assert found[name]["held_out"][-1]["accuracy"] == lines[-1]["held_out_implicit_accuracy"]
        assert (tmp_path / "out" / name / "pipeline/model_index.json").is_file()
        assert 0 <= found[name]["scores"]["toyworld-oracle"]["win_rate"] <= 1
    table = (tmp_path / "out/sweep.md").read_text()
    assert table.count("\n| ") == 4
    # Its page shows the runs side by side, and each one's samples under their prompt, from step 0 on.
    page, shown = make_run_page([tmp_path / "out"])
    assert [each.name for each in shown] == ["inpo", "v"]
    for each in shown:
        assert [(strip.step, strip.prompts) for strip in each.samples] == [(step, (PROMPT,)) for step in (0, 2)]
        assert each.chosen["train.held_out"] == 0.5
        assert each.defaults["train.seed"] == 0
    assert "capo failed: " in page
    assert "v: toyworld-oracle prefers its last samples to the reference" in page
    assert page.count(f"{PROMPT}, step 0") == 4  # of each run a picture, and its button
    assert f"inpo inspect run {tmp_path / 'out'}" in done.output
    # The same command again makes nothing anew, and says the same.
    again = CliRunner().invoke(app, words)
    assert again.exit_code == 1
    assert (tmp_path / "out/sweep.md").read_text() == table


def test_runs_that_would_be_pushed_to_one_repository_are_refused(world: Any, cache: str, tmp_path: Path) -> None:
    file = write(tmp_path, "[[run]]\nbeta = [500, 2000]\n")
    words = ["train", "--cache", cache, "--model", str(world.model.folder), "--output", str(tmp_path / "out")]
    done = CliRunner().invoke(app, [*words, "--tracker", "none", "--push-to-hub", "me/it", "--sweep", str(file)])
    assert isinstance(done.exception, UsageError)
    assert "me/it for 2 runs" in str(done.exception)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("runs", "flags", "refused"),
    [
        ("lora_rank = [0, 2]", (), None),
        ("lora_rank = [0, 2]", ("--lora-alpha", "8"), None),
        ("lora_rank = 0", ("--lora-alpha", "8"), "--lora-alpha"),
        ('schedule = ["constant", "linear"]\nwarmup_steps = 1', (), None),
        ("sample_every = [0, 1]", ("--sample-steps", "3"), None),
        ("sample_every = 0", ("--sample-steps", "3"), "--sample-steps"),
        ('optimizer = ["adamw", "adafactor"]\nadam_eps = 1e-6', (), None),
        ('held_out = [0.0, 0.5]\noverfitting = "stop"', (), None),
    ],
)
def test_a_flag_that_one_of_the_runs_has_a_use_for_is_taken(
    world: Any,
    cache: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    runs: str,
    flags: tuple,
    refused: str | None,
) -> None:
    begun: list[object] = []
    monkeypatch.setattr("inpo.train.sweep.train", lambda run, **told: begun.append(run))  # the first ends early
    words = ["train", "--cache", cache, "--model", str(world.model.folder), "--output", str(tmp_path / "out"), *flags]
    told = ["--tracker", "none", "--sweep", str(write(tmp_path, f"[[run]]\n{runs}\n"))]
    done = CliRunner().invoke(app, [*words, *told])
    assert len(begun) == (refused is None)
    if refused:
        assert isinstance(done.exception, UsageError)
        assert refused in str(done.exception)
    assert (tmp_path / "out").exists() == (refused is None)


def test_what_a_killed_run_left_half_written_ends_no_sweep(world: Any, cache: str, tmp_path: Path) -> None:
    """Its checkpoint is not whole, so that it fails before it has numbers, and neither is its last line. One that fails
    later keeps those that it has."""
    AcceleratorState._reset_state(reset_partial_state=True)
    killed = tmp_path / "out/a"
    (killed / "checkpoints/step-00000001").mkdir(parents=True)
    (killed / "metrics.jsonl").write_bytes(b'{"step": 0, "loss": 0.7}\n{"step": 1, "lo\xff')
    file = write(tmp_path, "[[run]]\nname = 'a'\n[[run]]\nname = 'b'\n[[run]]\nname = 'c'\nlearning_rate = 1e36\n")
    words = ["train", "--cache", cache, "--model", str(world.model.folder), "--output", str(tmp_path / "out")]
    words += ["--steps", "2", "--batch-size", "2", "--tracker", "none", "--held-out", "0", "--sweep", str(file)]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 1, done.output
    first, second, third = json.loads((tmp_path / "out/sweep.json").read_text())
    assert (first["last"], first["failed"]) == ({}, "No checkpoint of this run is whole.")
    assert (second["last"]["step"], second["failed"]) == (2, None)
    assert (third["last"]["step"], third["failed"]) == (0, "The loss or the gradient is not finite.")


def test_a_folder_that_another_sweep_writes_to(world: Any, cache: str, tmp_path: Path) -> None:
    words = ["train", "--cache", cache, "--model", str(world.model.folder), "--output", str(tmp_path / "out")]
    with claim_output(tmp_path / "out"):
        done = CliRunner().invoke(app, [*words, "--sweep", str(write(tmp_path, "[[run]]\nname = 'a'\n"))])
    assert isinstance(done.exception, UsageError)
    assert "Another run is writing here" in str(done.exception)
    assert not (tmp_path / "out/a").exists()


class Brightness:
    """Of an image, to the last digit."""

    name = "brightness"

    def score(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> np.ndarray:
        return np.array([np.asarray(image).mean() for image in images])


def test_the_reference_is_sampled_as_the_runs_are(
    make_world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a network that is still the reference: a tie. Both are told as many tokens as the cache. A run that has got no
    further than its first sample, which is the reference's, is not compared."""
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setattr("inpo.train.sweep.load_scorer", lambda name: Brightness())
    world, told = make_world("pixart-sigma"), []
    family = type(world.model.family)
    own = family.drawing

    def drawing(self: Any, prompts: Sequence[str], guidance: float, max_tokens: int | None = None) -> dict[str, Any]:
        told.append(max_tokens)
        return own(self, prompts, guidance, max_tokens)

    monkeypatch.setattr(family, "drawing", drawing)
    words = ["train", "--cache", world.cache(tmp_path / "c", shards=(3,)), "--model", str(world.model.folder)]
    words += ["--output", str(tmp_path / "out"), "--sweep", str(write(tmp_path, "[[run]]\nname = 'one'\n"))]
    words += ["--steps", "1", "--batch-size", "2", "--tracker", "none", "--held-out", "0", "--sample-every", "1"]
    words += ["--sample-steps", "1", "--sample-prompts", "a small red ball", "--learning-rate", "1e-30"]
    done = CliRunner().invoke(app, [*words, "--sweep-scorer", "brightness"])
    assert done.exit_code == 0, done.output
    (found,) = json.loads((tmp_path / "out/sweep.json").read_text())
    score = found["scores"]["brightness"]
    assert (score["win_rate"], score["mean"]) == (0.5, score["reference_mean"])
    assert told == [16, 16, 16]
    samples = tmp_path / "out/one/samples"
    last = (samples / "step-00000001.png").rename(tmp_path / "last.png")
    done = CliRunner().invoke(app, [*words, "--sweep-scorer", "brightness"])
    assert done.exit_code == 0, done.output
    assert json.loads((tmp_path / "out/sweep.json").read_text())[0]["scores"] == {}
    last.rename(samples / "step-00000001.png")
    # The run is finished, and its picture was drawn with one step: no picture of two is compared with it.
    done = CliRunner().invoke(app, [*words, "--sweep-scorer", "brightness", "--sample-steps", "2"])
    assert done.exit_code == 0, done.output
    assert json.loads((tmp_path / "out/sweep.json").read_text())[0]["scores"] == {}
    # Nor is that of another run, whose numbers lie there too. The second has none.
    write(tmp_path, "[[run]]\nname = 'one'\nbeta = 7\n[[run]]\nname = 'two'\nobjective = 'capo'\n")
    done = CliRunner().invoke(app, [*words, "--sweep-scorer", "brightness"])
    assert done.exit_code == 1, done.output
    found, _ = json.loads((tmp_path / "out/sweep.json").read_text())
    assert (found["settings"]["beta"], found["last"], found["scores"]) == (7, {}, {})
    write(tmp_path, "[[run]]\nname = 'one'\n")
    # A scorer that fails when all is trained does not take the table with it.
    judge, asked = Brightness.score, []

    def score_once(self: Brightness, images: Sequence[Image.Image], prompts: Sequence[str]) -> np.ndarray:
        asked.append(prompts)
        return judge(self, images, prompts) if len(asked) == 1 else np.full(len(images), np.nan)

    with monkeypatch.context() as patch:
        patch.setattr(Brightness, "score", score_once)
        done = CliRunner().invoke(app, [*words, "--sweep-scorer", "brightness"])
    assert done.exit_code == 1, done.output
    assert "brightness, the sample of 'a small red ball'" in done.output
    (found,) = json.loads((tmp_path / "out/sweep.json").read_text())
    assert (found["scores"], found["failed"]) == ({}, None)
    # A picture that is damaged is not compared.
    picture = samples / "step-00000001.png"
    picture.write_bytes(picture.read_bytes()[:-100])
    done = CliRunner().invoke(app, [*words, "--sweep-scorer", "brightness"])
    assert done.exit_code == 0, done.output
    assert json.loads((tmp_path / "out/sweep.json").read_text())[0]["scores"] == {}


def test_a_run_of_a_sweep_is_what_it_would_be_alone(world: Any, cache: str, tmp_path: Path) -> None:
    words = ["train", "--cache", cache, "--model", str(world.model.folder), "--steps", "2", "--batch-size", "1"]
    words += ["--tracker", "none", "--log-every", "1", "--learning-rate", "1e-3"]
    file = write(tmp_path, "[[run]]\naccumulate = [1, 3]\nobjective = 'poly'\nema = 0.9\n")
    for more in (["--output", "out", "--sweep", str(file)], ["--output", "alone", "--accumulate", "3", "--ema", "0.9"]):
        AcceleratorState._reset_state(reset_partial_state=True)
        more[1] = str(tmp_path / more[1])
        done = CliRunner().invoke(app, [*words, *more, *(() if "--sweep" in more else ("--objective", "poly"))])
        assert done.exit_code == 0, done.output
    weights = "pipeline/unet/diffusion_pytorch_model.safetensors"
    (swept,) = (tmp_path / "out").glob(f"*accumulate-3*/{weights}")
    assert swept.read_bytes() == (tmp_path / "alone" / weights).read_bytes()
