"""Latents as pictures: through the VAE, or fast and without a model through a linear map to RGB."""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, UInt8

from inpo.common.cache import Cache
from inpo.common.errors import CacheMismatch, InpoError
from inpo.common.models import Model

_SAMPLE_PAIRS = 64
_LATENTS_PER_VAE_CALL = 8

# One row per channel, columns red, green, blue; output 0..1 after `bias`. For latents scaled by the VAE factor.
# SD1.x: "Decoding latents to RGB without upscaling", discuss.huggingface.co (output -1..1 there, halved here).
_SD_WEIGHT = (
    np.array([[0.298, 0.207, 0.208], [0.187, 0.286, 0.173], [-0.158, 0.189, 0.264], [-0.184, -0.271, -0.473]]) / 2
)
_SD_BIAS = np.full(3, 0.5)
# SDXL: "Explaining the SDXL latent space", huggingface.co/blog (output 0..255 there).
_SDXL_WEIGHT = np.array([[60, 60, 60], [-60, -5, 10], [25, 15, -5], [-70, -50, -35]]) / 255
_SDXL_BIAS = np.array([150, 140, 130]) / 255


@runtime_checkable
class Preview(Protocol):
    """Turns latents into RGB. `note` says how, in words for the sheet."""

    note: str

    def __call__(self, latents: Float[np.ndarray, "n c h w"]) -> UInt8[np.ndarray, "n height width 3"]: ...


@dataclass(frozen=True, kw_only=True, eq=False)
class LinearPreview:
    """rgb = latent @ weight + bias, one pixel per latent position."""

    weight: Float[np.ndarray, "c 3"]
    bias: Float[np.ndarray, "3"]
    note: str

    def __call__(self, latents: Float[np.ndarray, "n c h w"]) -> UInt8[np.ndarray, "n height width 3"]:
        rgb = np.einsum("nchw,cd->nhwd", np.asarray(latents, np.float64), self.weight) + self.bias
        return (rgb.clip(0, 1) * 255).round().astype(np.uint8)


@dataclass(frozen=True, kw_only=True, eq=False)
class VaePreview:
    """Decoded by the model's VAE, in float32."""

    vae: torch.nn.Module
    note: str

    @torch.inference_mode()
    def __call__(self, latents: Float[np.ndarray, "n c h w"]) -> UInt8[np.ndarray, "n height width 3"]:
        parameter = next(self.vae.parameters())
        config = self.vae.config
        scaled = torch.from_numpy(np.asarray(latents, np.float32)) / config.scaling_factor
        scaled = scaled + (getattr(config, "shift_factor", None) or 0.0)
        parts = [
            self.vae.decode(part.to(parameter.device)).sample.float().cpu()
            for part in scaled.split(_LATENTS_PER_VAE_CALL)
        ]
        levels = ((torch.cat(parts) + 1) / 2).clamp(0, 1) * 255
        return levels.round().to(torch.uint8).permute(0, 2, 3, 1).numpy()


def linear_preview(cache: Cache) -> LinearPreview:
    """The known map of Stable Diffusion's VAEs where the latents are theirs by shape, or one fitted to this cache."""
    manifest = cache.manifest
    channels, height, _ = manifest.latent_shape
    if channels == 4 and manifest.resolution == 8 * height:
        if "pooled" in manifest.conditions:
            return LinearPreview(
                weight=_SDXL_WEIGHT, bias=_SDXL_BIAS, note="latents through a linear approximation of SDXL's VAE"
            )
        return LinearPreview(
            weight=_SD_WEIGHT, bias=_SD_BIAS, note="latents through a linear approximation of SD's VAE"
        )
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
        weight=weight, bias=0.5 - mean @ weight, note="latents in false colours (principal components of x₀)"
    )


def _sample_x0(cache: Cache) -> Float[np.ndarray, "n c h w"]:
    for shard in cache:
        try:
            return shard.read("x0", slice(0, _SAMPLE_PAIRS)).reshape(-1, *cache.manifest.latent_shape)
        except InpoError:  # a damaged shard must not hide the others; who shows its pairs reports it
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
    return VaePreview(vae=model.load_vae().requires_grad_(False).eval().to(device), note="latents decoded by the VAE")
