"""The model card: what a model hub and the people there read beside the weights. Nothing in it names this machine."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any, cast, get_args, get_type_hints

from huggingface_hub import ModelCard, ModelCardData

from inpo.common.cache import Cache
from inpo.common.model_folder import BUILT_IN
from inpo.common.models import Model
from inpo.common.paths import settled
from inpo.common.printable import shown
from inpo.common.recipe import Section, to_toml

HERE = "THIS-FOLDER"
"""Stands for where the weights are; `inpo push` puts the repository's name there."""
RESULTS = "<!-- results -->"
"""Where `inpo push` puts images and scores."""


def model_card(
    start: str, model: Model, caches: Sequence[Cache], *, sections: Mapping[str, Section], step: int, lora: bool
) -> str:
    """A model card with the resolved configuration and the caches' fingerprints. `start`: whose weights were trained,
    the reference's or those of --init-from."""
    base, network = hub_id(start), model.family.network
    data = ModelCardData(
        base_model=base,
        base_model_relation=None if base is None else "adapter" if lora else "finetune",
        library_name="diffusers",
        pipeline_tag="text-to-image",
        license=_license(model) if start == model.name else None,
        tags=["text-to-image", "preference-alignment", "inpo", "lora" if lora else model.family.tag],
    )
    lines = [
        f"# {public_name(model.name)}, aligned with InPO cache",
        "",
        f"Trained for {step} optimiser steps from `{public_name(start)}` on cached inversions of preference pairs "
        f"(DDIM-InPO, arXiv 2503.18454); the reference is `{public_name(model.name)}`.",
        "",
        RESULTS,
        "",
        "## Use",
        "",
        "```python",
        *_usage(model, base or "BASE-MODEL", lora=lora),
        "```",
        "",
        "## Caches",
        "",
    ]
    for cache in caches:
        lines.append(f"- `{public_name(cache.location)}`: {cache.num_pairs} pairs, {cache.num_records} records")
        lines += [f"  - {name}: `{value}`" for name, value in sorted(cache.manifest.fingerprints.items())]
    configuration = to_toml({name: shareable(section) for name, section in sections.items()})
    lines += [
        "",
        "## Configuration",
        "",
        f"Only the {network} was trained.",
        "",
        "```toml",
        configuration.rstrip(),
        "```",
    ]
    return f"---\n{data.to_yaml()}\n---\n\n" + "\n".join([*lines, ""])


def _usage(model: Model, base: str, *, lora: bool) -> list[str]:
    if not lora:
        return [
            "from diffusers import DiffusionPipeline",
            "",
            f'pipe = DiffusionPipeline.from_pretrained("{HERE}")',
            'image = pipe("a red cat").images[0]',
        ]
    peft = model.family.lora_file != "pytorch_lora_weights.safetensors"
    return [
        "from diffusers import DiffusionPipeline",
        *(["from peft import PeftModel"] if peft else []),
        "",
        f'pipe = DiffusionPipeline.from_pretrained("{base}")',
        f'pipe.{model.family.network} = PeftModel.from_pretrained(pipe.{model.family.network}, "{HERE}")'
        if peft
        else f'pipe.load_lora_weights("{HERE}", weight_name="{model.family.lora_file}")',
        'image = pipe("a red cat").images[0]',
    ]


def with_results(card: str, *, repository: str, license: str | None, images: Sequence[str], scores: str) -> str:
    """A card for `repository`: its name in the usage lines, images (paths in the repository) and a table of scores."""
    read = ModelCard(card, ignore_metadata_errors=True)
    if license is not None:
        cast(ModelCardData, read.data).license = license
    parts = [f"![{PurePath(image).stem}]({image})\n" for image in images]
    if scores:
        parts.append(f"## Scores\n\n{scores.rstrip()}\n")
    results = "\n".join([RESULTS, "", *parts]) if parts else RESULTS
    text = read.text.replace(HERE, repository)
    before, marker, after = text.partition(RESULTS)
    # Between two marks, so that a second push replaces what the first wrote.
    _, again, rest = after.partition(RESULTS)
    text = (
        before + results + f"\n{RESULTS}" + (rest if again else after) if marker else f"{text}\n{results}\n{RESULTS}\n"
    )
    return f"---\n{read.data.to_yaml()}\n---\n{text}"


def public_name(location: str) -> str:
    """A location without what it says of this machine: a hub id or an address as it is, but for secrets; of a path
    the last name (of RUN/pipeline the run's), of a model that comes with the package all."""
    if (name := hub_id(location)) is not None:
        return name
    if location in BUILT_IN:
        return location
    if "://" in location and not location.startswith("file://"):
        return shown(location)
    path = PurePath(location)
    return (path.parent.name if path.name == "pipeline" else path.name) or location


def hub_id(location: str) -> str | None:
    """The owner/name that a location is or was downloaded from, if any."""
    if found := re.search(r"models--([\w.-]+?)--([\w.-]+)/snapshots/", location):
        return f"{found[1]}/{found[2]}"
    if location in BUILT_IN:
        return None
    is_id = re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", location) and not Path(location).exists()
    return location if is_id else None


def shareable(section: Section) -> Section:
    """A section whose paths are names alone."""
    hints = get_type_hints(type(section), include_extras=True)
    short: dict[str, Any] = {}
    for name, value in section:
        if value and _is_location(hints[name]):
            many = isinstance(value, tuple)
            short[name] = tuple(public_name(str(each)) for each in value) if many else public_name(str(value))
    return section.model_copy(update=short)


def _is_location(hint: Any) -> bool:
    """Whether a field's type, or one that it is made of, is a path (common/recipe.py)."""
    if any(getattr(each, "func", None) is settled for each in getattr(hint, "__metadata__", ())):
        return True
    return any(_is_location(each) for each in get_args(hint))


def _license(model: Model) -> str | None:
    """What the base's own card says, where there is one."""
    file = model.folder / "README.md"
    if not file.is_file():
        return None
    card = ModelCard(file.read_text(encoding="utf-8", errors="replace"), ignore_metadata_errors=True)
    named = cast(ModelCardData, card.data).license
    return named if isinstance(named, str) else None
