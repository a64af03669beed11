"""A trained flow gives its noise back at time 1 and minus its latent at time 0: one call tells sign and time."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import SD3Transformer2DModel
from safetensors.torch import load_file, save_file

from inpo.common.errors import ModelError
from inpo.common.families import FAMILIES
from inpo.common.models import open_model
from inpo.common.testing import save_tiny_pipeline

SD3 = FAMILIES["sd3"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline whose transformer does what a trained one does for smooth latents: gives its input back at time 1,
    minus its input at time 0, and in the middle minus what is smooth in it and plus what is not. The weights are set,
    not learned: every block gives 0, and the last normalisation's scales are made from a slow sine of t."""
    folder = save_tiny_pipeline(tmp_path_factory.mktemp("trained") / "sd3", "sd3")
    network = SD3Transformer2DModel.from_pretrained(folder / "transformer").requires_grad_(False)
    for module in (network.transformer_blocks, network.time_text_embed, network.norm_out, network.context_embedder):
        for parameter in module.parameters():
            parameter.zero_()
    network.pos_embed.pos_embed.zero_()
    # Of a patch of 2 x 2, each of 16 channels, the transformer's width of 32 holds the mean and the slope.
    patch, half = network.pos_embed.proj, 16
    shapes = torch.tensor([[0.5, 0.5, 0.5, 0.5], [0.5, -0.5, 0.5, -0.5]])
    basis = torch.cat([torch.kron(torch.eye(16), shape[None]) for shape in shapes]).T  # [channel row column, width]
    patch.weight.copy_(basis.T.reshape(patch.weight.shape))
    patch.bias.zero_()
    # Back to pixels: proj_out orders a patch as (row, column, channel), the convolution as (channel, row, column).
    order = torch.arange(64).reshape(16, 2, 2).permute(1, 2, 0).flatten()
    network.proj_out.weight.copy_(basis[order])
    network.proj_out.bias.zero_()
    # time_proj gives cosines then sines of t * 10000^(-i/128): that of the frequency nearest 2 / 1000 is slow.
    angles = torch.arange(128) / 128 * torch.log(torch.tensor(10000.0))
    index = int((torch.exp(-angles) - 0.0015).abs().argmin())
    rate = float(torch.exp(-angles[index]))
    middle, end = (float(torch.sin(torch.tensor(t * rate))) for t in (500.0, 1000.0))
    # SiLU is the identity far above 0, and of something steep a kink: sine - middle, where that is above 0.
    embedder, scale, far, steep = network.time_text_embed.timestep_embedder, network.norm_out.linear, 20.0, 200.0
    embedder.linear_1.weight[0, 128 + index] = 1.0  # flip_sin_to_cos: cosines first
    embedder.linear_1.bias[0] = far
    embedder.linear_2.weight[:2, 0] = torch.tensor([1.0, steep])
    embedder.linear_2.bias[1] = -steep * (far + middle)
    # 1 + scale: the smooth half stays at -1 up to the middle and then rises to 1, the other half is at 1 from there.
    scale.weight[:half, 1] = 2 / steep / (end - middle)
    scale.bias[:half] = -2
    scale.weight[half : 2 * half, 0] = 2 / middle
    scale.weight[half : 2 * half, 1] = -2 / middle / steep
    scale.bias[half : 2 * half] = -2 - 2 * far / middle
    network.save_pretrained(folder / "transformer")
    return folder


def load(folder: Path) -> Any:
    return open_model(str(folder)).load_network()


def test_a_trained_flow_is_taken_in_silence(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    load(trained)
    assert "noise - x0" not in capsys.readouterr().err


def test_weights_of_another_sign_are_refused(trained: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(trained, tmp_path / "flipped")
    (file,) = (folder / "transformer").glob("*.safetensors")
    weights = load_file(file)
    weights["proj_out.weight"] *= -1
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match="noise - x0") as caught:
        load(folder)
    assert str(folder) in str(caught.value)


CALL = type(SD3).call
WRONG: dict[str, Callable[..., Any]] = {
    "sign": lambda *given: -CALL(*given),
    "time reversed": lambda family, network, x, label, told: CALL(family, network, x, 1000 - label, told),
    "time unscaled": lambda family, network, x, label, told: CALL(family, network, x, label / 1000, told),
    "sign and time": lambda family, network, x, label, told: -CALL(family, network, x, 1000 - label, told),
}


@pytest.mark.parametrize("how", WRONG)
def test_a_family_that_calls_its_network_wrongly_is_refused(
    trained: Path, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(SD3), "call", WRONG[how])
    with pytest.raises(ModelError, match="noise - x0"):
        load(trained)


def test_weights_that_show_nothing_are_noted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = save_tiny_pipeline(tmp_path / "random", "sd3")
    load(folder)
    load(folder)
    assert capsys.readouterr().err.count("does not give noise - x0") == 1


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    folder = save_tiny_pipeline(tmp_path / "broken", "sd3")
    (file,) = (folder / "transformer").glob("*.safetensors")
    weights = load_file(file)
    weights["proj_out.bias"][0] = torch.nan
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match="not finite"):
        load(folder)
