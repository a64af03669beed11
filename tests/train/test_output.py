"""What a run leaves behind, read by diffusers."""

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.models.autoencoders.vae import Decoder
from PIL import Image
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from inpo.common.cache import open_cache
from inpo.common.errors import ModelError
from inpo.train.export import export_single_file
from inpo.train.output import write_output
from inpo.train.samples import sample_images
from inpo.train.settings import TrainSettings


def image(pipeline: Any) -> np.ndarray:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(
        "a red cat",
        num_inference_steps=3,
        generator=torch.Generator().manual_seed(0),
        height=16,
        width=16,
        output_type="np",
    ).images[0]


@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_the_pipeline_loads_and_differs_in_the_unet_alone(
    make_world: Callable[..., Any], run: Callable[..., Path], tmp_path: Path, kind: str
) -> None:
    world = make_world(kind)
    location = world.cache(tmp_path / "c", shards=(4,))
    output = run(model=str(world.model.folder), caches=[location], steps=3, learning_rate=1e-3)
    trained = DiffusionPipeline.from_pretrained(output / "pipeline")
    base = DiffusionPipeline.from_pretrained(world.model.folder)
    assert not np.allclose(image(trained), image(base))
    for name in ("vae", "text_encoder"):
        left, right = getattr(trained, name).state_dict(), getattr(base, name).state_dict()
        assert all(torch.equal(left[key], right[key]) for key in right)
    assert not list((output / "pipeline").rglob("*.bin"))
    card = (output / "pipeline" / "README.md").read_text()
    assert world.model.fingerprints["network"] in card
    assert "learning_rate = 0.001" in card


