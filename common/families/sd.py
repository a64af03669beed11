"""Stable Diffusion 1.x and 2.x: a UNet under one text encoder's states."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers import (
    ControlNetModel,
    StableDiffusionControlNetPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from jaxtyping import Float
from torch import Tensor, nn

from inpo.common.conditions import Condition
from inpo.common.errors import ModelError
from inpo.common.families.base import EMBEDDING, Config, Family, State
from inpo.common.families.lora import Original
from inpo.common.families.original_layout import PREFIXES, clip_keys, component_keys, open_clip_keys


class UNetFamily(Family):
    """What UNets with cross-attention share."""

    network = "unet"
    network_class = UNet2DConditionModel
    controlnet_class = ControlNetModel
    prefixes = PREFIXES
    # diffusers names the transformers alone; the norms between convolutions are what a compiler has most to fuse of.
    blocks = ("BasicTransformerBlock", "ResnetBlock2D")
    addition: str | None = None
    """What the UNet adds to the timestep's embedding."""

    def check_network(self, name: str, network: Config) -> None:
        # Whatever diffusers' UNet can be conditioned on beside text; the distilled ones want their guidance embedded.
        beside = (
            "class_embed_type",
            "num_class_embeds",
            "encoder_hid_dim",
            "encoder_hid_dim_type",
            "time_cond_proj_dim",
        )
        for key, expected in (*((key, None) for key in beside), ("addition_embed_type", self.addition)):
            if network.get(key) != expected:
                raise ModelError(
                    "The UNet does not take this family's conditions, or not these alone.",
                    where=f"{name}: unet/config.json, {key}",
                    expected=expected or "null",
                    got=network.get(key),
                    fix=f"supported: {self.title}",
                )
        if not isinstance(network.get("cross_attention_dim"), int):
            raise ModelError(
                "The UNet's text conditions have no single width.",
                where=f"{name}: unet/config.json, cross_attention_dim",
                expected="a number",
                got=network.get("cross_attention_dim"),
                fix=f"supported: {self.title}",
            )

    def check_layout(self) -> None:
        return

    def probe_side(self, network: Config) -> int:
        return int(2 ** len(network["block_out_channels"]))

    def lengths(self, config: Callable[[str], Config], max_tokens: int | None = None) -> dict[str, tuple[int, ...]]:
        tokens = int(config("text_encoder").get("max_position_embeddings", 77))
        return {"embedding": (tokens, int(config("unet")["cross_attention_dim"]))}

    def encode(
        self, pipeline: Any, prompts: Sequence[str], device: torch.device, max_tokens: int | None = None
    ) -> dict[str, Tensor]:
        return {"embedding": self.encoded(pipeline, prompts, device)[0]}

    def encoded(self, pipeline: Any, prompts: Sequence[str], device: torch.device) -> tuple[Any, ...]:
        """What the pipeline's own encoding gives, without guidance."""
        encoded: tuple[Any, ...] = pipeline.encode_prompt(
            prompt=list(prompts), device=device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        return encoded

    def call(
        self, network: nn.Module, x: Float[Tensor, "batch c h w"], label: Float[Tensor, " batch"], condition: Condition
    ) -> Float[Tensor, "batch c h w"]:
        added = None
        if "pooled" in condition:
            added = {"text_embeds": condition["pooled"].float(), "time_ids": condition["time_ids"]}
        embedding = condition["embedding"].float()
        output: Tensor = network(x, label, encoder_hidden_states=embedding, added_cond_kwargs=added, return_dict=False)[
            0
        ]
        return output


class StableDiffusion(UNetFamily):
    """Stable Diffusion 1.x and 2.x."""

    name = "sd"
    title = "Stable Diffusion 1.x, 2.x (noise, v- or sample-prediction)"
    tag = "stable-diffusion"
    pipelines = ("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline")
    pipeline = StableDiffusionPipeline
    controlled = StableDiffusionControlNetPipeline
    inpainted = StableDiffusionInpaintPipeline
    unneeded = {
        "image_encoder": None,
        "feature_extractor": None,
        "safety_checker": None,
        "requires_safety_checker": False,
    }
    conditions = {"embedding": EMBEDDING}
    # "Decoding latents to RGB without upscaling", discuss.huggingface.co (output -1..1 there, halved here).
    latent_colours = (
        [[0.149, 0.1035, 0.104], [0.0935, 0.143, 0.0865], [-0.079, 0.0945, 0.132], [-0.092, -0.1355, -0.2365]],
        [0.5, 0.5, 0.5],
    )

    def layout(self, component: str, state: State, config: Any) -> dict[str, Tensor]:
        if component != "text_encoder":
            return component_keys(component, state, config)
        return (open_clip_keys if _is_open_clip(config.to_dict()) else clip_keys)(state, "cond_stage_model.")

    def architecture(self, config: Callable[[str], Config], prediction: str) -> str:
        if not _is_open_clip(config("text_encoder")):
            return "stable-diffusion-v1"
        return f"stable-diffusion-v2-{'768-v' if prediction == 'v_prediction' else '512'}"

    def original(self, layer: str, network: Config) -> Original | None:
        """sd-scripts' own UNet has diffusers' names."""
        return Original(layer)

    def base_version(self, config: Callable[[str], Config], prediction: str) -> dict[str, str]:
        """A1111 takes whatever does not say SD 2 or SDXL for SD 1."""
        second = _is_open_clip(config("text_encoder"))
        version = f"sd_v{2 if second else 1}{'_v' if prediction == 'v_prediction' else ''}"
        return {"ss_base_model_version": version, "ss_v2": str(second)}


def _is_open_clip(config: Config) -> bool:
    """SD 1.x has OpenAI's CLIP, SD 2.x OpenCLIP's; their activation functions tell them apart."""
    return bool(config.get("hidden_act") == "gelu")


FAMILIES = (StableDiffusion(),)
