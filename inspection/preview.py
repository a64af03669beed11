"""Latents as pictures: through the VAE, or fast and without a model through a linear map to RGB."""

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, UInt8

from inpo.common.cache import Cache
from inpo.common.errors import CacheMismatch, InpoError
from inpo.common.families import FAMILIES, Family
from inpo.common.models import Model

_SAMPLE_IMAGES = 128
_LATENTS_PER_VAE_CALL = 8


@runtime_checkable
class Preview(Protocol):
    """Turns latents into RGB. `note` says how, in words for the sheet."""

    @property
    def note(self) -> str: ...

    def __call__(self, latents: Float[np.ndarray, "n c h w"]) -> UInt8[np.ndarray, "n height width 3"]: ...


@dataclass(frozen=True, kw_only=True, eq=False)
class LinearPreview:
    """rgb = latent @ weight + bias, one pixel per latent position."""

    weight: Float[np.ndarray, "c 3"]
    bias: Float[np.ndarray, " 3"]
    note: str

    def __call__(self, latents: Float[np.ndarray, "n c h w"]) -> UInt8[np.ndarray, "n height width 3"]:
        rgb = np.einsum("nchw,cd->nhwd", np.asarray(latents, np.float64), self.weight) + self.bias
        return (rgb.clip(0, 1) * 255).round().astype(np.uint8)


@dataclass(frozen=True, kw_only=True, eq=False)
class VaePreview:
    """Decoded by the model's VAE, in float32."""

    vae: Any
    family: Family
    note: str

    @torch.inference_mode()
    def __call__(self, latents: Float[np.ndarray, "n c h w"]) -> UInt8[np.ndarray, "n height width 3"]:
        parameter = next(self.vae.parameters())
        shift, factor = self.family.vae_scale(self.vae)
        parts = [
            self.family.decoded(self.vae, part.to(parameter.device) / factor + shift).float().cpu()
            for part in torch.from_numpy(np.asarray(latents, np.float32)).split(_LATENTS_PER_VAE_CALL)
        ]
        levels = ((torch.cat(parts) + 1) / 2).clamp(0, 1) * 255
        return levels.round().to(torch.uint8).permute(0, 2, 3, 1).numpy()


def linear_preview(cache: Cache) -> LinearPreview:
    """The known map of the family's VAE where the latents are its by shape, or one fitted to this cache."""
    manifest = cache.manifest
    channels, height, width = manifest.latent_shape
    colours = FAMILIES[manifest.family].latent_colours if manifest.family in FAMILIES else None
    if colours is not None and channels == len(colours[0]) and manifest.resolution == (8 * height, 8 * width):
        weight, bias = map(np.array, colours)
        return LinearPreview(weight=weight, bias=bias, note="latents through a linear approximation of the VAE")
    return fitted_preview(_sample_x0(cache))


def fitted_preview(x0: Float[np.ndarray, "n c h w"]) -> LinearPreview:
    """False colours from the latents alone: the first principal component as light, the next two as colour.

    Components are scaled to their standard deviation; signs are fixed so that equal data give equal colours.
    """
    points = np.moveaxis(np.asarray(x0, np.float64), 1, -1).reshape(-1, x0.shape[1])
    mean = points.mean(0)
    values, vectors = np.linalg.eigh(np.cov(points - mean, rowvar=False).reshape(x0.shape[1], x0.shape[1]))
    order = np.argsort(values)[::-1][:3]
    scaled = vectors[:, order] / np.sqrt(np.maximum(values[order], 1e-12))
    scaled = scaled * np.sign(scaled[np.abs(scaled).argmax(0), np.arange(scaled.shape[1])])
    # Rows: light, blue-yellow, red-green (the standard YCbCr matrix), at a contrast that puts two deviations in range.
    to_rgb = np.array([[0.22, 0.22, 0.22], [0.0, -0.045, 0.24], [0.19, -0.10, 0.0]])[: scaled.shape[1]]
    weight = scaled @ to_rgb
    return LinearPreview(
        weight=weight, bias=0.5 - mean @ weight, note="latents in false colours (principal components of x0)"
    )


def _sample_x0(cache: Cache) -> Float[np.ndarray, "n c h w"]:
    for shard in cache:
        try:
            return shard.read("x0", slice(0, _SAMPLE_IMAGES))
        except InpoError:  # an unreadable shard must not hide the others; who shows its pairs reports it
            continue
    channels = cache.manifest.latent_shape[0]
    return np.random.default_rng(0).standard_normal((2, channels, 8, 8))


def vae_preview(cache: Cache, model: Model) -> VaePreview:
    """Through the VAE of `model`, which must be the cache's. Raises CacheMismatch, showing both fingerprints."""
    expected, got = cache.manifest.fingerprints.get("vae"), model.fingerprints.get("vae")
    if expected != got:
        raise CacheMismatch(
            "The model's VAE is not the one that this cache was made with.",
            where=cache.location,
            expected=f"VAE fingerprint {expected}",
            got=f"{got} ({model.name})",
            fix="pass the model that the cache was precomputed with, or leave --model out",
        )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    vae = model.load_vae().requires_grad_(False).eval().to(device)
    return VaePreview(vae=vae, family=model.family, note="latents decoded by the VAE")
