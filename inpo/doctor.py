"""`inpo doctor`: what this installation can do here, in one screen: for people, and for a report of a fault."""

import importlib.util
import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated

import typer

from inpo.common.paths import local_path

_LIBRARIES = ("torch", "diffusers", "transformers", "peft", "accelerate", "zarr", "pyarrow", "huggingface_hub")
_OPTIONAL = {
    "ray": "precompute --engine ray",
    "wandb": "train --tracker wandb",
    "open_clip_torch": "the scorer hpsv2, hpsv21",
    "image-reward": "the scorer imagereward",
    "bitsandbytes": "train --optimizer adamw8bit",
    "torchao": "--dtype bfloat16-int8, float32-int8",
    "datasets": "prompts of a data set on the hub",
    "xarray": "to_xarray",
}
_MODULES = {"open_clip_torch": "open_clip", "image-reward": "ImageReward"}
"""{package: its module} where they are called differently."""


def doctor(
    folder: Annotated[
        Path, typer.Argument(metavar="[FOLDER]", help="Where runs and caches will lie.", parser=local_path)
    ] = Path(),
) -> None:
    """Say what is here: versions, device, driver, disk, hub, and what is not installed. Asks no network.

    Exit code 1 if the folder cannot be written, or a GPU is there that torch cannot use.
    """
    from inpo.common.device import why_no_gpu
    from inpo.common.errors import InpoError
    from inpo.common.space import free_bytes, human_bytes

    wrong: list[str] = []
    print(f"inpo {version('inpo-cache')}, Python {sys.version.split()[0]}, {platform.platform()}")
    print(", ".join(f"{name} {_version(name)}" for name in _LIBRARIES))
    import torch

    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else f"ROCm {torch.version.hip}"
    print(f"torch is built for {build if torch.version.cuda or torch.version.hip else 'CPUs alone'}")
    for number in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(number)
        bfloat16 = "with" if torch.cuda.is_bf16_supported(including_emulation=False) else "without"
        print(f"GPU {number}: {properties.name}, {human_bytes(properties.total_memory)}, {bfloat16} bfloat16")
    if not torch.cuda.is_available():
        print(f"no GPU in use; {torch.get_num_threads()} threads on {os.cpu_count()} CPUs")
        why = why_no_gpu()
        if why and torch.backends.mps.is_available():
            print(why)
        elif why:
            wrong.append(why)
    existing = next(each for each in (folder.absolute(), *folder.absolute().parents) if each.exists())
    try:
        free = free_bytes(folder)
        print(f"disk: {human_bytes(free)} free at {existing}")
        if free == 0:
            wrong.append(f"there is no room at {existing}")
    except (InpoError, OSError) as error:
        wrong.append(str(error))
    if not existing.is_dir():
        wrong.append(f"{existing} is not a folder")
    elif not os.access(existing, os.W_OK):
        wrong.append(f"{existing} cannot be written")
    print(f"hub: {_hub()}")
    modules = {name: importlib.util.find_spec(_MODULES.get(name, name)) for name in _OPTIONAL}
    missing = [f"{name} ({what})" for name, what in _OPTIONAL.items() if modules[name] is None]
    print(f"not installed, and needed only for: {', '.join(missing) or 'nothing'}")
    for line in wrong:
        print(f"problem: {line}")
    if wrong:
        raise typer.Exit(1)
    print("no problem found")


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _hub() -> str:
    from huggingface_hub import constants, get_token

    login = "logged in" if get_token() else "no login (public models alone; `hf auth login` for the rest)"
    offline = ", offline by HF_HUB_OFFLINE" if constants.HF_HUB_OFFLINE else ""
    return f"{os.environ.get('HF_ENDPOINT', constants.ENDPOINT)}{offline}, {login}, files in {constants.HF_HUB_CACHE}"
