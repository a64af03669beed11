"""Models to measure with. Throughput needs no trained weights: all but toyworld's are random.

toyworld: the committed base, 64 px. sd15-narrow: SD1.5's UNet, VAE and text encoder at a quarter of the width, 128 px,
for a CPU. sd15 and sdxl: the full architectures, for a GPU.
"""

from pathlib import Path
from typing import Literal

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from inpo.common.models import Model, open_model

Architecture = Literal["toyworld", "sd15-narrow", "sd15", "sdxl"]
RESOLUTION: dict[str, int] = {"toyworld": 64, "sd15-narrow": 128, "sd15": 512, "sdxl": 1024}
_TOYWORLD = Path("toyworld/base")


def model_for(architecture: Architecture, folder: Path) -> Model:
    """The model, made in `folder` if it is not there yet."""
    if architecture == "toyworld":
        return open_model(str(_TOYWORLD))
    target = folder / architecture
    if not (target / "model_index.json").is_file():
        torch.manual_seed(0)
        pipeline = _sdxl() if architecture == "sdxl" else _sd15(width=1 if architecture == "sd15" else 4)
        pipeline.save_pretrained(target)
    return open_model(str(target))


def _tokenizer() -> CLIPTokenizer:
    """The toy world's tokenizer with SD's length of 77."""
    tokenizer = CLIPTokenizer.from_pretrained(_TOYWORLD / "tokenizer")
    tokenizer.model_max_length = 77
    return tokenizer


def _text_config(tokenizer: CLIPTokenizer, hidden: int, layers: int, heads: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=77,
        projection_dim=hidden,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def _vae(width: int, scaling_factor: float) -> AutoencoderKL:
    channels = tuple(size // width for size in (128, 256, 512, 512))
    return AutoencoderKL(
        block_out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=4,
        norm_num_groups=min(32, channels[0]),
        sample_size=512,
        scaling_factor=scaling_factor,
    )


def _scheduler() -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def _sd15(*, width: int) -> StableDiffusionPipeline:
    tokenizer = _tokenizer()
    text = _text_config(tokenizer, 768 // width, 12, 12 // width)
    channels = tuple(size // width for size in (320, 640, 1280, 1280))
    return StableDiffusionPipeline(
        vae=_vae(width, 0.18215),
        text_encoder=CLIPTextModel(text).eval(),
        tokenizer=tokenizer,
        unet=UNet2DConditionModel(
            sample_size=64,
            block_out_channels=channels,
            cross_attention_dim=768 // width,
            attention_head_dim=8 // min(width, 2),
            norm_num_groups=32 // width,
        ),
        scheduler=_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _sdxl() -> StableDiffusionXLPipeline:
    tokenizer = _tokenizer()
    first, second = _text_config(tokenizer, 768, 12, 12), _text_config(tokenizer, 1280, 32, 20)
    return StableDiffusionXLPipeline(
        vae=_vae(1, 0.13025),
        text_encoder=CLIPTextModel(first).eval(),
        text_encoder_2=CLIPTextModelWithProjection(second).eval(),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=UNet2DConditionModel(
            sample_size=128,
            block_out_channels=(320, 640, 1280),
            layers_per_block=2,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2, 10),
            attention_head_dim=(5, 10, 20),
            cross_attention_dim=2048,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=6 * 256 + 1280,
        ),
        scheduler=_scheduler(),
        force_zeros_for_empty_prompt=True,
    )
