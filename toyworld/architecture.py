"""The base models' networks, tokenizers and schedulers: Stable Diffusion 1.5's and 3's classes at a toy's size.

Picture [3, 64, 64] -1..1 -> AutoencoderKL -> latent [12, 8, 8] -> times scaling_factor -> UNet2DConditionModel, told
the caption by a CLIPTextModel over at most 20 tokens. The flow has the same VAE and captions, an SD3Transformer2DModel
on every element of the latent, two CLIP encoders and T5.
"""

import json
import string
from pathlib import Path

from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from inpo.toyworld.backdrops import SIZE
from inpo.toyworld.sampling import LATENT_SHAPE, MAX_TOKENS
from inpo.toyworld.scenes import all_captions

TEXT_WIDTH = 64
SECOND_WIDTH = 32
"""Of the flow's second CLIP encoder; T5 is as wide as both together."""
FLOW_WIDTH, FLOW_HEADS, FLOW_LAYERS = 128, 4, 4
START, END, WORD_END = "<|startoftext|>", "<|endoftext|>", "</w>"


def build_vae() -> AutoencoderKL:
    return AutoencoderKL(
        sample_size=SIZE,
        latent_channels=LATENT_SHAPE[0],
        block_out_channels=(16, 32, 48, 64),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        norm_num_groups=8,
        mid_block_add_attention=False,
    )


def build_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=LATENT_SHAPE[0],
        out_channels=LATENT_SHAPE[0],
        block_out_channels=(48, 80),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=4,
        norm_num_groups=8,
    )


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(_text_config(tokenizer, TEXT_WIDTH))


def _text_config(tokenizer: CLIPTokenizer, width: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=MAX_TOKENS,
        projection_dim=width,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def build_tokenizer(folder: Path) -> CLIPTokenizer:
    """A CLIP tokenizer where each word of the captions is one token; other words fall into letters.

    Writes the tokenizer into `folder`. Each word's merges join its letters from the left; long words come
    first, else a short word's merge ("at") would tear the letters out of a longer one.
    """
    vocabulary_words = {word for caption in all_captions() for word in caption.split()}
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


def build_t5_tokenizer() -> T5TokenizerFast:
    """A T5 tokenizer where each word of the captions is one token; other words fall into letters."""
    words = sorted({word for caption in all_captions() for word in caption.split()})
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((f"\u2581{word}", -1.0) for word in words)]
    letters = ["\u2581", *string.ascii_lowercase, *string.digits, *string.punctuation]
    core = Tokenizer(models.Unigram([*pieces, *((letter, -9.0) for letter in letters)], unk_id=2))
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return T5TokenizerFast(tokenizer_object=core, extra_ids=0, model_max_length=MAX_TOKENS)


def build_flow_pipeline(*, vae: AutoencoderKL, tokenizer: CLIPTokenizer) -> StableDiffusion3Pipeline:
    """Untrained but for the VAE."""
    # What its pipeline adds, and no folder of this machine.
    vae.register_to_config(shift_factor=0.0, _name_or_path="toyworld/base")
    t5_tokenizer, t5_width = build_t5_tokenizer(), TEXT_WIDTH + SECOND_WIDTH
    t5_config = T5Config(
        vocab_size=len(t5_tokenizer),
        d_model=t5_width,
        d_kv=24,
        d_ff=2 * t5_width,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        pad_token_id=t5_tokenizer.pad_token_id,
        eos_token_id=t5_tokenizer.eos_token_id,
    )
    return StableDiffusion3Pipeline(
        vae=vae,
        text_encoder=CLIPTextModelWithProjection(_text_config(tokenizer, TEXT_WIDTH)),
        text_encoder_2=CLIPTextModelWithProjection(_text_config(tokenizer, SECOND_WIDTH)),
        text_encoder_3=T5EncoderModel(t5_config),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        tokenizer_3=t5_tokenizer,
        transformer=SD3Transformer2DModel(
            sample_size=8,
            patch_size=1,
            in_channels=LATENT_SHAPE[0],
            out_channels=LATENT_SHAPE[0],
            num_layers=FLOW_LAYERS,
            attention_head_dim=FLOW_WIDTH // FLOW_HEADS,
            num_attention_heads=FLOW_HEADS,
            caption_projection_dim=FLOW_WIDTH,
            joint_attention_dim=t5_width,
            pooled_projection_dim=t5_width,
            pos_embed_max_size=8,
            qk_norm="rms_norm",
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
    )
