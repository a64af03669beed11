"""Model families, one file each. Nothing outside this folder knows a family by name; another file is another family."""

import importlib
import pkgutil
from collections.abc import Mapping
from pathlib import Path

from inpo.common.errors import ModelError
from inpo.common.families.base import Family, read_json

FAMILIES: Mapping[str, Family] = {
    each.name: each
    for module in pkgutil.iter_modules(__path__)
    for each in getattr(importlib.import_module(f"{__name__}.{module.name}"), "FAMILIES", ())
}
"""By name, in the order of the files' names."""
BY_PIPELINE: Mapping[str, Family] = {name: family for family in FAMILIES.values() for name in family.pipelines}
"""By the class that a pipeline's model_index.json names."""
SUPPORTED = "; ".join(family.title for family in FAMILIES.values()) + "; as a diffusers pipeline"

__all__ = ["BY_PIPELINE", "FAMILIES", "SUPPORTED", "Family", "family_of"]


def family_of(folder: Path) -> Family:
    """By the pipeline's class in model_index.json. Raises ModelError if there is none, or another one."""
    index_file = folder / "model_index.json"
    if not index_file.is_file():
        fix = "pass the pipeline's folder, not one of its components; a .safetensors file works with --model-config"
        if (folder / "pipeline" / index_file.name).is_file():
            fix = f"a run's pipeline is the folder below: {folder / 'pipeline'}"
        elif (folder / "lora").is_dir():
            fix = f"a run's LoRA layers go over its model: pass that, and --lora {folder / 'lora'} where it is taken"
        raise ModelError(
            "This folder is not a diffusers pipeline.",
            where=folder,
            expected="model_index.json",
            got=", ".join(sorted(entry.name for entry in folder.iterdir())[:8]) or "an empty folder",
            fix=fix,
        )
    name = read_json(index_file).get("_class_name", "?")
    if name not in BY_PIPELINE:
        raise ModelError(
            f"A model of class {name} is not supported.",
            where=folder,
            expected=SUPPORTED,
            got=name,
            fix="inpainting and pixel-space models have other inputs; each family of flow models is a file of its own",
        )
    return BY_PIPELINE[name]
