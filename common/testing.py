"""Small real models for tests, ours and yours: genuine diffusers pipelines with random weights, made in a second.

Nothing is faked: every component is the real class with a small configuration, saved as a pipeline folder that
`DiffusionPipeline.from_pretrained` loads.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLQwenImage,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

TinyKind = Literal[
    "sd15", "sd2-v", "sample", "sdxl", "pixart-sigma", "sd3", "flux", "flux-schnell", "qwen-image", "z-image"
]
_WORDS = ("a", "red", "green", "blue", "cat", "dog", "house", "on", "under", "the", "sky", "photo", "of")


def save_tiny_pipeline(folder: Path, kind: TinyKind = "sd15", *, seed: int = 0) -> Path:
    """Write a tiny random-weight pipeline folder and return it.

    Images of 32 px give latents of [4, 8, 8], of flows [16, 8, 8]. Kinds: noise prediction (sd15), v-prediction
    (sd2-v), sample prediction, SDXL with two text encoders, PixArt-Sigma with a T5 encoder, and the flows: SD3 with
    three encoders, FLUX with two, told a guidance or (flux-schnell) none, Qwen-Image and Z-Image with a language model.
    Equal seeds give equal weights.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made: dict[str, Callable[[], Any]] = {
            "pixart-sigma": _pixart,
            "sdxl": lambda: _sdxl(folder),
            "sd3": lambda: _sd3(folder),
            "flux": lambda: _flux(folder, guidance=True),
            "flux-schnell": lambda: _flux(folder, guidance=False),
            "qwen-image": _qwen_image,
            "z-image": _z_image,
        }
        pipeline = made.get(kind, lambda: _sd(folder, kind))()
    pipeline.save_pretrained(folder, safe_serialization=True)
    return folder


def _tokenizer(folder: Path, *, length: int = 16) -> CLIPTokenizer:
    """A real CLIP tokenizer over letters and a few words; text outside of it becomes the unknown token."""
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    pieces = [*letters, *(letter + "</w>" for letter in letters)]
    merges: list[str] = []
    for word in _WORDS:
        symbols = [*word[:-1], word[-1] + "</w>"]
        while len(symbols) > 1:
            merge = f"{symbols[0]} {symbols[1]}"
            symbols[:2] = [symbols[0] + symbols[1]]
            if merge not in merges:
                merges.append(merge)
                pieces.append(symbols[0])
    tokens = [*dict.fromkeys(pieces), "<|startoftext|>", "<|endoftext|>"]
    source = folder / "tokenizer-source"
    source.mkdir(parents=True, exist_ok=True)
    (source / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(tokens)}))
    (source / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    tokenizer = CLIPTokenizer(str(source / "vocab.json"), str(source / "merges.txt"), model_max_length=length)
    for file in source.iterdir():
        file.unlink()
    source.rmdir()
    return tokenizer


def _text_config(tokenizer: CLIPTokenizer, *, width: int = 32) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=tokenizer.model_max_length,
        projection_dim=width,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def _vae(scaling_factor: float = 0.18215, channels: int = 4, **config: Any) -> AutoencoderKL:
    return AutoencoderKL(
        **config,
        block_out_channels=(8, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=channels,
        norm_num_groups=8,
        sample_size=32,
        scaling_factor=scaling_factor,
    )


def _ddim(prediction_type: str = "epsilon") -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=prediction_type,
    )


def _sd(folder: Path, kind: TinyKind) -> StableDiffusionPipeline:
    tokenizer = _tokenizer(folder)
    text_config = _text_config(tokenizer)
    prediction_type = {"sd2-v": "v_prediction", "sample": "sample"}.get(kind, "epsilon")
    return StableDiffusionPipeline(
        vae=_vae(),
        text_encoder=CLIPTextModel(text_config).eval(),
        tokenizer=tokenizer,
        unet=UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(16, 32),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=text_config.hidden_size,
            attention_head_dim=2,
            norm_num_groups=8,
        ).eval(),
        scheduler=_ddim(prediction_type),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _sdxl(folder: Path) -> StableDiffusionXLPipeline:
    tokenizer = _tokenizer(folder)
    first, second = _text_config(tokenizer), _text_config(tokenizer, width=48)
    return StableDiffusionXLPipeline(
        vae=_vae(0.13025),
        text_encoder=CLIPTextModel(first).eval(),
        text_encoder_2=CLIPTextModelWithProjection(second).eval(),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(16, 32),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 1),
            cross_attention_dim=first.hidden_size + second.hidden_size,
            attention_head_dim=(1, 2),
            norm_num_groups=8,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + second.hidden_size,
        ).eval(),
        scheduler=_ddim(),
        force_zeros_for_empty_prompt=True,
    )


