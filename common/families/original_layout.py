"""Key names of the original Stable Diffusion checkpoints (one file, all components), from diffusers' names.

diffusers converts that layout on loading (`from_single_file`); this is the way back, for SD 1.x, 2.x and SDXL. The
original numbers its blocks through: with L = layers_per_block, layer j of down block i is
input_blocks[i (L + 1) + j + 1], and layer j of up block i is output_blocks[i (L + 1) + j].
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from inpo.common.errors import ModelError

State = Mapping[str, Tensor]

UNET = "model.diffusion_model."
VAE = "first_stage_model."
PREFIXES = {
    "unet": (UNET,),
    "vae": (VAE,),
    "text_encoder": ("cond_stage_model.", "conditioner.embedders.0."),
    "text_encoder_2": ("conditioner.embedders.1.",),
}
"""Where the original layout keeps each component's weights."""
_UNET_TOP = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
}
_UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
_OPEN_CLIP = (
    ("encoder.layers.", "transformer.resblocks."),
    ("layer_norm1", "ln_1"),
    ("layer_norm2", "ln_2"),
    (".fc1.", ".c_fc."),
    (".fc2.", ".c_proj."),
    (".self_attn.", ".attn."),
    ("embeddings.position_embedding.weight", "positional_embedding"),
    ("embeddings.token_embedding.weight", "token_embedding.weight"),
    ("final_layer_norm.", "ln_final."),
)


def component_keys(component: str, state: State, config: Any) -> dict[str, Tensor]:
    """UNet or VAE, `state`, under the layout's names. `config` is the component's own.

    Raises ModelError for a UNet that the layout has no names for.
    """
    if component == "vae":
        return vae_keys(state)
    layers = config.layers_per_block
    if not isinstance(layers, int):
        raise ModelError(
            "The original layout needs the same number of layers in every block.",
            where="unet/config.json, layers_per_block",
            expected="a number",
            got=layers,
            fix="use the pipeline folder instead of a single file",
        )
    return unet_keys(state, layers_per_block=layers)


def unet_keys(state: State, *, layers_per_block: int) -> dict[str, Tensor]:
    """A UNet2DConditionModel's weights under their original names."""
    return {UNET + _unet_name(name, layers_per_block + 1, state): value for name, value in state.items()}


def unet_layer(layer: str, config: Mapping[str, Any]) -> str | None:
    """A layer of the UNet by its original name, without the prefix; None: it has none. `config` is the UNet's."""
    if not isinstance(config["layers_per_block"], int):
        return None
    blocks = enumerate(config["up_block_types"])
    attention = {f"up_blocks.{block}.attentions.": torch.empty(0) for block, kind in blocks if "CrossAttn" in kind}
    try:
        return _unet_name(f"{layer}.weight", config["layers_per_block"] + 1, attention).removesuffix(".weight")
    except ModelError:
        return None


def _unet_name(name: str, period: int, state: State) -> str:
    for ours, theirs in _UNET_TOP.items():
        if name.startswith(ours + "."):
            return _resnet(theirs + name.removeprefix(ours)) if ".resnets." in name else theirs + name[len(ours) :]
    if found := re.fullmatch(r"down_blocks\.(\d+)\.(resnets|attentions)\.(\d+)\.(.*)", name):
        block, kind, layer, rest = int(found[1]), found[2], int(found[3]), found[4]
        return _resnet(f"input_blocks.{block * period + layer + 1}.{int(kind == 'attentions')}.{rest}", kind)
    if found := re.fullmatch(r"down_blocks\.(\d+)\.downsamplers\.0\.conv\.(.*)", name):
        return f"input_blocks.{(int(found[1]) + 1) * period}.0.op.{found[2]}"
    if found := re.fullmatch(r"up_blocks\.(\d+)\.(resnets|attentions)\.(\d+)\.(.*)", name):
        block, kind, layer, rest = int(found[1]), found[2], int(found[3]), found[4]
        return _resnet(f"output_blocks.{block * period + layer}.{int(kind == 'attentions')}.{rest}", kind)
    if found := re.fullmatch(r"up_blocks\.(\d+)\.upsamplers\.0\.conv\.(.*)", name):
        block = int(found[1])
        has_attention = any(other.startswith(f"up_blocks.{block}.attentions.") for other in state)
        return f"output_blocks.{block * period + period - 1}.{1 + has_attention}.conv.{found[2]}"
    raise ModelError(
        "This UNet has a layer that the original layout has no name for.",
        where=name,
        expected="the UNet of SD 1.x, 2.x or SDXL",
        fix="use the pipeline folder instead of a single file",
    )


