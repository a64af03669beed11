"""From prepared images and prompts to what the network takes.

levels uint8 --> pixels [-1, 1] --VAE--> latent --scale--> x0 float16
prompts --text encoders--> embeddings float16
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from jaxtyping import Bool, Float, Float16, UInt8
from torch import Tensor

from inpo.common.denoiser import DTYPES
from inpo.common.families import Family
from inpo.common.seeding import normal

_IMAGES_PER_VAE_CALL = 16
_PROMPTS_PER_TEXT_CALL = 64


def pixels_from_levels(levels: UInt8[Tensor, "*batch 3 h w"]) -> Float[Tensor, "*batch 3 h w"]:
    """8-bit levels to what a VAE takes: float32 in [-1, 1]."""
    return levels.to(torch.float32) / 127.5 - 1.0


@dataclass(frozen=True, kw_only=True, eq=False)
class PromptTable:
    """Distinct prompts of a shard, row 0 the empty one, as float16 on the CPU."""

    text: tuple[str, ...]
    conditions: Mapping[str, Tensor]
    """What the network is told of each prompt, by name."""
    cut: frozenset[str]
    """Prompts longer than the encoder takes: the model saw only their beginning."""

    def row(self, prompt: str) -> int:
        return self.text.index(prompt)

    @property
    def finite(self) -> Bool[Tensor, "prompt"]:
        """False where the text encoder gave NaN or infinity."""
        return torch.stack([each.isfinite().flatten(1).all(1) for each in self.conditions.values()]).all(0)

    def only(self, prompts: Collection[str]) -> "PromptTable":
        """The table without the prompts that no pair needs; the empty one stays row 0."""
        rows = [row for row, text in enumerate(self.text) if row == 0 or text in prompts]
        return PromptTable(
            text=tuple(self.text[row] for row in rows),
            conditions={name: tensor[rows] for name, tensor in self.conditions.items()},
            cut=self.cut,
        )


class ImageEncoder:
    """The VAE's encoder: 8-bit images to scaled latents rounded to float16.

    Mean of the posterior, or a sample whose noise hangs on (seed, pair id, side) alone.
    """

    def __init__(self, vae: AutoencoderKL, *, vae_dtype: str, sample: bool, seed: int, device: torch.device) -> None:
        self.vae = vae.requires_grad_(False).eval().to(device)
        self.vae_dtype = DTYPES[vae_dtype]
        self.sample = sample
        self.seed = seed
        self.device = device

    @torch.inference_mode()
    def __call__(
        self, images: Sequence[UInt8[Tensor, "side 3 h w"]], pair_ids: Sequence[str]
    ) -> Float16[Tensor, "pair side c lh lw"]:
        """One entry per pair; not finite where the VAE overflows, for the caller to quarantine."""
        flat = [(image, pair_id, side) for image, pair_id in zip(images, pair_ids, strict=True) for side in range(2)]
        latents: list[Tensor] = []
        for first in range(0, len(flat), _IMAGES_PER_VAE_CALL):
            chunk = flat[first : first + _IMAGES_PER_VAE_CALL]
            batch = pixels_from_levels(torch.stack([image[side] for image, _, side in chunk]).to(self.device))
            with (
                torch.autocast(self.device.type, dtype=self.vae_dtype, enabled=self.vae_dtype != torch.float32),
                # TF32 convolutions round as float16 does, to which the latents are rounded anyway, and cost a fraction.
                torch.backends.cudnn.flags(enabled=True, allow_tf32=True),
            ):
                posterior = self.vae.encode(batch).latent_dist
            mean = posterior.mean.float()
            if self.sample:
                noise = torch.stack(
                    [normal(tuple(mean.shape[1:]), self.seed, pair_id, "vae", side) for _, pair_id, side in chunk]
                )
                mean = mean + posterior.std.float() * noise.to(self.device)
            shift = getattr(self.vae.config, "shift_factor", None) or 0.0
            latents.append(((mean - shift) * self.vae.config.scaling_factor).half())
        return torch.cat(latents).unflatten(0, (len(pair_ids), 2))


class TextEncoder:
    """A family's own prompt encoding, once per distinct prompt."""

    def __init__(self, pipeline: DiffusionPipeline, family: Family, *, device: torch.device) -> None:
        self.pipeline = pipeline.to(device)
        self.family = family
        self.device = device

    @torch.inference_mode()
    def __call__(self, prompts: Sequence[str]) -> PromptTable:
        """Encode the distinct prompts among `prompts`, sorted, behind the empty one."""
        text = ("", *sorted(set(prompts) - {""}))
        parts: list[dict[str, Tensor]] = []
        for first in range(0, len(text), _PROMPTS_PER_TEXT_CALL):
            encoded = self.family.encode(self.pipeline, text[first : first + _PROMPTS_PER_TEXT_CALL], self.device)
            dtypes = {name: getattr(torch, self.family.conditions[name].dtype) for name in encoded}
            parts.append({name: tensor.to(dtypes[name]).cpu() for name, tensor in encoded.items()})
        conditions = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        cut = frozenset(prompt for prompt in text if self.family.is_cut(self.pipeline, prompt))
        return PromptTable(text=text, conditions=conditions, cut=cut)
