"""LoRA weights laid over a model: all of them, or none, and the folder of images is of them."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from inpo.common.errors import ModelError, UsageError
from inpo.common.models import open_model
from inpo.common.trained_over import write_over
from tests.evaluation.drawing import PROMPTS, make, pixels, same


def test_lora_weights_change_the_image_and_the_identity(tiny_model: Path, tmp_path: Path) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_model, safety_checker=None)
    config = LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights="gaussian")
    pipeline.unet.add_adapter(config)
    for name, weight in pipeline.unet.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=2.0, generator=torch.Generator().manual_seed(0))
    StableDiffusionPipeline.save_lora_weights(tmp_path / "lora", get_peft_model_state_dict(pipeline.unet))
    make(tiny_model, tmp_path / "plain")
    make(tiny_model, tmp_path / "lora-out", lora=str(tmp_path / "lora"))
    plain, changed = pixels(tmp_path / "plain"), pixels(tmp_path / "lora-out")
    assert plain.keys() == changed.keys()
    assert not same(plain, changed)
    with pytest.raises(UsageError, match="lora"):
        make(tiny_model, tmp_path / "plain", lora=str(tmp_path / "lora"))
    # The same tensors are another LoRA where the header says another alpha, and the same one under another title.
    state = load_file(tmp_path / "lora" / "pytorch_lora_weights.safetensors")
    strong, named = tmp_path / "strong.safetensors", tmp_path / "named.safetensors"
    adapter = {"unet.r": 2, "unet.lora_alpha": 40, "unet.target_modules": ["to_q", "to_v"]}
    save_file(state, strong, {"lora_adapter_metadata": json.dumps(adapter)})
    save_file(state, named, {"modelspec.title": "mine"})
    make(tiny_model, tmp_path / "strong-out", lora=str(strong))
    assert not same(changed, pixels(tmp_path / "strong-out"))
    with pytest.raises(UsageError, match="lora"):
        make(tiny_model, tmp_path / "lora-out", lora=str(strong))
    assert make(tiny_model, tmp_path / "lora-out", lora=str(named)).num_new == 0


def test_bad_lora_weights_are_named(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no LoRA weights here"):
        make(tiny_model, tmp_path / "out", lora=str(tmp_path / "none.safetensors"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match="got:      a folder without one"):
        make(tiny_model, tmp_path / "out", lora=str(tmp_path / "empty"))
    (tmp_path / "bad.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(ModelError, match="damaged"):
        make(tiny_model, tmp_path / "out", lora=str(tmp_path / "bad.safetensors"))
    save_file({"unet.conv_in.lora_A.weight": torch.zeros(2, 3)}, tmp_path / "other.safetensors")
    with pytest.raises(ModelError, match="do not fit"):
        make(tiny_model, tmp_path / "out", lora=str(tmp_path / "other.safetensors"))
    # None of it claimed the folder for settings that gave no image.
    assert make(tiny_model, tmp_path / "out", PROMPTS[:1]).num_new == 1


@pytest.fixture(scope="module")
def lora(tiny_model: Path) -> dict[str, torch.Tensor]:
    """LoRA weights of the tiny model, as diffusers saves them."""
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_model, safety_checker=None)
    pipeline.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"]))
    return {f"unet.{name}": weight for name, weight in get_peft_model_state_dict(pipeline.unet).items()}


def of_no_network_here(lora: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.replace("unet.", "transformer."): weight for name, weight in lora.items()}


def of_a_deeper_model(lora: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    deeper = {name.replace("transformer_blocks.0", "transformer_blocks.7"): w.clone() for name, w in lora.items()}
    return lora | deeper


def with_one_matrix_less(lora: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: weight for name, weight in lora.items() if name != next(n for n in lora if "lora_B" in n)}


def of_a_wider_model(lora: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: torch.zeros(w.shape[0] + 8 * ("lora_B" in name), w.shape[1]) for name, w in lora.items()}


def with_a_magnitude(lora: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """DoRA, whose magnitudes diffusers filters out with a warning."""
    layer = next(iter(lora)).split(".lora_")[0]
    return lora | {f"{layer}.dora_scale": torch.ones(8, 1)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (with_a_magnitude, r"leaves 1 of its tensors out, the first: unet\.\S*\.dora_scale"),
        (of_no_network_here, "takes 0; the first of the others: transformer"),
        (of_a_deeper_model, r"the first of the others: unet\.\S*transformer_blocks\.7"),
        (with_one_matrix_less, r"the first of the others: unet\.\S*lora_B"),
        (of_a_wider_model, "size mismatch for"),
    ],
)
def test_lora_weights_fit_whole_or_not_at_all(
    tiny_model: Path, lora: dict[str, torch.Tensor], tmp_path: Path, change: Callable, message: str
) -> None:
    save_file(change(lora), tmp_path / "lora.safetensors")
    with pytest.raises(ModelError, match=message):
        make(tiny_model, tmp_path / "out", PROMPTS[:1], lora=str(tmp_path / "lora.safetensors"))
    assert not (tmp_path / "out").exists()


def test_weights_in_another_projects_names_are_laid_over_too(
    tiny_model: Path, lora: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    kohya = {}
    for name, weight in lora.items():
        module, kind = name.removeprefix("unet.").rsplit(".lora_", 1)
        kind = {"A.weight": "lora_down.weight", "B.weight": "lora_up.weight"}[kind]
        strong = torch.full_like(weight, 0.7) if "up" in kind else weight
        kohya[f"lora_unet_{module.replace('.', '_')}.{kind}"] = strong
        kohya[f"lora_unet_{module.replace('.', '_')}.alpha"] = torch.tensor(2.0)
    save_file(kohya, tmp_path / "kohya.safetensors")
    make(tiny_model, tmp_path / "plain", PROMPTS[:1])
    make(tiny_model, tmp_path / "out", PROMPTS[:1], lora=str(tmp_path / "kohya.safetensors"))
    assert not same(pixels(tmp_path / "plain"), pixels(tmp_path / "out"))
    save_file(
        kohya | {f"lora_unet_{module.replace('.', '_')}.dora_scale": torch.ones(8, 1)}, tmp_path / "dora.safetensors"
    )
    with pytest.raises(ModelError, match=r"leaves 1 of its tensors out, the first: lora_unet\S*\.dora_scale"):
        make(tiny_model, tmp_path / "dora", PROMPTS[:1], lora=str(tmp_path / "dora.safetensors"))


def test_layers_over_another_network_than_they_were_trained_over_are_told(
    tiny_model: Path,
    other_model: Path,
    lora: dict[str, torch.Tensor],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    save_file(lora, tmp_path / "lora.safetensors")
    write_over(tmp_path, open_model(str(tiny_model)))
    words = f"note: the LoRA layers in {tmp_path} were trained over another network than that of "
    make(tiny_model, tmp_path / "same", PROMPTS[:1], lora=str(tmp_path / "lora.safetensors"))
    assert words not in capsys.readouterr().err
    make(other_model, tmp_path / "other", PROMPTS[:1], lora=str(tmp_path / "lora.safetensors"))
    assert f"{words}{other_model}" in capsys.readouterr().err
    (tmp_path / "trained-over.json").write_text("{")
    with pytest.raises(ModelError, match=r"cannot be read[\s\S]*trained-over\.json"):
        make(tiny_model, tmp_path / "out", PROMPTS[:1], lora=str(tmp_path / "lora.safetensors"))