def test_the_card_is_utf_8_whatever_the_locale(world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt of the recipe is in it, and the hub reads it as UTF-8."""
    opened = io.open

    def in_ascii(file: Any, mode: str = "r", buffering: int = -1, encoding: str | None = None, *rest: Any) -> Any:
        """As in the locale C: text is ASCII where nobody says what else it is."""
        if "b" not in mode and encoding in (None, "locale"):
            encoding = "ascii"
        return opened(file, mode, buffering, encoding, *rest)

    monkeypatch.setattr(io, "open", in_ascii)
    with pytest.raises(UnicodeEncodeError):
        (tmp_path / "text").write_text("caf\u00e9")
    write_output(world.model.load_network(), world.model, tmp_path, card="caf\u00e9")
    assert (tmp_path / "pipeline" / "README.md").read_bytes() == "caf\u00e9".encode()


@pytest.mark.parametrize(("kind", "dtype"), [("sd15", "float32"), ("sd15", "bfloat16"), ("sdxl", "float32")])
def test_lora_weights_load_into_the_base(
    make_world: Callable[..., Any], run: Callable[..., Path], tmp_path: Path, kind: str, dtype: str
) -> None:
    world = make_world(kind)
    location = world.cache(tmp_path / "c", shards=(4,), network_dtype=dtype)
    output = run(model=str(world.model.folder), caches=[location], steps=3, lora_rank=2, learning_rate=1e-1)
    assert not (output / "pipeline").exists()
    base = DiffusionPipeline.from_pretrained(world.model.folder)
    before = image(base)
    base.load_lora_weights(output / "lora")
    after = image(base)
    assert not np.allclose(before, after)
    (tmp_path / "export").mkdir()
    file = export_single_file(output, tmp_path / "export" / "merged.safetensors", dtype="float32")
    cls = StableDiffusionXLPipeline if kind == "sdxl" else StableDiffusionPipeline
    extra = {} if kind == "sdxl" else {"safety_checker": None, "requires_safety_checker": False}
    merged = cls.from_single_file(str(file), config=str(world.model.folder), **extra)
    np.testing.assert_allclose(image(merged), after, atol=1e-3)


def test_lora_on_top_of_another_start_belongs_to_that_model(
    make_world: Callable[..., Any], run: Callable[..., Path], tmp_path: Path
) -> None:
    other = make_world(seed=1).model.folder
    output = run(steps=1, lora_rank=2, init_from=str(other), learning_rate=1e-1)
    assert f"from `{other.name}` on cached inversions" in (output / "lora" / "README.md").read_text()
    file = export_single_file(output, tmp_path / "merged.safetensors", dtype="float32")
    merged, base = (
        load_file(file),
        load_file(export_single_file(other, tmp_path / "base.safetensors", dtype="float32")),
    )
    changed = {name for name in base if not torch.equal(merged[name], base[name])}
    assert changed
    assert all(".attn" in name for name in changed)


def test_layers_are_not_laid_over_other_weights(
    make_world: Callable[..., Any], run: Callable[..., Path], tmp_path: Path
) -> None:
    """A recipe's path may lead elsewhere from another folder. The layers alone say what they belong to."""
    world = make_world()
    folder = shutil.copytree(world.model.folder, tmp_path / "model")
    output = run(model=str(folder), steps=1, lora_rank=2)
    assert export_single_file(output, tmp_path / "merged.safetensors", dtype="float32").is_file()
    (file,) = (folder / "unet").glob("*.safetensors")
    weights = {name: 1.5 * value for name, value in load_file(file).items()}
    save_file(weights, file, metadata={"format": "pt"})
    shutil.rmtree(output / "checkpoints")
    with pytest.raises(ModelError, match="other weights"):
        export_single_file(output, tmp_path / "wrong.safetensors", dtype="float32")
    assert not (tmp_path / "wrong.safetensors").exists()


def test_the_moving_average_is_what_is_written(run: Callable[..., Path], tmp_path: Path) -> None:
    """Recomputed from the raw weights of every step; diffusers' decay is 0, then min(decay, (1 + n) / (10 + n))."""
    output = run(steps=4, learning_rate=1e-3, ema=0.15, save_every=1, keep_last=9, output=tmp_path / "averaged")
    shadow: dict[str, torch.Tensor] = {}
    for number, folder in enumerate(sorted((output / "checkpoints").iterdir())):
        raw = load_file(folder / "model.safetensors")
        decay = 0.0 if number == 0 else min(0.15, (1 + number) / (10 + number))
        shadow = {name: shadow.get(name, value) * decay + value * (1 - decay) for name, value in raw.items()}
    written = UNet2DConditionModel.from_pretrained(output / "pipeline", subfolder="unet").state_dict()
    assert all(torch.allclose(shadow[name], written[name], atol=1e-6) for name in written)
    assert not all(torch.allclose(raw[name], written[name], atol=1e-6) for name in written)


def test_other_optimisers_and_checkpointing(run: Callable[..., Path], tmp_path: Path) -> None:
    """Adafactor and gradient checkpointing run; checkpointing changes no number beyond rounding."""
    adafactor = run(steps=2, optimizer="adafactor", output=tmp_path / "adafactor")
    assert (adafactor / "pipeline").is_dir()
    plain = run(steps=2, output=tmp_path / "plain")
    saved = run(steps=2, gradient_checkpointing=True, output=tmp_path / "saved")
    losses = [
        [json.loads(line)["loss"] for line in (output / "metrics.jsonl").read_text().splitlines()]
        for output in (plain, saved)
    ]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-4)


