"""Images that follow given ones: diffusers' own pipelines, called by hand, are the oracle."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    ControlNetModel,
    DDIMScheduler,
    StableDiffusionControlNetPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionXLControlNetPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from typer.testing import CliRunner

from inpo.common.errors import DataError, InpoError, ModelError, UsageError
from inpo.common.families import FAMILIES
from inpo.common.models import open_model
from inpo.common.testing import save_tiny_pipeline
from inpo.evaluation.cli import app
from inpo.evaluation.generate import generate
from inpo.evaluation.settings import EvaluateSettings
from inpo.evaluation.transfer import open_transfer

PROMPTS = ["a red cat", "a blue dog"]
SIZE = 32


def save_controlnet(model: Path, folder: Path) -> Path:
    """A ControlNet of the model's network, of which all weights count: a new one's last layers are zero."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        network = UNet2DConditionModel.from_pretrained(model / "unet")
        made = ControlNetModel.from_unet(network, conditioning_embedding_out_channels=(8, 8, 16))
        for each in made.parameters():
            each.data += 0.02 * torch.randn_like(each)
    made.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the middle that a ControlNet steers, too."""
    return save_tiny_pipeline(tmp_path_factory.mktemp("models") / "whole")


@pytest.fixture(scope="module")
def controlnet(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_controlnet(tiny_model, tmp_path_factory.mktemp("controlnet"))


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for both: images of other sizes than those that are made, and masks of their left halves."""
    folder = tmp_path_factory.mktemp("given")
    lines = []
    for number, prompt in enumerate(PROMPTS):
        pixels = np.random.default_rng(number).integers(0, 256, (64, 80, 3), dtype=np.uint8)
        mask = np.zeros((64, 80), dtype=np.uint8)
        mask[:, :40] = 255
        Image.fromarray(pixels).save(folder / f"{number}.png")
        Image.fromarray(mask).save(folder / f"{number}-mask.png")
        lines.append({"prompt": prompt, "file": f"{number}.png", "mask": f"{number}-mask.png"})
    (folder / "images.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def fitted(file: Path) -> Image.Image:
    """The middle of the image, resized: 64 x 80 becomes 32 x 32."""
    return Image.open(file).resize((40, 32), Image.Resampling.LANCZOS).crop((4, 0, 36, 32))


def close(got: Path, expected: Image.Image) -> bool:
    return abs(np.asarray(Image.open(got)).astype(int) - np.asarray(expected).astype(int)).max() <= 1


def images(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "images.jsonl").read_text().splitlines()]