def _resnet(name: str, kind: str = "resnets") -> str:
    if kind != "resnets":
        return name
    for ours, theirs in _UNET_RESNET.items():
        name = name.replace(f".{ours}.", f".{theirs}.")
    return name


def vae_keys(state: State) -> dict[str, Tensor]:
    """An AutoencoderKL's weights under their original names; attention projections become 1x1 convolutions."""
    num_up = 1 + max(int(found[1]) for name in state if (found := re.match(r"decoder\.up_blocks\.(\d+)\.", name)))
    out: dict[str, Tensor] = {}
    for name, value in state.items():
        new = name
        if found := re.fullmatch(r"encoder\.down_blocks\.(\d+)\.(resnets|downsamplers)\.(\d+)\.(.*)", name):
            part = f"block.{found[3]}" if found[2] == "resnets" else "downsample"
            new = f"encoder.down.{found[1]}.{part}.{found[4]}"
        elif found := re.fullmatch(r"decoder\.up_blocks\.(\d+)\.(resnets|upsamplers)\.(\d+)\.(.*)", name):
            part = f"block.{found[3]}" if found[2] == "resnets" else "upsample"
            new = f"decoder.up.{num_up - 1 - int(found[1])}.{part}.{found[4]}"
        elif found := re.fullmatch(r"(encoder|decoder)\.mid_block\.resnets\.(\d)\.(.*)", name):
            new = f"{found[1]}.mid.block_{int(found[2]) + 1}.{found[3]}"
        elif found := re.fullmatch(r"(encoder|decoder)\.mid_block\.attentions\.0\.(.*)\.(weight|bias)", name):
            new = f"{found[1]}.mid.attn_1.{_VAE_ATTENTION[found[2]]}.{found[3]}"
            if value.ndim == 2:
                value = value[:, :, None, None]
        new = new.replace(".conv_shortcut.", ".nin_shortcut.").replace(".conv_norm_out.", ".norm_out.")
        out[VAE + new] = value
    return out


def clip_keys(state: State, prefix: str) -> dict[str, Tensor]:
    """OpenAI's CLIP text encoder: transformers' own names below `prefix`."""
    return {f"{prefix}transformer.text_model.{_bare(name)}": value for name, value in state.items()}


def open_clip_keys(state: State, prefix: str) -> dict[str, Tensor]:
    """OpenCLIP's text encoder (SD 2.x, SDXL's second): q, k and v in one matrix, the projection transposed."""
    out: dict[str, Tensor] = {}
    for name, value in state.items():
        bare = _bare(name)
        if bare == "text_projection.weight":
            out[f"{prefix}model.text_projection"] = value.T
            continue
        if found := re.fullmatch(r"(.*\.self_attn\.)q_proj\.(weight|bias)", bare):
            parts = [state[name.replace(".q_proj.", f".{part}_proj.")] for part in "qkv"]
            bare, value = f"{found[1]}in_proj_{found[2]}", torch.cat(parts)
        elif re.search(r"\.self_attn\.[kv]_proj\.", bare):
            continue
        for ours, theirs in _OPEN_CLIP:
            bare = bare.replace(ours, theirs)
        out[f"{prefix}model.{bare}"] = value
    return out


def _bare(name: str) -> str:
    """Some versions of transformers put everything below text_model, some do not."""
    return name.removeprefix("text_model.")
