"""Images: the pipeline's own, equal noise for every model and batch, resumable, of one setting."""

import json
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file, save_file
from torch._dynamo.utils import counters
from typer.testing import CliRunner

import inpo.evaluation.generate
from inpo.common.compiled import compile_network
from inpo.common.errors import InpoError, OutOfMemory, TrainingError, UsageError
from inpo.common.models import open_model
from inpo.evaluation.cli import app
from inpo.evaluation.generate import generate
from inpo.evaluation.image_folder import ImageFolder
from inpo.evaluation.settings import EvaluateSettings
from tests.evaluation.drawing import PROMPTS, make, pixels, same

ROOT = Path(__file__).parents[2]


def test_an_image_is_what_the_pipeline_gives_for_its_listed_seed(tiny_model: Path, tmp_path: Path) -> None:
    report = make(tiny_model, tmp_path / "out", images_per_prompt=2, guidance=3.0)
    assert report.num_images == 6
    lines = [json.loads(line) for line in (tmp_path / "out" / "images.jsonl").read_text().splitlines()]
    assert [line["prompt"] for line in lines] == [prompt for prompt in PROMPTS for _ in range(2)]
    assert len({line["seed"] for line in lines}) == 6
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_model, safety_checker=None)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    for line in lines[2:4]:
        noise = torch.Generator().manual_seed(line["seed"])
        expected = pipeline(line["prompt"], generator=noise, num_inference_steps=2, guidance_scale=3.0).images[0]
        got = Image.open(tmp_path / "out" / line["file"])
        assert abs(np.asarray(got).astype(int) - np.asarray(expected).astype(int)).max() <= 1


def test_noise_does_not_depend_on_batch_or_order(tiny_model: Path, tmp_path: Path) -> None:
    make(tiny_model, tmp_path / "one", batch_size=1)
    make(tiny_model, tmp_path / "three", PROMPTS[::-1], batch_size=3)
    assert same(pixels(tmp_path / "one"), pixels(tmp_path / "three"))
    make(tiny_model, tmp_path / "seed", seed=1)
    assert not pixels(tmp_path / "one").keys() & pixels(tmp_path / "seed").keys()


@pytest.mark.parametrize("left", [0, 100])
def test_a_stopped_run_goes_on_and_a_limited_one_is_completed(tiny_model: Path, tmp_path: Path, left: int) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    make(tiny_model, whole)
    assert make(tiny_model, out, limit=2).num_images == 2
    before = (out / "images" / "00000-0.png").stat().st_mtime_ns
    # As a kill or a lost power leaves it: one image not there yet, one empty or cut, no listing.
    (out / "images.jsonl").unlink()
    (out / "images" / "00001-0.png").write_bytes((out / "images" / "00001-0.png").read_bytes()[:left])
    with pytest.raises(InpoError, match="not complete"):
        ImageFolder(out)
    assert make(tiny_model, out).num_new == 2
    assert (out / "images" / "00000-0.png").stat().st_mtime_ns == before
    assert same(pixels(out), pixels(whole))
    assert make(tiny_model, out).num_new == 0
    # What is there stays listed.
    assert make(tiny_model, out, limit=1).num_images == 3
    assert same(pixels(out), pixels(whole))


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"guidance": 2.0}, "guidance = 7.5"),
        ({"seed": 3}, "seed = 0"),
        ({"resolution": "64"}, "resolution = None"),
        ({"prompts": 1}, "num_prompts"),
    ],
)
def test_a_folder_of_other_settings_is_refused(tiny_model: Path, tmp_path: Path, change: dict, name: str) -> None:
    make(tiny_model, tmp_path / "out", PROMPTS[:1])
    prompts = PROMPTS[:2] if change.pop("prompts", None) else PROMPTS[:1]
    with pytest.raises(UsageError, match=name):
        make(tiny_model, tmp_path / "out", prompts, **change)