def test_control_images_steer_as_in_diffusers(tiny_model: Path, controlnet: Path, given: Path, tmp_path: Path) -> None:
    words = ["--model", str(tiny_model), "--controlnet", str(controlnet), "--control-images", str(given)]
    words += ["--control-scale", "0.5", "--inference-steps", "2", "--guidance", "5", "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(app, ["generate", *words])
    assert result.exit_code == 0, result.output
    pipeline = StableDiffusionControlNetPipeline.from_pretrained(
        tiny_model, controlnet=ControlNetModel.from_pretrained(controlnet), safety_checker=None
    )
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    assert [line["prompt"] for line in images(tmp_path / "out")] == PROMPTS
    for number, line in enumerate(images(tmp_path / "out")):
        arguments = {"num_inference_steps": 2, "guidance_scale": 5.0, "image": fitted(given / f"{number}.png")}
        noise = torch.Generator().manual_seed(line["seed"])
        expected = pipeline(line["prompt"], generator=noise, controlnet_conditioning_scale=0.5, **arguments).images[0]
        assert close(tmp_path / "out" / line["file"], expected)
        noise = torch.Generator().manual_seed(line["seed"])
        free = pipeline(line["prompt"], generator=noise, controlnet_conditioning_scale=0.0, **arguments).images[0]
        assert not close(tmp_path / "out" / line["file"], free)
    # The folder is of these images, this ControlNet and this scale.
    told = json.loads((tmp_path / "out" / "generate.json").read_text())["transfer"]
    assert told["weight"] == 0.5
    other = CliRunner().invoke(app, ["generate", *words, "--control-scale", "0.7"])
    assert isinstance(other.exception, UsageError)
    assert "transfer" in str(other.exception)


def test_a_mask_is_painted_anew_as_in_diffusers(tiny_model: Path, given: Path, tmp_path: Path) -> None:
    settings = EvaluateSettings(inpaint=str(given), inpaint_strength=0.85, inference_steps=4, batch_size=2)
    generate(open_model(str(tiny_model)), PROMPTS, settings, tmp_path / "out")
    pipeline = StableDiffusionInpaintPipeline.from_pretrained(tiny_model, safety_checker=None)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    for number, line in enumerate(images(tmp_path / "out")):
        expected = pipeline(
            line["prompt"],
            image=fitted(given / f"{number}.png"),
            mask_image=fitted(given / f"{number}-mask.png"),
            strength=0.85,
            num_inference_steps=4,
            height=SIZE,
            width=SIZE,
            generator=torch.Generator().manual_seed(line["seed"]),
        ).images[0]
        assert close(tmp_path / "out" / line["file"], expected)


def test_a_mask_is_what_is_white_and_not_transparent(tiny_model: Path, given: Path, tmp_path: Path) -> None:
    model = open_model(str(tiny_model))
    settings = EvaluateSettings(inpaint_strength=0.85, inference_steps=2, limit=1)
    clear = shutil.copytree(given, tmp_path / "clear")
    white = Image.new("L", (80, 64), 255)
    Image.merge("RGBA", [white, white, white, Image.open(given / "0-mask.png")]).save(clear / "0-mask.png")
    for folder in (given, clear):
        generate(model, [], settings.model_copy(update={"inpaint": str(folder)}), tmp_path / f"{folder.name}-out")
    first, second = (Image.open(next((tmp_path / f"{each.name}-out").rglob("*.png"))) for each in (given, clear))
    np.testing.assert_array_equal(np.asarray(first), np.asarray(second))


@pytest.mark.parametrize(("white", "paints"), [((0, 7), False), ((10, 14), False), ((16, 20), True), ((64, 80), True)])
def test_a_mask_is_taken_where_diffusers_paints_by_it(
    tiny_model: Path, given: Path, tmp_path: Path, white: tuple[int, int], paints: bool
) -> None:
    """Columns 8 to 71 become 32 pixels, of which the latents' mask has every fourth."""
    folder = shutil.copytree(given, tmp_path / "given")
    pipeline = StableDiffusionInpaintPipeline.from_pretrained(tiny_model, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)

    def drawn(mask: Image.Image) -> np.ndarray:
        mask.save(folder / "1-mask.png")
        own = {"image": fitted(folder / "1.png"), "mask_image": fitted(folder / "1-mask.png")}
        noise = torch.Generator().manual_seed(0)
        return np.asarray(pipeline("a", **own, num_inference_steps=1, height=32, width=32, generator=noise).images[0])

    def white_columns(first: int, end: int) -> Image.Image:
        mask = Image.new("L", (80, 64))
        mask.paste(255, (first, 0, end, 64))
        return mask

    assert np.array_equal(drawn(white_columns(0, 0)), drawn(white_columns(*white))) != paints
    settings = EvaluateSettings(inpaint=str(folder), inference_steps=1)
    if paints:
        assert generate(open_model(str(tiny_model)), PROMPTS[1:], settings, tmp_path / "out").num_new == 1
    else:
        with pytest.raises(DataError, match=r"marks nothing[\s\S]*1-mask\.png"):
            generate(open_model(str(tiny_model)), PROMPTS[1:], settings, tmp_path / "out")
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("mask", "said"),
    [
        (Image.new("L", (64, 64), 255), "another shape"),
        (Image.new("L", (80, 64), 127), "marks nothing"),
        (Image.new("RGBA", (80, 64), (255, 255, 255, 0)), "marks nothing"),
    ],
)
def test_a_mask_that_is_none_of_its_image_is_refused(
    tiny_model: Path, given: Path, tmp_path: Path, mask: Image.Image, said: str
) -> None:
    folder = shutil.copytree(given, tmp_path / "given")
    mask.save(folder / "1-mask.png")
    with pytest.raises(DataError, match=rf"{said}[\s\S]*1-mask\.png"):
        generate(open_model(str(tiny_model)), [], EvaluateSettings(inpaint=str(folder)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_family_of_two_encoders_is_steered_too(given: Path, tmp_path: Path) -> None:
    model = save_tiny_pipeline(tmp_path / "model", "sdxl")
    controlnet = save_controlnet(model, tmp_path / "controlnet")
    settings = EvaluateSettings(controlnet=str(controlnet), control_images=str(given), inference_steps=1, limit=1)
    generate(open_model(str(model)), [], settings, tmp_path / "out")
    pipeline = StableDiffusionXLControlNetPipeline.from_pretrained(
        model, controlnet=ControlNetModel.from_pretrained(controlnet), add_watermarker=False
    )
    pipeline.scheduler = DDIMScheduler.from_config({"clip_sample": False, **pipeline.scheduler.config})
    pipeline.set_progress_bar_config(disable=True)
    (line,) = images(tmp_path / "out")
    noise = torch.Generator().manual_seed(line["seed"])
    expected = pipeline(
        line["prompt"], image=fitted(given / "0.png"), generator=noise, num_inference_steps=1, guidance_scale=7.5
    ).images[0]
    assert close(tmp_path / "out" / line["file"], expected)
    inpaint = EvaluateSettings(inpaint=str(given), inference_steps=1, limit=1)
    generate(open_model(str(model)), [], inpaint, tmp_path / "inpaint")
    assert len(images(tmp_path / "inpaint")) == 1
    # A ControlNet of another kind of network is refused by what differs.
    wrong = EvaluateSettings(controlnet=str(controlnet), control_images=str(given))
    base = save_tiny_pipeline(tmp_path / "base", "sd15")
    with pytest.raises(ModelError, match="does not fit") as caught:
        generate(open_model(str(base)), [], wrong, tmp_path / "wrong")
    assert "addition_embed_type None" in str(caught.value)
    assert not (tmp_path / "wrong").exists()


@pytest.mark.parametrize(("name", "able"), [(name, name in ("sd", "sdxl")) for name in FAMILIES])
@pytest.mark.parametrize("options", [{"inpaint": "GIVEN"}, {"controlnet": "GIVEN", "control_images": "GIVEN"}])
def test_other_families_are_refused_by_name_with_the_reason(name: str, able: bool, options: dict, given: Path) -> None:
    settings = EvaluateSettings(**dict.fromkeys(options, str(given)))
    if able:
        assert open_transfer(settings, FAMILIES[name]) is not None
        return
    with pytest.raises(UsageError) as caught:
        open_transfer(settings, FAMILIES[name])
    assert FAMILIES[name].title in str(caught.value)
    assert FAMILIES[name].no_transfer in str(caught.value)


@pytest.mark.parametrize(
    "options",
    [
        {"controlnet": "x"},
        {"control_images": "x"},
        {"control_scale": 0.5},
        {"inpaint_strength": 0.5},
        {"inpaint": "x", "controlnet": "x", "control_images": "x"},
        {"inpaint": "x", "control_scale": 1.0},
        {"inpaint": "x", "inpaint_strength": 0.01, "inference_steps": 50},
    ],
)
def test_options_that_do_not_go_together_are_refused(options: dict) -> None:
    with pytest.raises(UsageError):
        open_transfer(EvaluateSettings(**options), FAMILIES["sd"])


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"prompt": "a", "file": "0.png"}', "names no image"),
        ('{"prompt": "a", "file": "0.png", "mask": 3}', "names no image"),
        ('{"prompt": "a", "file": "0.png", "mask": "lost.png"}', "missing"),
        ('{"prompt": "a", "file": "0.png", "mask": "../outside.png"}', "outside its folder"),
        ('{"prompt": "a", "file": "0.png", "mask": "loop.png"}', "missing"),
        ('{"prompt": "a", "file": "0.png", "mask": "0.png"}\n{"prompt": "a", "file": "1.png", "mask": "1.png"}', "two"),
        ("[]", "no JSON object"),
        ("", "names no image"),
    ],
)
def test_a_bad_list_of_given_images_is_refused(tmp_path: Path, line: str, said: str) -> None:
    folder = tmp_path / "given"
    folder.mkdir()
    for file in (folder / "0.png", folder / "1.png", tmp_path / "outside.png"):
        Image.new("RGB", (8, 8)).save(file)
    (folder / "loop.png").symlink_to("loop.png")
    with pytest.raises(DataError, match="no list of images"):
        open_transfer(EvaluateSettings(inpaint=str(folder)), FAMILIES["sd"])
    (folder / "images.jsonl").write_text(line + "\n" if line else "")
    with pytest.raises(DataError, match=said):
        open_transfer(EvaluateSettings(inpaint=str(folder)), FAMILIES["sd"])


