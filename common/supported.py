"""Which models are supported, told from their configuration files alone."""

import json
from pathlib import Path
from typing import Any, Literal

from inpo.common.errors import ModelError

Family = Literal["sd", "sdxl"]

_FAMILIES: dict[str, Family] = {
    "StableDiffusionPipeline": "sd",
    "StableDiffusionImg2ImgPipeline": "sd",
    "StableDiffusionXLPipeline": "sdxl",
    "StableDiffusionXLImg2ImgPipeline": "sdxl",
}
SUPPORTED = "Stable Diffusion 1.x, 2.x (noise, v- or sample-prediction) and SDXL, as a diffusers pipeline"


def read_json(file: Path) -> dict[str, Any]:
    """A configuration file. Raises ModelError if it is no JSON object."""
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(document, dict):
            raise ValueError(f"{type(document).__name__}, not an object")
    except (OSError, ValueError) as error:
        raise ModelError(
            "A configuration file of the model cannot be read.",
            where=file,
            expected="a JSON object",
            got=str(error),
            fix="download the model again",
        ) from error
    return document


def family_of(folder: Path) -> Family:
    """By the pipeline's class in model_index.json. Raises ModelError if there is none, or another one."""
    index_file = folder / "model_index.json"
    if not index_file.is_file():
        raise ModelError(
            "This folder is no diffusers pipeline.",
            where=folder,
            expected="model_index.json",
            got=", ".join(sorted(entry.name for entry in folder.iterdir())[:8]) or "an empty folder",
            fix="pass the pipeline's folder, not one of its components; a .safetensors file works with --model-config",
        )
    name = read_json(index_file).get("_class_name", "?")
    if name not in _FAMILIES:
        raise ModelError(
            f"A model of class {name} is not supported.",
            where=folder,
            expected=SUPPORTED,
            got=name,
            fix="inpainting, pixel-space and flow-matching models have other inputs or other equations",
        )
    return _FAMILIES[name]


def check_configuration(
    *, name: str, folder: Path, family: Family, index: dict[str, Any], unet: dict[str, Any], vae: dict[str, Any]
) -> None:
    """Raise ModelError for a model, called `name` in messages, that the equations or the conditions do not hold for.

    `index` is model_index.json, `unet` and `vae` are those components' configurations.
    """
    if unet.get("in_channels") != vae.get("latent_channels"):
        raise ModelError(
            "The UNet does not take plain latents of this VAE.",
            where=name,
            expected=f"in_channels {vae.get('latent_channels')} (the VAE's latent_channels)",
            got=f"in_channels {unet.get('in_channels')}",
            fix=f"inpainting and depth models are not supported; supported: {SUPPORTED}",
        )
    for key in ("class_embed_type", "num_class_embeds", "encoder_hid_dim"):
        if unet.get(key) is not None:
            raise ModelError(
                "The UNet takes other conditions than text.",
                where=f"{name}: unet/config.json, {key}",
                expected="null",
                got=unet[key],
                fix=f"supported: {SUPPORTED}",
            )
    if not isinstance(unet.get("cross_attention_dim"), int):
        raise ModelError(
            "The UNet's text conditions have no single width.",
            where=f"{name}: unet/config.json, cross_attention_dim",
            expected="a number",
            got=unet.get("cross_attention_dim"),
            fix=f"supported: {SUPPORTED}",
        )
    if index.get("scheduler", [None, None])[1] is None:
        raise ModelError("The pipeline has no scheduler.", where=name, fix=f"supported: {SUPPORTED}")
    for component in ("tokenizer", "tokenizer_2") if family == "sdxl" else ("tokenizer",):
        # The libraries make an empty tokenizer of an empty folder, and fail much later.
        if not any((folder / component / file).is_file() for file in ("tokenizer.json", "vocab.json")):
            raise ModelError(
                f"The model has no {component}.",
                where=folder / component,
                expected="tokenizer.json, or vocab.json and merges.txt",
                got="neither",
                fix="download the model again",
            )
