"""`inpo precompute` and `inpo plan` as typed: flags, recipe, exit codes."""

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from inpo.common.errors import UsageError
from inpo.plan import plan
from inpo.precompute.cli import precompute


@pytest.fixture
def app() -> Iterator[typer.Typer]:
    """The commands alone; their signal handlers are taken back afterwards."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    made = typer.Typer(pretty_exceptions_enable=False)
    made.command()(precompute)
    made.command()(plan)
    yield made
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def recipe(pipelines: Callable, examples: Callable, write_tars: Callable, tmp_path: Path) -> Path:
    source = write_tars(tmp_path / "pairs", examples(4), 2)
    file = tmp_path / "recipe.toml"
    file.write_text(
        f'[model]\nmodel = "{pipelines()}"\n[data]\npairs = "{source}"\ncache = "{tmp_path / "cache"}"\n'
        '[precompute]\nresolution = 32\ngrid_points = 6\ntimesteps_per_pair = 2\nextra = ["delta_prev"]\n'
        "faithful = false\ntimestep_range = [100, 900]\nmeasure_inversion = 0.0\n"
    )
    return file


@pytest.fixture
def no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a training run will hold is not counted: most of a plan's time."""
    monkeypatch.setattr("inpo.train.memory.train_needs", lambda *told, **named: [])


def test_the_recipe_stands_where_no_flag_is_given(app: typer.Typer, recipe: Path) -> None:
    result = CliRunner().invoke(app, ["precompute", "--recipe", str(recipe), "--dry-run"])
    assert result.exit_code == 0, result.output
    for line in ("grid_points = 6", "timesteps_per_pair = 2", 'extra = ["delta_prev"]', "timestep_range = [100, 900]"):
        assert line in result.output


def test_flags_win_over_the_recipe(app: typer.Typer, recipe: Path) -> None:
    flags = [
        "--grid-points",
        "8",
        "--timestep-range",
        "200",
        "800",
        "--extra",
        "eps_ref",
        "--extra",
        "delta_prev",
        "--inverter",
        "ab2",
        "--guidance",
        "0",
        "--flip",
        "--vae-latent",
        "sample",
        "--profile",
        "lean",
    ]
    result = CliRunner().invoke(app, ["precompute", "--recipe", str(recipe), "--dry-run", *flags])
    assert result.exit_code == 0, result.output
    for line in (
        "grid_points = 8",
        "timestep_range = [200, 800]",
        'extra = ["delta_prev", "eps_ref"]',
        'inverter = "ab2"',
        "guidance = 0.0",
        "flip = true",
        'vae_latent = "sample"',
        'profile = "lean"',
    ):
        assert line in result.output
    assert "faithful = " not in result.output  # the flag took the recipe's word back: the default needs no line


def test_an_unknown_option_is_wrong_usage(app: typer.Typer, recipe: Path) -> None:
    result = CliRunner().invoke(app, ["precompute", "--recipe", str(recipe), "--step", "3"])
    assert result.exit_code == 2
    assert "--step" in result.output


@pytest.mark.usefixtures("no_training")
def test_plan_as_json(app: typer.Typer, recipe: Path) -> None:
    result = CliRunner().invoke(app, ["plan", "--recipe", str(recipe), "--timesteps-per-pair", "1", "--json"])
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert (document["num_shards"], document["num_committed"], document["num_pairs"]) == (2, 0, 4)
    assert document["bytes_by_array"]["x_t"] == 4 * 1 * 2 * 4 * 8 * 8 * 2
    assert document["cache_bytes"] == sum(document["bytes_by_array"].values())


@pytest.mark.usefixtures("no_training")
def test_a_plan_says_why_it_has_no_hours(app: typer.Typer, recipe: Path) -> None:
    result = CliRunner().invoke(app, ["plan", "--recipe", str(recipe), "--gpus", "8"])
    assert result.exit_code == 0, result.output
    assert "device hours" in result.output
    assert "--calibrate" in result.output


@pytest.mark.parametrize(("size", "is_foreign"), [("512", True), ("16", True), ("24x40", False), ("32", False)])
def test_a_size_far_from_the_models_own_is_said(app: typer.Typer, recipe: Path, size: str, is_foreign: bool) -> None:
    result = CliRunner().invoke(app, ["precompute", "--recipe", str(recipe), "--dry-run", "--resolution", size])
    assert result.exit_code == 0, result.output
    assert ("the model was made for 32" in result.stderr) is is_foreign
    assert ("--resolution 32" in result.stderr) is is_foreign