def test_what_is_lacking_or_damaged_leaves_no_folder(
    tiny_model: Path, controlnet: Path, given: Path, tmp_path: Path
) -> None:
    model = open_model(str(tiny_model))
    settings = EvaluateSettings(controlnet=str(controlnet), control_images=str(given), inference_steps=1)
    cut = tmp_path / "cut"
    cut.mkdir()
    (cut / "config.json").write_bytes((controlnet / "config.json").read_bytes())
    weights = (controlnet / "diffusion_pytorch_model.safetensors").read_bytes()
    (cut / "diffusion_pytorch_model.safetensors").write_bytes(weights[: len(weights) // 2])
    damaged = shutil.copytree(given, tmp_path / "damaged")
    (damaged / "1.png").write_bytes((given / "1.png").read_bytes()[:99])
    for prompts, changed in (
        (["a prompt that is not listed"], settings),
        ([], settings.model_copy(update={"controlnet": str(cut)})),
        ([], settings.model_copy(update={"controlnet": str(tmp_path / "nothing")})),
        ([], settings.model_copy(update={"controlnet": str(given)})),
        ([], settings.model_copy(update={"control_images": str(damaged), "batch_size": 1})),
    ):
        with pytest.raises(InpoError):
            generate(model, prompts, changed, tmp_path / "out")
        assert not (tmp_path / "out").exists()
