"""Stable Diffusion 3 and 3.5: a transformer on plain latents under two CLIP encoders and T5, which has no mask."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from jaxtyping import Float
from torch import Tensor, nn

from inpo.common.conditions import Condition
from inpo.common.families.base import EMBEDDING, POOLED, Config
from inpo.common.families.flow import FlowFamily
from inpo.common.families.lora import originals

_BLOCK = "transformer_blocks.#."
_ORIGINALS = originals(
    {
        "joint_blocks.#.x_block.attn.qkv": tuple(f"{_BLOCK}attn.to_{part}" for part in "qkv"),
        "joint_blocks.#.x_block.attn.proj": (f"{_BLOCK}attn.to_out.0",),
        "joint_blocks.#.x_block.attn2.qkv": tuple(f"{_BLOCK}attn2.to_{part}" for part in "qkv"),
        "joint_blocks.#.x_block.attn2.proj": (f"{_BLOCK}attn2.to_out.0",),
        "joint_blocks.#.x_block.mlp.fc1": (f"{_BLOCK}ff.net.0.proj",),
        "joint_blocks.#.x_block.mlp.fc2": (f"{_BLOCK}ff.net.2",),
        "joint_blocks.#.context_block.attn.qkv": tuple(f"{_BLOCK}attn.add_{part}_proj" for part in "qkv"),
        "joint_blocks.#.context_block.attn.proj": (f"{_BLOCK}attn.to_add_out",),
        "joint_blocks.#.context_block.mlp.fc1": (f"{_BLOCK}ff_context.net.0.proj",),
        "joint_blocks.#.context_block.mlp.fc2": (f"{_BLOCK}ff_context.net.2",),
    }
)


class StableDiffusion3(FlowFamily):
    """Stable Diffusion 3 and 3.5."""

    name = "sd3"
    title = "Stable Diffusion 3, 3.5"
    tag = "stable-diffusion-3"
    pipelines = ("StableDiffusion3Pipeline", "StableDiffusion3Img2ImgPipeline")
    pipeline = StableDiffusion3Pipeline
    unneeded = {"image_encoder": None, "feature_extractor": None}
    network_class = SD3Transformer2DModel
    text_encoders = ("text_encoder", "text_encoder_2", "text_encoder_3")
    tokenizers = ("tokenizer", "tokenizer_2", "tokenizer_3")
    conditions = {"embedding": EMBEDDING, "pooled": POOLED}
    max_tokens = 256
    most_tokens = 512
    originals = _ORIGINALS
    blocks = ("JointTransformerBlock",)

    def pixel_step(self, config: Callable[[str], Config]) -> int:
        return self.vae_factor(config) * int(config("transformer").get("patch_size", 2))

    def longest_side(self, config: Callable[[str], Config]) -> int | None:
        return int(config("transformer").get("pos_embed_max_size", 96)) * self.pixel_step(config)

    def probe_side(self, network: Config) -> int:
        return 4 * int(network.get("patch_size", 2))

    def lengths(self, config: Callable[[str], Config], max_tokens: int | None = None) -> dict[str, tuple[int, ...]]:
        transformer = config("transformer")
        clip = int(config("text_encoder").get("max_position_embeddings", 77))
        return {
            "embedding": (clip + (max_tokens or self.max_tokens), int(transformer["joint_attention_dim"])),
            "pooled": (int(transformer["pooled_projection_dim"]),),
        }

    def encode(
        self, pipeline: Any, prompts: Sequence[str], device: torch.device, max_tokens: int | None = None
    ) -> dict[str, Tensor]:
        embedding, _, pooled, _ = pipeline.encode_prompt(
            prompt=list(prompts),
            prompt_2=None,
            prompt_3=None,
            device=device,
            do_classifier_free_guidance=False,
            max_sequence_length=max_tokens or self.max_tokens,
        )
        return {"embedding": embedding, "pooled": pooled}

    def is_cut(self, pipeline: Any, prompt: str, max_tokens: int | None = None) -> bool:
        """By T5, which reads on where the CLIP encoders end."""
        tokens = pipeline.tokenizer_3(prompt, truncation=False, verbose=False)["input_ids"]
        return len(tokens) > (max_tokens or self.max_tokens)

    def call(
        self, network: nn.Module, x: Float[Tensor, "batch c h w"], label: Float[Tensor, " batch"], condition: Condition
    ) -> Float[Tensor, "batch c h w"]:
        output: Tensor = network(
            hidden_states=x,
            timestep=label,
            encoder_hidden_states=condition["embedding"].float(),
            pooled_projections=condition["pooled"].float(),
            return_dict=False,
        )[0]
        return output


FAMILIES = (StableDiffusion3(),)