def test_too_little_memory_is_told_with_the_batch_to_try(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the allocator itself, of a request that no machine can serve."""
    forward = UNet2DConditionModel.forward

    def full(self: Any, x: torch.Tensor, *rest: Any, **named: Any) -> Any:
        if len(x) > 2:  # guidance takes two for an image
            torch.empty(1 << 46, dtype=torch.uint8)
        return forward(self, x, *rest, **named)

    monkeypatch.setattr(UNet2DConditionModel, "forward", full)
    with pytest.raises(OutOfMemory) as raised:
        make(tiny_model, tmp_path / "out", batch_size=3)
    for words in ("--batch-size 3", "try --batch-size 1;", "what is done stays"):
        assert words in str(raised.value)
    assert make(tiny_model, tmp_path / "out", batch_size=1).num_new == 3


def test_images_have_the_resolution_asked_for(tiny_model: Path, tmp_path: Path) -> None:
    make(tiny_model, tmp_path / "out", PROMPTS[:1], resolution="48x32")
    assert {each.shape for each in pixels(tmp_path / "out").values()} == {(48, 32, 3)}
    with pytest.raises(UsageError, match="--resolution"):
        make(tiny_model, tmp_path / "odd", PROMPTS[:1], resolution="50")
    assert not (tmp_path / "odd").exists()


def test_images_have_the_size_that_the_model_was_made_for(tiny_model: Path, tmp_path: Path) -> None:
    model = shutil.copytree(tiny_model, tmp_path / "model")
    config = model / "unet/config.json"
    for size in ([8, 12], None):
        config.write_text(json.dumps(json.loads(config.read_text()) | {"sample_size": size}))
        if size is None:
            with pytest.raises(UsageError, match="--resolution"):
                make(model, tmp_path / "none", PROMPTS[:1])
            assert not (tmp_path / "none").exists()
        else:
            make(model, tmp_path / "out", PROMPTS[:1])
            assert {each.shape for each in pixels(tmp_path / "out").values()} == {(32, 48, 3)}


def test_another_models_folder_and_a_strangers_folder_are_refused(
    tiny_model: Path, other_model: Path, tmp_path: Path
) -> None:
    make(tiny_model, tmp_path / "out", PROMPTS[:1])
    with pytest.raises(UsageError, match="fingerprints"):
        make(other_model, tmp_path / "out", PROMPTS[:1])
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "me.jpg").touch()
    with pytest.raises(UsageError, match="something else"):
        make(tiny_model, tmp_path / "photos")


def test_more_steps_than_the_model_has_are_refused(tiny_model: Path, tmp_path: Path) -> None:
    # Of 1000 timesteps the scheduler's steps_offset takes one.
    settings = EvaluateSettings(inference_steps=1000)
    with pytest.raises(UsageError, match=r"--inference-steps\n.*at most 999.*\n.*1000"):
        generate(open_model(str(tiny_model)), PROMPTS[:1], settings, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_an_image_that_is_not_finite_is_no_picture(tiny_model: Path, tmp_path: Path, value: float) -> None:
    broken = tmp_path / "model"
    shutil.copytree(tiny_model, broken)
    (file,) = (broken / "vae").glob("*.safetensors")
    weights = load_file(file)
    weights["decoder.conv_out.bias"] = torch.full_like(weights["decoder.conv_out.bias"], value)
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(TrainingError, match=r"not finite(.|\n)*a red cat(.|\n)*--dtype float32"):
        make(broken, tmp_path / "out", PROMPTS[:1])
    assert not list((tmp_path / "out").rglob("*.png"))


@pytest.mark.parametrize("name", ["out", "pairs"])
def test_an_output_that_is_a_file_or_has_damaged_settings_is_refused(
    tiny_model: Path, tmp_path: Path, name: str
) -> None:
    (tmp_path / "out").write_text("a file")
    (tmp_path / "pairs").mkdir()
    (tmp_path / "pairs" / "generate.json").write_text('{"seed": ')
    with pytest.raises(InpoError, match=r"is a file|generate\.json"):
        make(tiny_model, tmp_path / name, PROMPTS[:1])


def test_the_command_reads_a_recipe_and_flags_win(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("a red cat\na dog on the house of the sky under a photo of the cat and dog\n")
    recipe = tmp_path / "r.toml"
    recipe.write_text(
        f'[model]\nmodel = "{tiny_model}"\n[evaluate]\nprompts = "{tmp_path}/p.txt"\nguidance = 2.0\nseed = 5\n'
    )
    arguments = [
        "generate",
        "--recipe",
        str(recipe),
        "--out",
        str(tmp_path / "o"),
        "--inference-steps",
        "1",
        "--seed",
        "6",
    ]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    settings = json.loads((tmp_path / "o" / "generate.json").read_text())
    assert (settings["guidance"], settings["seed"], settings["inference_steps"]) == (2.0, 6, 1)
    assert "longer than the text encoder reads: 1" in result.output


def test_a_command_without_prompts_says_how_to_give_them(tiny_model: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["generate", "--model", str(tiny_model), "--out", str(tmp_path / "o")])
    assert isinstance(result.exception, UsageError)
    assert "--prompts" in str(result.exception)


@pytest.mark.slow
def test_two_processes_make_what_one_makes(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("a red cat\na blue dog\nthe sky\n")
    script = tmp_path / "run.py"
    script.write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nfrom inpo.evaluation.cli import app\napp()\n")
    for processes, out in ((1, "one"), (2, "two")):
        command = [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)),
            *(str(script), "generate", "--model", str(tiny_model), "--prompts", str(tmp_path / "p.txt")),
            *("--out", str(tmp_path / out), "--inference-steps", "2"),
        ]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, done.stderr[-2000:]
        # Said once, by the first process.
        assert done.stdout.count("3 images in") == 1
    whole = pixels(tmp_path / "one")
    assert same(whole, pixels(tmp_path / "two"))
    # Resumed where only the first of the two has anything left to make.
    (tmp_path / "two" / "images" / "00000-0.png").unlink()
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    assert same(whole, pixels(tmp_path / "two"))


def test_a_compiled_network_draws_the_same_images_in_batches_of_one_size(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Graphs are captured as ever, and run by PyTorch. The last batch, of one image, makes no other graph."""
    make(tiny_model, tmp_path / "plain", guidance=3.0, batch_size=2, compile="off")
    torch.compiler.reset()
    counters.clear()
    captured: list[int] = []

    def watched(*arguments: Any, **options: Any) -> bool:
        done = compile_network(*arguments, **options)
        captured.append(counters["stats"]["unique_graphs"])
        return done

    monkeypatch.setattr(inpo.evaluation.generate, "compile_network", watched)
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", partial(compile_, backend="eager"))
    make(tiny_model, tmp_path / "compiled", guidance=3.0, batch_size=2, compile="whole")
    assert captured == [counters["stats"]["unique_graphs"]] != [0]
    assert same(pixels(tmp_path / "plain"), pixels(tmp_path / "compiled"))

    def broken(graph: Any, inputs: Any) -> Any:
        raise RuntimeError("no compiler here")

    monkeypatch.setattr(torch, "compile", partial(compile_, backend=broken))
    make(tiny_model, tmp_path / "broken", guidance=3.0, batch_size=2, compile="blocks")
    assert "compiling it failed: " in capsys.readouterr().err
    assert same(pixels(tmp_path / "plain"), pixels(tmp_path / "broken"))
    # The option is no setting of the folder: what is left is made with or without.
    make(tiny_model, tmp_path / "broken", guidance=3.0, batch_size=2, compile="off")