def _sd3(folder: Path) -> StableDiffusion3Pipeline:
    tokenizer, t5_tokenizer = _tokenizer(folder), _t5_tokenizer()
    first, second, third = (_text_config(tokenizer), _text_config(tokenizer, width=48), _t5_config(t5_tokenizer, 96))
    return StableDiffusion3Pipeline(
        vae=_vae(1.5305, 16, shift_factor=0.0609, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=CLIPTextModelWithProjection(first).eval(),
        text_encoder_2=CLIPTextModelWithProjection(second).eval(),
        text_encoder_3=T5EncoderModel(third).eval(),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        tokenizer_3=t5_tokenizer,
        transformer=SD3Transformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=16,
            out_channels=16,
            num_layers=3,
            attention_head_dim=16,
            num_attention_heads=2,
            caption_projection_dim=32,
            joint_attention_dim=third.d_model,
            pooled_projection_dim=32 + 48,
            pos_embed_max_size=16,
            dual_attention_layers=(0,),
            qk_norm="rms_norm",
        ).eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


def _flux(folder: Path, *, guidance: bool) -> FluxPipeline:
    tokenizer, t5_tokenizer = _tokenizer(folder), _t5_tokenizer()
    first, second = _text_config(tokenizer), _t5_config(t5_tokenizer, 32)
    return FluxPipeline(
        vae=_vae(0.3611, 16, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=CLIPTextModel(first).eval(),
        text_encoder_2=T5EncoderModel(second).eval(),
        tokenizer=tokenizer,
        tokenizer_2=t5_tokenizer,
        transformer=FluxTransformer2DModel(
            patch_size=1,
            in_channels=64,
            num_layers=2,
            num_single_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=second.d_model,
            pooled_projection_dim=first.hidden_size,
            guidance_embeds=guidance,
            axes_dims_rope=(4, 6, 6),
        ).eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
        if guidance
        else FlowMatchEulerDiscreteScheduler(shift=1.0),
    )


def _t5_config(tokenizer: T5TokenizerFast, width: int) -> T5Config:
    return T5Config(
        vocab_size=len(tokenizer),
        d_model=width,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )


def _pixart() -> PixArtSigmaPipeline:
    tokenizer = _t5_tokenizer()
    text_config = _t5_config(tokenizer, 32)
    return PixArtSigmaPipeline(
        tokenizer=tokenizer,
        text_encoder=T5EncoderModel(text_config).eval(),
        vae=_vae(0.13025),
        transformer=PixArtTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=8,
            num_layers=2,
            cross_attention_dim=16,
            sample_size=8,
            caption_channels=text_config.d_model,
            use_additional_conditions=False,
        ).eval(),
        scheduler=DPMSolverMultistepScheduler(beta_start=0.0001, beta_end=0.02),
    )


def _t5_tokenizer() -> T5TokenizerFast:
    """A real unigram tokenizer over letters and a few words, with T5's special tokens."""
    words = [f"\u2581{word}" for word in _WORDS]
    letters = ["\u2581", *(chr(code) for code in range(ord("a"), ord("z") + 1))]
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((word, -1.0) for word in words)]
    core = Tokenizer(models.Unigram([*pieces, *((letter, -5.0) for letter in letters)], unk_id=2))
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return T5TokenizerFast(tokenizer_object=core, extra_ids=0, model_max_length=512)


_QUESTION = (
    "Describe the image by detailing the color, shape, size, texture, quantity, text, spatial relationships of the "
    "objects and background:"
)
"""Qwen-Image's, around every prompt: its 34 first tokens are left out, so the tokenizer must count them alike."""
_CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def _qwen_tokenizer() -> Qwen2Tokenizer:
    """A real byte-level tokenizer over a few words, with Qwen's special tokens and a conversation's layout."""
    pieces, merges = sorted(pre_tokenizers.ByteLevel.alphabet()), []
    spaced = [f"\u0120{word.strip(',:')}" for word in (*_QUESTION.split(), *_WORDS)]
    for word in ("system", "user", "assistant", "Describe", *spaced):  # no merge of one splits another
        symbols = list(word)
        while len(symbols) > 1:
            merge = (symbols[0], symbols[1])
            symbols[:2] = [symbols[0] + symbols[1]]
            if merge not in merges:
                merges.append(merge)
                pieces.append(symbols[0])
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys([*pieces, "<|endoftext|>"]))}
    tokenizer = Qwen2Tokenizer(
        vocabulary, merges, extra_special_tokens=["<|im_start|>", "<|im_end|>"], model_max_length=1 << 17
    )
    tokenizer.chat_template = _CHAT
    return tokenizer


def _language(tokenizer: Qwen2Tokenizer) -> dict[str, Any]:
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
    }


def _qwen_image() -> QwenImagePipeline:
    tokenizer = _qwen_tokenizer()
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 32}
    text = _language(tokenizer) | {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3]}}
    return QwenImagePipeline(
        vae=AutoencoderKLQwenImage(
            base_dim=8, z_dim=16, dim_mult=[1, 2, 2], num_res_blocks=1, temperal_downsample=[False, True]
        ).eval(),
        text_encoder=Qwen2_5_VLForConditionalGeneration(
            Qwen2_5_VLConfig(text_config=text, vision_config=vision)
        ).eval(),
        tokenizer=tokenizer,
        transformer=QwenImageTransformer2DModel(
            num_layers=2, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=32, axes_dims_rope=(4, 6, 6)
        ).eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02
        ),
    )


def _z_image() -> ZImagePipeline:
    tokenizer = _qwen_tokenizer()
    return ZImagePipeline(
        vae=_vae(0.3611, 16, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=Qwen3Model(Qwen3Config(**_language(tokenizer), head_dim=16)).eval(),
        tokenizer=tokenizer,
        transformer=ZImageTransformer2DModel(
            dim=32,
            n_layers=2,
            n_refiner_layers=1,
            n_heads=2,
            n_kv_heads=2,
            cap_feat_dim=32,
            axes_dims=[4, 6, 6],
            axes_lens=[1024, 64, 64],
        ).eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )
