"""Nested states (of an optimiser, a schedule, a generator of random numbers) as JSON and safetensors.

    <name>.json                  the state's shape and plain values, a tensor as its number
    <name>-00000.safetensors ... the tensors, about a gigabyte in a file

Reading them runs no code, whoever wrote them, and gives back the very values: floats, integer keys and tuples too.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

BYTES_PER_FILE = 1 << 30


def write_state(folder: Path, name: str, state: Any) -> None:
    """Write a state of dicts, lists, tuples, tensors, text, numbers and None into `folder`.

    Raises TypeError for anything else in it.
    """
    tensors: list[torch.Tensor] = []
    shape = _packed(state, tensors)
    file: dict[str, torch.Tensor] = {}
    num_files = num_bytes = 0
    for number, tensor in enumerate(tensors):
        # A copy: two entries may share memory, which safetensors refuses.
        file[str(number)] = tensor.detach().to("cpu", copy=True).contiguous()
        num_bytes += tensor.nbytes
        if num_bytes >= BYTES_PER_FILE or number == len(tensors) - 1:
            save_file(file, folder / f"{name}-{num_files:05d}.safetensors")
            file, num_files, num_bytes = {}, num_files + 1, 0
    (folder / f"{name}.json").write_text(json.dumps({"files": num_files, "state": shape}))


def read_state(folder: Path, name: str) -> Any:
    """What `write_state` wrote, its tensors on the CPU. Raises ValueError, KeyError or SafetensorError for damage."""
    tensors: dict[str, torch.Tensor] = {}
    document = json.loads((folder / f"{name}.json").read_text())
    for number in range(document["files"]):
        file = load_file(folder / f"{name}-{number:05d}.safetensors")
        tensors |= {key: tensor.clone() for key, tensor in file.items()}  # the file they lie in may be removed
    return _unpacked(document["state"], tensors)


def _packed(value: Any, tensors: list[torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor):
        tensors.append(value)
        return {"tensor": str(len(tensors) - 1)}
    if isinstance(value, dict):
        return {"dict": [[_packed(key, tensors), _packed(inner, tensors)] for key, inner in value.items()]}
    if isinstance(value, list | tuple):
        return {"tuple" if isinstance(value, tuple) else "list": [_packed(inner, tensors) for inner in value]}
    if value is None or type(value) in (bool, int, float, str):
        return value
    raise TypeError(f"a state holds a {type(value).__name__}, which has no plain form")


def _unpacked(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if not isinstance(value, dict):
        return value
    ((kind, inner),) = value.items()
    if kind == "tensor":
        return tensors[inner]
    if kind == "dict":
        return {_unpacked(key, tensors): _unpacked(each, tensors) for key, each in inner}
    return {"list": list, "tuple": tuple}[kind](_unpacked(each, tensors) for each in inner)
