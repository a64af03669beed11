"""Checkpoints: accelerate's state in a folder that appears whole or not at all, the last few of them."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import nn

from inpo.common.errors import TrainingError, UsageError

_PREFIX = "step-"
STATE = "run.json"
TRAINED = "trained.safetensors"


def keep_only_trained(accelerator: Accelerator) -> None:
    """Leave the frozen weights out of the checkpoints: under LoRA they are the model's own."""

    def write(models: list[nn.Module], weights: list[Any], folder: str) -> None:
        for model in models:
            trained = {name: each for name, each in _bare(accelerator, model).named_parameters() if each.requires_grad}
            if accelerator.is_main_process:
                save_file({name: each.detach().contiguous() for name, each in trained.items()}, Path(folder) / TRAINED)
        weights.clear()

    def read(models: list[nn.Module], folder: str) -> None:
        while models:
            _bare(accelerator, models.pop()).load_state_dict(load_file(Path(folder) / TRAINED), strict=False)

    accelerator.register_save_state_pre_hook(write)
    accelerator.register_load_state_pre_hook(read)


def _bare(accelerator: Accelerator, model: nn.Module) -> nn.Module:
    bare: nn.Module = accelerator.unwrap_model(model)
    return bare


def save(
    accelerator: Accelerator,
    folder: Path,
    *,
    step: int,
    stream: dict[str, Any],
    identity: dict[str, Any],
    keep_last: int,
) -> Path:
    """Write `folder`/step-N: everything goes into a hidden folder, is flushed, then renamed. Old ones go last.

    A save that is killed leaves the previous checkpoint as it was.
    """
    final = folder / f"{_PREFIX}{step:08d}"
    partial = folder / f".{final.name}.partial"
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(partial))
    if accelerator.is_main_process:
        (partial / STATE).write_text(json.dumps({"step": step, "stream": stream, "identity": identity}, indent=1))
        for file in [*partial.rglob("*"), partial]:
            _flush(file)
        if final.exists():
            shutil.rmtree(final)
        os.replace(partial, final)
        _flush(folder)
        for old in list_checkpoints(folder)[:-keep_last]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()
    return final


def list_checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints, oldest first."""
    return sorted(entry for entry in folder.glob(f"{_PREFIX}*") if (entry / STATE).is_file())


def choose(resume: str, folder: Path) -> Path | None:
    """The checkpoint that `--resume` means: auto (the last one, or none), never, or a path."""
    found = list_checkpoints(folder)
    if resume == "auto":
        return found[-1] if found else None
    if resume == "never":
        if found:
            raise UsageError(
                "The output folder holds a run already.",
                where=folder,
                expected="no checkpoint, for --resume never",
                got=found[-1].name,
                fix="choose another --output, or --resume auto to go on",
            )
        return None
    path = Path(resume)
    if not (path / STATE).is_file():
        raise UsageError(
            "There is no checkpoint here.",
            where=f"--resume {path}",
            expected=f"a folder with {STATE}",
            got=", ".join(each.name for each in found) or "no checkpoint in the output folder either",
            fix="pass auto, never, or one of the checkpoint folders",
        )
    return path


def read_state(checkpoint: Path, identity: dict[str, Any]) -> dict[str, Any]:
    """The checkpoint's {step, stream}. Raises TrainingError if it belongs to a run with other settings."""
    state: dict[str, Any] = json.loads((checkpoint / STATE).read_text())
    theirs = state["identity"]
    wrong = sorted(name for name in {*theirs, *identity} if theirs.get(name) != identity.get(name))
    if wrong:
        raise TrainingError(
            f"The checkpoint belongs to a run with other settings ({', '.join(wrong)}).",
            where=checkpoint,
            expected=", ".join(f"{name} = {theirs.get(name)!r}" for name in wrong),
            got=", ".join(f"{name} = {identity.get(name)!r}" for name in wrong),
            fix="repeat the run's settings, or start a new run in another --output",
        )
    return state


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
