"""LoRA layers in other projects' formats: kohya's names, which ComfyUI, Forge, A1111 and InvokeAI read, and peft's.

All begin with layers by peft's names (`<layer>.lora_A.weight` down, `<layer>.lora_B.weight` up) whose scale is
multiplied in, so that alpha is the rank wherever a format has a place for it.
"""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from inpo.common.errors import ModelError

WRAPPER = "base_model.model."
"""What peft writes before every name."""

_NO_EFFECT = frozenset(
    "r lora_alpha target_modules exclude_modules lora_dropout init_lora_weights inference_mode base_model_name_or_path "
    "revision task_type auto_mapping peft_version".split()
)
"""Of an adapter's configuration: what is told elsewhere, or changes nothing once the layers are trained."""


class Original(NamedTuple):
    """Where a layer stands in the network as its authors published it: a layer there may be several of diffusers'."""

    name: str
    part: int = 0
    widths: tuple[int, ...] = (1,)
    """Outputs of the parts, in proportion."""


def originals(
    table: Mapping[str, tuple[str, ...]], wide: Mapping[str, int] = MappingProxyType({})
) -> dict[str, Original]:
    """{our layer: where it stands} from {original layer: our layers}; `wide` has outputs that are not 1."""
    return {
        ours: Original(name, part, tuple(wide.get(each, 1) for each in parts))
        for name, parts in table.items()
        for part, ours in enumerate(parts)
    }


def numbered(table: Mapping[str, Original], layer: str) -> Original | None:
    """A layer's entry of a table that has # in the place of a block's number."""
    found = table.get(re.sub(r"(?<=blocks\.)\d+", "#", layer))
    number = re.search(r"(?<=blocks\.)\d+", layer)
    return found and found._replace(name=found.name.replace("#", number[0] if number else "#"))


def layers_of(state: Mapping[str, Tensor]) -> list[str]:
    """The layers that have LoRA weights, in order."""
    return sorted({name.split(".lora_")[0] for name in state})


def kohya_state(state: Mapping[str, Tensor], original: Callable[[str], Original | None]) -> dict[str, Tensor]:
    """The layers under kohya's names, with an alpha of their rank.

    Where an original layer is several of ours, its rank is the sum of theirs: the downs stand one below the other, the
    ups along the diagonal, and zeros for those that have no LoRA weights.

    Raises ModelError for a layer that has no such name.
    """
    found: dict[str, dict[int, tuple[Tensor, Tensor]]] = {}
    widths: dict[str, tuple[int, ...]] = {}
    for layer in layers_of(state):
        where = original(layer)
        if where is None:
            raise ModelError(
                "kohya's LoRA format has no name for a layer of this model.",
                where=layer,
                expected="a layer that sd-scripts trains, of a family that it knows",
                fix="export another --format: diffusers or peft",
            )
        down, up = state[f"{layer}.lora_A.weight"], state[f"{layer}.lora_B.weight"]
        found.setdefault(where.name, {})[where.part] = down, up
        widths[where.name] = where.widths
    out: dict[str, Tensor] = {}
    for name, parts in found.items():
        key = "lora_unet_" + name.replace(".", "_")
        down = torch.cat([down for _, (down, _) in sorted(parts.items())])
        out[f"{key}.alpha"] = torch.tensor(float(len(down)))
        out[f"{key}.lora_down.weight"] = down
        out[f"{key}.lora_up.weight"] = _diagonal(parts, widths[name])
    return out


def _diagonal(parts: Mapping[int, tuple[Tensor, Tensor]], widths: tuple[int, ...]) -> Tensor:
    if widths == (1,):
        return parts[0][1]
    first = next(iter(parts))
    unit = len(parts[first][1]) // widths[first]
    column, blocks = 0, []
    rank = sum(len(down) for down, _ in parts.values())
    for part, width in enumerate(widths):
        block = torch.zeros(unit * width, rank, dtype=parts[first][1].dtype)
        if part in parts:
            up = parts[part][1]
            block[:, column : column + up.shape[1]] = up
            column += up.shape[1]
        blocks.append(block)
    return torch.cat(blocks)


def save_adapter(state: Mapping[str, Tensor], folder: Path) -> None:
    """Write the layers as a peft adapter, which `PeftModel.from_pretrained(network, folder)` takes."""
    rank = next(len(value) for name, value in state.items() if ".lora_A." in name)
    LoraConfig(r=rank, lora_alpha=rank, target_modules=layers_of(state)).save_pretrained(str(folder))
    save_file(
        {WRAPPER + name: value.contiguous() for name, value in state.items()},
        folder / "adapter_model.safetensors",
        metadata={"format": "pt"},
    )


def beyond_defaults(told: Mapping[str, Any]) -> dict[str, Any]:
    """What an adapter's configuration tells that changes what its layers give, beside rank and alpha: ranks and alphas
    of single layers, another scale (rsLoRA), another layer (DoRA). A setting that peft does not know is among them.
    """
    defaults = LoraConfig().to_dict()
    return {name: value for name, value in told.items() if name not in _NO_EFFECT and value != defaults.get(name)}


def adapter_metadata(file: Path) -> dict[str, Any]:
    """What diffusers obeys of a file's header, as it stands there: a LoRA's alpha and ranks may be told nowhere else.
    Empty where the header tells nothing of it.
    """
    with safe_open(file, "pt") as weights:
        header = weights.metadata() or {}
    return {name: told for name, told in header.items() if name == "lora_adapter_metadata" and told}


def converted_names(file: Path, convert: Callable[[dict[str, Tensor]], Any]) -> set[str]:
    """Names of a file's LoRA tensors after `convert`, a pipeline's `lora_state_dict`.

    Raises ValueError if it leaves out one that is not zero: of that it says nothing but in a log. Alphas do not count.
    """
    tensors = load_file(file)
    ranks = {
        name.split(".lora_")[0]: len(each) for name, each in tensors.items() if re.search(r"\.lora_(down|A)\.", name)
    }
    # Names change on the way, and one tensor may become several: a number in the place of its values tells where it
    # went. An alpha that is the rank multiplies by 1.
    numbers = {name: number for number, name in enumerate(tensors, start=1) if not name.endswith(".alpha")}
    marks = numbers | {f"{layer}.alpha": rank for layer, rank in ranks.items()}
    converted = convert(
        {name: torch.full_like(each, marks.get(name, 1), dtype=torch.float32) for name, each in tensors.items()}
    )
    state = converted[0] if isinstance(converted, tuple) else converted
    found = {number for each in state.values() for number in each.flatten().unique_consecutive().tolist()}
    dropped = [name for name, number in numbers.items() if number not in found and tensors[name].any()]
    if dropped:
        raise ValueError(f"diffusers leaves {len(dropped)} of its tensors out, the first: {dropped[0]}")
    return {name for name in state if "lora" in name and not name.endswith("alpha")}
