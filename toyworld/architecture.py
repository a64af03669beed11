"""The base model's networks, tokenizer and scheduler: Stable Diffusion 1.5's classes at a toy's size.

Picture [3, 32, 32] -1..1 -> AutoencoderKL -> latent [6, 8, 8] -> times scaling_factor -> UNet2DConditionModel, told the
caption by a CLIPTextModel over at most 16 tokens.
"""

import json
import string
from pathlib import Path

from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from inpo.toyworld.scenes import scenes_by_caption

MAX_TOKENS = 16
TEXT_WIDTH = 64
START, END, WORD_END = "<|startoftext|>", "<|endoftext|>", "</w>"


def build_vae() -> AutoencoderKL:
    return AutoencoderKL(
        sample_size=32,
        latent_channels=6,
        block_out_channels=(16, 32, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        norm_num_groups=8,
        mid_block_add_attention=False,
    )


def build_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=6,
        out_channels=6,
        block_out_channels=(48, 80),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=4,
        norm_num_groups=8,
    )


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=4 * TEXT_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=MAX_TOKENS,
            projection_dim=TEXT_WIDTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def build_tokenizer(folder: Path) -> CLIPTokenizer:
    """A CLIP tokenizer where each word of the captions is one token; other words fall into letters.

    Writes the tokenizer into `folder`. Each word's merges join its letters from the left; long words come
    first, else a short word's merge ("at") would tear the letters out of a longer one.
    """
    vocabulary_words = {word for caption in scenes_by_caption() for word in caption.split()}
    words = sorted(vocabulary_words, key=lambda word: (-len(word), word))
    letters = [*string.ascii_lowercase, *string.digits, *string.punctuation]
    tokens = dict.fromkeys([*letters, *(letter + WORD_END for letter in letters)])
    merges: dict[tuple[str, str], None] = {}
    for word in words:
        left = word[0]
        for position, letter in enumerate(word[1:], start=2):
            right = letter + WORD_END if position == len(word) else letter
            merges[(left, right)] = None
            left += right
            tokens[left] = None
    vocabulary = {token: index for index, token in enumerate([*tokens, START, END])}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(pair) for pair in merges) + "\n")
    tokenizer = CLIPTokenizer.from_pretrained(folder, model_max_length=MAX_TOKENS, pad_token=END, unk_token=END)
    # Else whoever loads the folder gets no maximum length, and the pipeline cannot pad.
    tokenizer.save_pretrained(folder)
    return tokenizer


def build_scheduler() -> DDIMScheduler:
    """Stable Diffusion 1.5's schedule and DDIM settings."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        num_train_timesteps=1000,
        prediction_type="epsilon",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def build_pipeline(
    *, vae: AutoencoderKL, unet: UNet2DConditionModel, text_encoder: CLIPTextModel, tokenizer: CLIPTokenizer
) -> StableDiffusionPipeline:
    return StableDiffusionPipeline(
        vae=vae,
        unet=unet,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
