"""What a run leaves behind: a pipeline folder or LoRA weights that diffusers loads, and a model card."""

import errno
import os
from pathlib import Path

from torch import nn

from inpo.common.cache import Cache
from inpo.common.durable import new_folder, storage_errors
from inpo.common.errors import UsageError
from inpo.common.models import Model
from inpo.train.lora import make_readable, save_kohya, scaled_lora


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


def write_output(network: nn.Module, model: Model, output: Path, *, card: str, lora: bool) -> Path:
    """Write `output`/pipeline (or `output`/lora, and a file with kohya's names), whole or not at all;
    an older one is replaced. Returns its path.
    """
    final = output / ("lora" if lora else "pipeline")
    # Only here are the VAE and the text encoders read, to write them beside the trained network.
    pipeline = None if lora else model.load_pipeline(**{model.family.network: network})
    layers = scaled_lora(network) if lora else {}
    with new_folder(final, replace=True, action="write the trained model") as staged:
        if pipeline is None:
            # By peft's names: diffusers' older ones know the attention's layers only, and lose those among others.
            model.family.save_lora(layers, staged)
        else:
            pipeline.save_pretrained(str(staged), safe_serialization=True)
        (staged / "README.md").write_text(card)
        make_readable(*(file for file in staged.rglob("*") if file.is_file()))
    if lora:
        save_kohya(layers, model, output)
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