def test_init_from_starts_elsewhere_and_says_so(
    make_world: Callable[..., Any], run: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    other = make_world(seed=1)
    output = run(steps=1, init_from=str(other.model.folder))
    text = capsys.readouterr().err
    assert "the zero-step proof does not apply" in text
    first = json.loads((output / "metrics.jsonl").read_text().splitlines()[0])
    assert abs(first["margin"]) > 1e-3


def test_samples_are_drawn_and_do_not_disturb_training(run: Callable[..., Path], tmp_path: Path) -> None:
    options = {"steps": 2, "learning_rate": 1e-3}
    plain = run(output=tmp_path / "plain", **options)
    sampled = run(
        output=tmp_path / "sampled", sample_every=1, sample_steps=2, sample_prompts=["a cat", "a dog"], **options
    )
    images = sorted((sampled / "samples").iterdir())
    # From before the first update on, so that there is something to compare with.
    assert [path.name for path in images] == [f"step-{step:08d}.png" for step in range(3)]
    start, last = (np.asarray(Image.open(path)) for path in (images[0], images[2]))
    assert (start != last).any()
    with Image.open(images[0]) as picture:
        assert picture.size == (32, 16)
        assert json.loads(picture.info["prompts"]) == ["a cat", "a dog"]
    left, right = (
        UNet2DConditionModel.from_pretrained(output / "pipeline", subfolder="unet").state_dict()
        for output in (plain, sampled)
    )
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_samples_are_of_the_caches_own_prompts_unless_others_are_named(run: Callable[..., Path], cache: str) -> None:
    output = run(steps=1, sample_every=1, sample_steps=1)
    texts = {str(text) for text in next(iter(open_cache(cache))).prompts()}
    with Image.open(output / "samples/step-00000001.png") as picture:
        assert picture.size == (16 * min(4, len(texts)), 16)


def test_samples_are_of_four_prompts_where_shards_and_caches_have_fewer(
    world: Any, run: Callable[..., Path], tmp_path: Path
) -> None:
    caches = [world.cache(tmp_path / name, shards=shards) for name, shards in (("a", (1, 1)), ("b", (1, 1, 3)))]
    output = run(steps=1, sample_every=1, sample_steps=1, caches=caches)
    with Image.open(output / "samples/step-00000001.png") as picture:
        assert json.loads(picture.info["prompts"]) == [f"prompt {number}" for number in range(4)]


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_sample_that_is_not_finite_is_black_and_told(
    run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], value: float
) -> None:
    def decoded(*arguments: Any, **options: Any) -> torch.Tensor:
        return torch.full_like(decode(*arguments, **options), value)

    decode = Decoder.forward
    monkeypatch.setattr(Decoder, "forward", decoded)
    output = run(steps=1, sample_every=1, sample_steps=1, sample_prompts=["a cat", "a dog"])
    told = capsys.readouterr().err
    for prompt in ("a cat", "a dog"):
        assert told.count(f"the sample of prompt '{prompt}' is not finite, and black") == 2
    assert not np.asarray(Image.open(output / "samples/step-00000001.png")).any()


def test_a_samples_vae_has_the_caches_dtype(world: Any, cache: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """float32 unless its configuration says that it need not be: in float16 some overflow."""
    seen: set[tuple[torch.dtype, torch.dtype]] = set()
    decode = Decoder.forward

    def watched(self: Any, latents: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
        decoded: torch.Tensor = decode(self, latents, *arguments, **options)
        seen.add((latents.dtype, decoded.dtype))
        return decoded

    monkeypatch.setattr(Decoder, "forward", watched)
    manifest, told = open_cache(cache).manifest, TrainSettings(sample_steps=1)
    for network_dtype, vae_dtype in (("float16", "float32"), ("bfloat16", "bfloat16"), ("float32", "float32")):
        as_told = manifest.model_copy(update={"network_dtype": network_dtype, "vae_dtype": vae_dtype})
        seen.clear()
        sample_images(world.model.load_network().eval(), world.model, ["a cat"], as_told, told)
        assert seen == {(getattr(torch, vae_dtype),) * 2}, network_dtype


def test_metrics_say_whether_it_learns(run: Callable[..., Path]) -> None:
    output = run(
        steps=12, log_every=6, evaluate_every=6, held_out=0.4, learning_rate=1e-4, tracker="tensorboard", batch_size=4
    )
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 6, 12]
    last = lines[-1]
    assert last["margin"] > 0.1
    assert last["implicit_accuracy"] > 0.6
    assert last["loss"] < 0.69
    assert last["margin"] == pytest.approx(1000 * (last["win_advantage"] - last["lose_advantage"]), rel=1e-3)
    assert last["gradient_norm"] > 0
    assert last["pairs_per_second"] > 0
    assert {"held_out_loss", "held_out_implicit_accuracy", "held_out_margin"} <= last.keys()
    assert sum(part["records"] for part in last["by_timestep"]) == 24
    weighted = sum(part["loss"] * part["records"] for part in last["by_timestep"]) / 24
    assert weighted == pytest.approx(last["loss"], rel=1e-6)
    board = EventAccumulator(str(output / "tensorboard"))
    board.Reload()
    assert [event.step for event in board.Scalars("loss")] == [0, 6, 12]
