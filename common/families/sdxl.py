"""SDXL: a UNet under the states of two text encoders, a pooled one, and the image's sizes."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionXLControlNetPipeline, StableDiffusionXLInpaintPipeline, StableDiffusionXLPipeline
from torch import Tensor

from inpo.common.cache.schema import ConditionSpec
from inpo.common.errors import ModelError
from inpo.common.families.base import EMBEDDING, POOLED, Config, State
from inpo.common.families.lora import Original
from inpo.common.families.original_layout import clip_keys, component_keys, open_clip_keys, unet_layer
from inpo.common.families.sd import UNetFamily


class StableDiffusionXL(UNetFamily):
    """SDXL."""

    name = "sdxl"
    title = "SDXL"
    tag = "stable-diffusion-xl"
    pipelines = ("StableDiffusionXLPipeline", "StableDiffusionXLImg2ImgPipeline")
    pipeline = StableDiffusionXLPipeline
    controlled = StableDiffusionXLControlNetPipeline
    inpainted = StableDiffusionXLInpaintPipeline
    unneeded = {"image_encoder": None, "feature_extractor": None}
    addition = "text_time"
    text_encoders = ("text_encoder", "text_encoder_2")
    tokenizers = ("tokenizer", "tokenizer_2")
    conditions = {
        "embedding": EMBEDDING,
        "pooled": POOLED,
        "time_ids": ConditionSpec(dtype="float32", axes=("time_id",), per="image"),
    }
    # "Explaining the SDXL latent space", huggingface.co/blog (output 0..255 there).
    latent_colours = (
        [[each / 255 for each in row] for row in ([60, 60, 60], [-60, -5, 10], [25, 15, -5], [-70, -50, -35])],
        [150 / 255, 140 / 255, 130 / 255],
    )

    def vae_scale(self, vae: Any) -> tuple[Any, Any]:
        """Some VAEs have a mean and a deviation of each channel; SDXL's pipelines undo them, as no older one does."""
        statistics = [getattr(vae.config, name, None) for name in ("latents_mean", "latents_std")]
        if None in statistics:
            return super().vae_scale(vae)
        mean, deviation = (torch.tensor(each, device=vae.device)[:, None, None] for each in statistics)
        return mean, vae.config.scaling_factor / deviation

    def check(self, *, name: str, folder: Path, index: Config, config: Callable[[str], Config]) -> None:
        super().check(name=name, folder=folder, index=index, config=config)
        unet, (pooled,) = config("unet"), self.lengths(config)["pooled"]
        fix = f"supported: {self.title}; refiners, which take an aesthetic score, are not"
        if index.get("requires_aesthetics_score"):
            raise ModelError(
                "The UNet is conditioned on an aesthetic score.",
                where=f"{name}: model_index.json, requires_aesthetics_score",
                expected="false",
                got="true",
                fix=fix,
            )
        expected = pooled + 6 * int(unet.get("addition_time_embed_dim") or 0)
        if unet.get("projection_class_embeddings_input_dim") != expected:
            raise ModelError(
                "The UNet's added conditions are not the pooled state and six sizes.",
                where=f"{name}: unet/config.json, projection_class_embeddings_input_dim",
                expected=expected,
                got=unet.get("projection_class_embeddings_input_dim"),
                fix=fix,
            )

    def lengths(self, config: Callable[[str], Config], max_tokens: int | None = None) -> dict[str, tuple[int, ...]]:
        pooled = int(config("text_encoder_2").get("projection_dim", 512))  # transformers' default
        return super().lengths(config) | {"pooled": (pooled,), "time_ids": (6,)}

    def encode(
        self, pipeline: Any, prompts: Sequence[str], device: torch.device, max_tokens: int | None = None
    ) -> dict[str, Tensor]:
        encoded = self.encoded(pipeline, prompts, device)
        conditions = {"embedding": encoded[0], "pooled": encoded[2]}
        if getattr(pipeline.config, "force_zeros_for_empty_prompt", False):
            empty = torch.tensor([prompt == "" for prompt in prompts], device=device)
            for tensor in conditions.values():
                tensor[empty] = 0
        return conditions

    def of_image(
        self, original: tuple[int, int], crop: tuple[int, int], target: tuple[int, int]
    ) -> dict[str, tuple[float, ...]]:
        """Micro-conditioning: original size, crop corner, target size."""
        return {"time_ids": tuple(float(each) for each in (*original, *crop, *target))}

    def layout(self, component: str, state: State, config: Any) -> dict[str, Tensor]:
        if component == "text_encoder":
            return clip_keys(state, "conditioner.embedders.0.")
        if component == "text_encoder_2":
            return open_clip_keys(state, "conditioner.embedders.1.")
        return component_keys(component, state, config)

    def architecture(self, config: Callable[[str], Config], prediction: str) -> str:
        return "stable-diffusion-xl-v1-base"

    def original(self, layer: str, network: Config) -> Original | None:
        """sd-scripts' own UNet has the names of the single file."""
        name = unet_layer(layer, network)
        return None if name is None else Original(name)

    def base_version(self, config: Callable[[str], Config], prediction: str) -> dict[str, str]:
        return {"ss_base_model_version": "sdxl_base_v1-0", "ss_v2": "False"}


FAMILIES = (StableDiffusionXL(),)
