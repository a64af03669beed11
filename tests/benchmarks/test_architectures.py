"""The architectures that are measured are those that people use: counted by their parameters, nothing allocated."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks import architectures

UNET, VAE = 859_520_964, 83_653_863
"""Parameters of Stable Diffusion 1.5's published UNet and VAE; the next one is SDXL's UNet."""
SDXL_UNET = 2_567_463_684


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What a pipeline is built of, on the meta device, once an architecture has been built."""
    built: dict[str, Any] = {}

    def on_meta(kind: Callable[..., Any]) -> Callable[..., Any]:
        def make(*args: Any, **options: Any) -> Any:
            with torch.device("meta"):
                return kind(*args, **options)

        return make

    for name in ("UNet2DConditionModel", "AutoencoderKL", "CLIPTextModel", "CLIPTextModelWithProjection"):
        monkeypatch.setattr(architectures, name, on_meta(getattr(architectures, name)))
    for name in ("StableDiffusionPipeline", "StableDiffusionXLPipeline"):
        monkeypatch.setattr(architectures, name, lambda **components: built.update(components))
    return built


def _size(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_the_full_sizes_are_the_published_ones(parts: dict[str, Any]) -> None:
    architectures._sd15(width=1)
    assert (_size(parts["unet"]), _size(parts["vae"])) == (UNET, VAE)
    architectures._sdxl()
    assert (_size(parts["unet"]), _size(parts["vae"])) == (SDXL_UNET, VAE)


def test_the_narrow_one_is_a_sixteenth(parts: dict[str, Any]) -> None:
    architectures._sd15(width=4)
    assert UNET / 17 < _size(parts["unet"]) < UNET / 15