@pytest.mark.usefixtures("no_training")
def test_a_plan_names_the_input_shards_that_it_is_without(app: typer.Typer, recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "pairs" / "00009.tar").write_bytes(b"this is no tar file at all" * 100)
    result = CliRunner().invoke(app, ["plan", "--recipe", str(recipe), "--json"])
    assert result.exit_code == 1
    assert json.loads(result.stdout)["num_pairs"] == 4
    assert "00009.tar" in result.stderr


@pytest.mark.usefixtures("no_training")
@pytest.mark.parametrize(
    "option", [("--ray-workers", "4"), ("--ray-address", "nowhere:1"), ("--gpus-per-worker", "0.5")]
)
def test_a_plan_has_no_use_for_rays_options_without_ray(
    app: typer.Typer, recipe: Path, option: tuple[str, str]
) -> None:
    result = CliRunner().invoke(app, ["plan", "--recipe", str(recipe), *option])
    assert isinstance(result.exception, UsageError)
    assert "without the ray engine" in str(result.exception)


@pytest.mark.usefixtures("no_training")
def test_a_plan_leaves_out_what_precompute_would(app: typer.Typer, recipe: Path, tmp_path: Path) -> None:
    """A file that another source's file in the cache is called like."""
    done = CliRunner().invoke(app, ["precompute", "--recipe", str(recipe)])
    assert done.exit_code == 0, done.output
    first, *others = sorted((tmp_path / "pairs").glob("*.tar"))
    other = tmp_path / "others"
    other.mkdir()
    shutil.copy(others[0], other / first.name)
    for new, num_pairs in ((False, None), (True, 2)):
        if new:
            shutil.copy(first, other / "new.tar")
        result = CliRunner().invoke(app, ["plan", "--recipe", str(recipe), "--pairs", str(other), "--json"])
        assert result.exit_code == 1
        assert "Another source's file of this name" in result.stderr
        assert (json.loads(result.stdout)["num_pairs"] if result.stdout else None) == num_pairs


@pytest.mark.usefixtures("no_training")
@pytest.mark.parametrize("levels", [1000, 100])
def test_plan_with_calibration_gives_hours(
    app: typer.Typer, recipe: Path, pipelines: Callable, tmp_path: Path, levels: int
) -> None:
    model = shutil.copytree(pipelines(), tmp_path / "model")
    config = model / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"num_train_timesteps": levels}))
    options = ["--model", str(model), "--timestep-range", "0", str(levels), "--calibrate", "--json", "--gpus", "2"]
    result = CliRunner().invoke(app, ["plan", "--recipe", str(recipe), *options])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["device_hours"] > 0


def test_the_front_door_opens_without_the_heavy_libraries() -> None:
    """Every command, and --help, would wait for them; a Ctrl-C meanwhile falls into the middle of an import."""
    heavy = "torch diffusers transformers accelerate pyarrow webdataset zarr"
    code = f"import sys, inpo.cli; print(*(name for name in '{heavy}'.split() if name in sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2]
    )
    assert done.stdout.split() == []


def test_a_plan_says_what_a_device_will_hold(app: typer.Typer, recipe: Path) -> None:
    with recipe.open("a") as stream:
        stream.write("[train]\nbatch_size = 3\nlora_rank = 2\n")
    asked = ["plan", "--recipe", str(recipe), "--dtype", "bfloat16", "--device-memory", "0.1"]
    result = CliRunner().invoke(app, [*asked, "--json"])
    assert result.exit_code == 0, result.output
    inverting, plain, checkpointed = json.loads(result.stdout)["memory"]
    assert [each["batch_size"] for each in (inverting, plain, checkpointed)] == [16, 3, 3]
    assert inverting["optimizer"] == inverting["gradients"] == 0 < plain["gradients"] < plain["optimizer"]
    assert plain["weights"] == checkpointed["weights"] < inverting["weights"]  # which holds the VAE too
    assert checkpointed["activations"] < plain["activations"]
    assert 3 < plain["largest_batch_size"] < checkpointed["largest_batch_size"]
    assert plain["device_memory"] == int(0.1 * 2**30)
    shown = CliRunner().invoke(app, asked).output
    for words in ("Memory of each device, bfloat16", "activations", "LoRA", "peak", "most pairs"):
        assert words in " ".join(shown.split())
