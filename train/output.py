"""What a run leaves behind: a pipeline folder or LoRA weights that diffusers loads, and a model card."""

import errno
import os
from pathlib import Path
from typing import Any

from peft.utils import get_peft_model_state_dict
from torch import Tensor, nn

from inpo.common.cache import Cache
from inpo.common.durable import new_folder, storage_errors
from inpo.common.errors import UsageError
from inpo.common.models import Model


def claim_output(output: Path) -> None:
    """Make the run's folder. Raises StorageError if that is impossible, and UsageError if it is a cache."""
    if (output / "manifest.json").is_file():
        raise UsageError(
            "The output folder is a cache.",
            where=f"--output {output}",
            expected="a folder of the run's own",
            got="manifest.json in it",
            fix="choose another --output",
        )
    with storage_errors("write the run", output):
        output.mkdir(parents=True, exist_ok=True)
        if not os.access(output, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(output))


def make_readable(*files: Path) -> None:
    """Permissions as any new file has them: safetensors writes files that nobody else may read."""
    mask = os.umask(0)
    os.umask(mask)
    for file in files:
        file.chmod(0o666 & ~mask)


def scaled_lora(network: Any) -> dict[str, Tensor]:
    """The LoRA layers by peft's names, alpha / rank multiplied into their up weights.

    A file has no place for alpha that every loader reads, and without one all of them take the rank for it.
    """
    (adapter,) = network.peft_config
    config = network.peft_config[adapter]
    factor = config.lora_alpha / config.r
    return {
        name: value * factor if ".lora_B." in name else value
        for name, value in get_peft_model_state_dict(network, adapter_name=adapter).items()
    }


def write_output(network: nn.Module, model: Model, output: Path, *, card: str, lora: bool) -> Path:
    """Write `output`/pipeline (or `output`/lora), whole or not at all; an older one is replaced. Returns its path."""
    final = output / ("lora" if lora else "pipeline")
    # Only here are the VAE and the text encoders read, to write them beside the trained network.
    pipeline = None if lora else model.load_pipeline(**{model.family.network: network})
    with new_folder(final, replace=True, action="write the trained model") as staged:
        if pipeline is None:
            # By peft's names: diffusers' older ones know the attention's layers only, and lose those among others.
            model.family.save_lora(scaled_lora(network), staged)
        else:
            pipeline.save_pretrained(str(staged), safe_serialization=True)
        (staged / "README.md").write_text(card)
        make_readable(*(file for file in staged.rglob("*") if file.is_file()))
    return final


def model_card(start: str, model: Model, caches: list[Cache], *, configuration: str, step: int, lora: bool) -> str:
    """A model card with the resolved configuration and the caches' fingerprints. `start`: whose weights were trained,
    the reference's or those of --init-from."""
    tags = "lora" if lora else model.family.tag
    lines = [
        "---",
        "library_name: diffusers",
        f"base_model: {start}",
        f"tags: [text-to-image, preference-alignment, inpo, {tags}]",
        "---",
        "",
        f"# {Path(model.name).name}, aligned with InPO cache",
        "",
        f"Trained for {step} optimiser steps from `{start}` on cached inversions (DDIM-InPO, arXiv 2503.18454);",
        f"the reference is `{model.name}`.",
        "",
        "## Caches",
        "",
    ]
    for cache in caches:
        lines.append(f"- `{cache.location}`: {cache.num_pairs} pairs, {cache.num_records} records")
        lines += [f"  - {name}: `{value}`" for name, value in sorted(cache.manifest.fingerprints.items())]
    return "\n".join([*lines, "", "## Configuration", "", "```toml", configuration.rstrip(), "```", ""])
