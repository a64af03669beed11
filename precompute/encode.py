"""From prepared images and prompts to what the network takes.

levels uint8 --> pixels [-1, 1] --VAE--> latent --scale--> x0 float16
prompts --text encoders--> embeddings float16
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from jaxtyping import Float, Float16, Shaped, UInt8
from torch import Tensor

from inpo.common.batch_size import fits
from inpo.common.denoiser import DTYPES
from inpo.common.families import Family
from inpo.common.log import note
from inpo.common.seeding import normal

PROMPTS_PER_TEXT_CALL = 64
_PIXELS_PER_VAE_CALL = 16 * 512 * 512
_MOST_PER_VAE_CALL = 16


def images_per_vae_call(height: int, width: int) -> int:
    """Images of this size that the VAE encodes together: 16, of large ones as many as have as many pixels."""
    return max(1, min(_MOST_PER_VAE_CALL, _PIXELS_PER_VAE_CALL // (height * width)))


def pixels_from_levels(levels: UInt8[Tensor, "*batch 3 h w"]) -> Float[Tensor, "*batch 3 h w"]:
    """8-bit levels to what a VAE takes: float32 in [-1, 1]."""
    return levels.to(torch.float32) / 127.5 - 1.0


class ImageEncoder:
    """The VAE's encoder: 8-bit images to scaled latents rounded to float16.

    Mean of the posterior, or a sample whose noise hangs on (seed, image id) alone.
    """

    def __init__(
        self, vae: Any, family: Family, *, vae_dtype: str, sample: bool, seed: int, device: torch.device
    ) -> None:
        self.vae = vae.requires_grad_(False).eval().to(device)
        self.family = family
        self.vae_dtype = DTYPES[vae_dtype]
        self.sample = sample
        self.seed = seed
        self.device = device
        self._together: int | None = None
        """Images that fit, where it was found that not as many fit as were tried."""

    @torch.inference_mode()
    def __call__(
        self, images: Sequence[UInt8[np.ndarray, "3 h w"]], ids: Sequence[str]
    ) -> Float16[Tensor, "image c lh lw"]:
        """Not finite where the VAE overflows, for the caller to quarantine. Where memory is short, fewer go together;
        raises what torch raises where one alone does not fit."""
        latents: list[Tensor] = []
        together = self._together or images_per_vae_call(*images[0].shape[-2:])
        first = 0
        while first < len(images):
            chunk = slice(first, first + together)
            encode = partial(self._encode, images[chunk], ids[chunk])
            if together == 1:
                latents.append(encode())
            elif not fits(lambda encode=encode: latents.append(encode())):  # type: ignore[misc]
                self._together = together = max(1, len(images[chunk]) // 2)
                note(f"the VAE takes {together} images at a time: there is no memory for more")
                continue
            first += together
        return torch.cat(latents)

    def _encode(
        self, images: Sequence[UInt8[np.ndarray, "3 h w"]], ids: Sequence[str]
    ) -> Float16[Tensor, "image c lh lw"]:
        shift, factor = self.family.vae_scale(self.vae)
        batch = pixels_from_levels(torch.from_numpy(np.stack(images)).to(self.device))
        with (
            torch.autocast(self.device.type, dtype=self.vae_dtype, enabled=self.vae_dtype != torch.float32),
            # TF32 convolutions round as float16 does, to which the latents are rounded anyway, and cost a fraction.
            torch.backends.cudnn.flags(enabled=True, allow_tf32=True),
        ):
            mean, deviation = self.family.posterior(self.vae, batch)
        mean = mean.float()
        if self.sample:
            noise = torch.stack([normal(tuple(mean.shape[1:]), self.seed, each, "vae") for each in ids])
            mean = mean + deviation.float() * noise.to(self.device)
        latents: Tensor = (mean - shift) * factor
        return latents.half()


class TextEncoder:
    """A family's own prompt encoding."""

    def __init__(
        self, pipeline: DiffusionPipeline, family: Family, *, device: torch.device, max_tokens: int | None = None
    ) -> None:
        self.pipeline = pipeline.to(device)
        self.family = family
        self.device = device
        self.max_tokens = max_tokens

    @torch.inference_mode()
    def __call__(self, prompts: Sequence[str]) -> dict[str, Shaped[Tensor, "prompt ..."]]:
        """{condition: rows} of what prompts own, in the conditions' dtypes, on the CPU."""
        parts: list[dict[str, Tensor]] = []
        for first in range(0, len(prompts), PROMPTS_PER_TEXT_CALL):
            chunk = prompts[first : first + PROMPTS_PER_TEXT_CALL]
            encoded = self.family.encode(self.pipeline, chunk, self.device, self.max_tokens)
            dtypes = {name: getattr(torch, self.family.conditions[name].dtype) for name in encoded}
            parts.append({name: tensor.to(dtypes[name]).cpu() for name, tensor in encoded.items()})
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def is_cut(self, prompt: str) -> bool:
        """Whether the model sees only the beginning of a prompt."""
        return self.family.is_cut(self.pipeline, prompt, self.max_tokens)
