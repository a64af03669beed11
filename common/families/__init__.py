"""Model families, one file each. Nothing outside this folder knows a family by name; another file is another family."""

import importlib
import pkgutil
from collections.abc import Mapping

from inpo.common.families.base import Family

FAMILIES: Mapping[str, Family] = {
    each.name: each
    for module in pkgutil.iter_modules(__path__)
    for each in getattr(importlib.import_module(f"{__name__}.{module.name}"), "FAMILIES", ())
}
"""By name, in the order of the files' names."""
BY_PIPELINE: Mapping[str, Family] = {name: family for family in FAMILIES.values() for name in family.pipelines}
"""By the class that a pipeline's model_index.json names."""
SUPPORTED = "; ".join(family.title for family in FAMILIES.values()) + "; as a diffusers pipeline"

__all__ = ["BY_PIPELINE", "FAMILIES", "SUPPORTED", "Family"]
