"""Checkpoints: everything that the next step depends on, in a folder that appears whole or not at all.

    step-00000100/model.safetensors       the network's weights (trained.safetensors: the LoRA layers alone)
                  optimizer, schedule, scaler, ema, random-<process>    states, as common/state_files.py writes them
                  run.json                written last, sealed: step, stream, identity, size and digest of each file

A checkpoint is held against its seal, all of it, before the first byte is used; nothing in it is code.
"""

import functools
import hashlib
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, gather_object
from diffusers.training_utils import EMAModel
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, Strict, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from inpo.common.cache.document import check_seal, load, sealed
from inpo.common.durable import new_folder, remove, storage_errors
from inpo.common.errors import CacheError, StorageError, TrainingError, UsageError
from inpo.common.state_files import read_state, write_state

_NAME = re.compile(r"step-(\d{8,})")
_NO_SETTING = {
    "init_from_network": (
        "that began with other weights",
        "pass the --init-from that it began with, as it was then, or start a new run in another --output",
    ),
    "world_size": (
        "of another number of processes",
        "resume with as many processes as before; to change that, start a new run: --init-from RUN/pipeline --output "
        "NEW",
    ),
    "network_dtype": ("on caches of another dtype", "name its caches, or start a new run in another --output"),
    "index": (
        "on other pairs",
        "name its caches, in their order, and its --labels, --only, --except and --timestep-range; where a cache or a "
        "label set has changed since, start a new run in another --output",
    ),
    "caches": ("on caches of another model", "name its caches, or start a new run in another --output"),
}
"""{part of the identity that is no setting of its own: (what a run of another one is, what to do)}."""
STATE = "run.json"
WEIGHTS = "model.safetensors"
TRAINED = "trained.safetensors"
_THREADS = 8


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class FileSeal(_Strict):
    """What a file was when the checkpoint was written."""

    bytes: NonNegativeInt
    digest: Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
    """blake2b with 128 bits over all of it."""


class RunDocument(_Strict):
    """run.json."""

    step: PositiveInt
    stream: dict[str, Any]
    """Where the record stream goes on."""
    identity: dict[str, Any]
    """The settings that change the trajectory."""
    held_out: list[Annotated[tuple[NonNegativeInt, float, PositiveInt], Strict(False)]]
    """The held-out evaluations so far: step, accuracy, records."""
    files: dict[Annotated[str, Field(pattern=r"^[a-z0-9-]+\.(json|safetensors)$")], FileSeal]
    checksum: str


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A checkpoint that was found whole."""

    path: Path
    document: RunDocument

    @property
    def step(self) -> int:
        return self.document.step

    def check_identity(self, identity: dict[str, Any]) -> None:
        """Raise TrainingError if it belongs to another run. Where settings differ, those are named alone: that the
        pairs are others may be their doing.
        """
        theirs = self.document.identity
        wrong = {name for name in {*theirs, *identity} if theirs.get(name) != identity.get(name)}
        if not wrong:
            return
        settings = sorted(wrong - _NO_SETTING.keys())
        if settings:
            kind = f"with other settings ({', '.join(settings)})"
            fix = "repeat the run's settings, or start a new run in another --output"
        else:
            kind, fix = next(told for name, told in _NO_SETTING.items() if name in wrong)
        shown = settings or sorted(wrong & {"world_size", "network_dtype"})  # the others are digests
        raise TrainingError(
            f"The checkpoint belongs to a run {kind}.",
            where=self.path,
            expected=", ".join(f"{name} = {theirs.get(name)!r}" for name in shown) or None,
            got=", ".join(f"{name} = {identity.get(name)!r}" for name in shown) or None,
            fix=fix,
        )


@dataclass(frozen=True, kw_only=True)
class Resumable:
    """The parts of a run that a checkpoint holds."""

    accelerator: Accelerator
    network: nn.Module
    """As accelerate wrapped it."""
    optimizer: Any
    schedule: torch.optim.lr_scheduler.LRScheduler
    ema: EMAModel | None

    @property
    def _sharded(self) -> bool:
        return bool(self.accelerator.distributed_type == DistributedType.FSDP)

    @property
    def _bare_optimizer(self) -> torch.optim.Optimizer:
        bare: torch.optim.Optimizer = self.optimizer.optimizer
        return bare

    @property
    def _weights_name(self) -> str:
        return TRAINED if self._bare_and_frozen()[1] else WEIGHTS

    def _bare_and_frozen(self) -> tuple[nn.Module, set[str]]:
        bare = self.accelerator.unwrap_model(self.network)
        return bare, {name for name, each in bare.named_parameters() if not each.requires_grad}

    @property
    def _plain(self) -> dict[str, Any]:
        """What has a state of its own that is the same in every process."""
        parts = {"schedule": self.schedule, "scaler": self.accelerator.scaler, "ema": self.ema}
        return {name: part for name, part in parts.items() if part is not None}

    def collect(self) -> dict[str, Any]:
        """The states by the names they are written under, whole in the first process. Takes all processes."""
        if self._sharded:
            weights, optimizer = full_state(self.network, self._bare_optimizer)
        else:
            bare, frozen = self._bare_and_frozen()
            weights = {name: each for name, each in bare.state_dict().items() if name not in frozen}
            optimizer = self._bare_optimizer.state_dict()
        states = {self._weights_name: weights, "optimizer": optimizer}
        states |= {name: part.state_dict() for name, part in self._plain.items()}
        generators = gather_object([_generators(self.accelerator.device)])
        return states | {f"random-{process}": state for process, state in enumerate(generators)}

    def read(self, checkpoint: Checkpoint) -> None:
        """Take over a checkpoint's states. Raises TrainingError if they are not those of such a run."""
        place = checkpoint.path
        try:
            if self._sharded:
                main = self.accelerator.is_main_process
                weights = load_file(place / self._weights_name) if main else {}
                set_full_state(
                    self.network, self._bare_optimizer, weights, read_state(place, "optimizer") if main else {}
                )
            else:
                bare, frozen = self._bare_and_frozen()
                found = bare.load_state_dict(load_file(place / self._weights_name), strict=False)
                if found.unexpected_keys or set(found.missing_keys) - frozen:
                    raise ValueError("the weights have other names")
                self._bare_optimizer.load_state_dict(read_state(place, "optimizer"))
                _lay_out(self._bare_optimizer)
            for name, part in self._plain.items():
                part.load_state_dict(read_state(place, name))
            if self.ema is not None:
                self.ema.to(self.accelerator.device)
            _set_generators(read_state(place, f"random-{self.accelerator.process_index}"), self.accelerator.device)
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
            raise TrainingError(
                "The checkpoint is whole, but not one of such a run.",
                where=place,
                got=f"{type(error).__name__}: {error}"[:300],
                fix="pass another checkpoint to --resume, or start a new run in another --output",
            ) from error


def _lay_out(optimizer: torch.optim.Optimizer) -> None:
    """Give state the memory order of its parameters, as it had when it was made. Files keep plain order, and a fused
    kernel goes through both as they lie in memory: it refuses two orders, or mixes up the entries."""
    for parameter, state in optimizer.state.items():
        for name, each in state.items():
            alike = isinstance(each, torch.Tensor) and each.shape == parameter.shape
            if alike and each.stride() != parameter.stride():
                state[name] = torch.empty_like(parameter, dtype=each.dtype, device=each.device).copy_(each)


def full_state(network: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[dict[str, Any], dict[str, Any]]:
    """Whole weights and optimiser state of a sharded network, on the CPU of the first process; others get nothing."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return get_model_state_dict(network, options=options), get_optimizer_state_dict(network, optimizer, options=options)


def set_full_state(
    network: nn.Module, optimizer: torch.optim.Optimizer, weights: dict[str, Any], state: dict[str, Any]
) -> None:
    """The opposite of `full_state`: the first process has the whole, every process takes its shards."""
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(network, weights, options=options)
    set_optimizer_state_dict(network, optimizer, state, options=options)


def save(
    parts: Resumable,
    folder: Path,
    *,
    step: int,
    stream: dict[str, Any],
    identity: dict[str, Any],
    held_out: Sequence[tuple[int, float, int]],
    keep_last: int,
) -> Path:
    """Write `folder`/step-N, then remove what is older than the last `keep_last`, and what is of later steps: a run
    that went on from an earlier checkpoint has left them behind.

    Raises StorageError; the checkpoints that there were stay then.
    """
    final = folder / f"step-{step:08d}"
    states = parts.collect()
    if parts.accelerator.is_main_process:
        with new_folder(final, replace=True, action="write the checkpoint") as staged:
            for name, state in states.items():
                if name in (WEIGHTS, TRAINED):
                    save_file({key: each.detach().contiguous() for key, each in state.items()}, staged / name)
                else:
                    write_state(staged, name, state)
            document = {
                "step": step,
                "stream": stream,
                "identity": identity,
                "held_out": held_out,
                "files": {file.name: _seal(file).model_dump() for file in sorted(staged.iterdir())},
            }
            (staged / STATE).write_bytes(sealed(document))
        with storage_errors("remove an old checkpoint", folder):
            found = list_checkpoints(folder)
            until = found.index(final) + 1
            for old in [*found[: max(until - keep_last, 0)], *found[until:]]:
                remove(old)
    parts.accelerator.wait_for_everyone()
    return final


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints, whole or not, by their steps."""
    found = {int(match[1]): entry for entry in folder.glob("step-*") if (match := _NAME.fullmatch(entry.name))}
    return [found[step] for step in sorted(found)]


def choose(resume: str, folder: Path, *, say: Callable[[str], None]) -> Checkpoint | None:
    """The checkpoint that `--resume` means: auto (the last whole one, or none), never, or a path.

    Raises UsageError if there is none where one must be or one where none may be, and TrainingError if there are
    checkpoints but none is whole, StorageError if one cannot be looked at. A damaged one that is passed over is named
    through `say`. A path's is refused where there are checkpoints of another run.
    """
    found = list_checkpoints(folder)
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
    if resume != "auto" and not (path / STATE).is_file():
        raise UsageError(
            "There is no checkpoint here.",
            where=f"--resume {path}",
            expected=f"a folder with {STATE}",
            got=", ".join(each.name for each in found) or "no checkpoint in the output folder either",
            fix="pass auto, never, or one of the checkpoint folders",
        )
    damaged: list[str] = []
    for each in reversed(found) if resume == "auto" else [path]:
        document = _verified(each)
        if isinstance(document, RunDocument):
            if resume != "auto":
                _refuse_another(document, path, found)
            for line in damaged:
                say(f"{line}; going on from {each.name}, the last whole one")
            return Checkpoint(path=each, document=document)
        damaged.append(f"{each.name} is damaged ({document})")
    if damaged:
        raise TrainingError(
            "The checkpoint is not whole." if resume != "auto" else "No checkpoint of this run is whole.",
            where=folder if resume == "auto" else path,
            expected=f"the files that {STATE} names, as they were written",
            got="; ".join(damaged),
            fix="restore it from a copy, take another one with --resume PATH, or start a new run in another --output",
        )
    return None


def _refuse_another(document: RunDocument, path: Path, found: Sequence[Path]) -> None:
    """Raise UsageError if a checkpoint in the output folder is another run's: later ones would be removed."""
    for each in found:
        there = _document(each)
        if isinstance(there, RunDocument) and there.identity != document.identity:
            raise UsageError(
                "The output folder holds a run already.",
                where=each.parent,
                expected=f"no checkpoint of another run than that of --resume {path}",
                got=each.name,
                fix="choose another --output, or --resume auto to go on with the run that is there",
            )


def _document(path: Path) -> RunDocument | str:
    """The checkpoint's document if it is the one that was written, else what is wrong. Raises StorageError where the
    disk refuses: a checkpoint that is passed over is removed later, and this one may be whole."""
    try:
        data = load((path / STATE).read_bytes(), STATE)
        check_seal(data, STATE, what=STATE, fix="")
        return RunDocument.model_validate(data)
    except (CacheError, ValidationError, RecursionError):
        return f"{STATE} is not the one that was written"
    except OSError as error:
        return _missing(error, path)


def _missing(error: OSError, path: Path) -> str:
    """What a checkpoint lacks. Raises StorageError if that cannot be known."""
    if isinstance(error, (FileNotFoundError, IsADirectoryError, NotADirectoryError)):
        return f"{Path(error.filename or STATE).name}: {error.strerror}"
    raise StorageError(
        f"A checkpoint could not be read: {error.strerror}.",
        where=error.filename or path,
        fix="bring the disk back or mend the mode, then run the same command again; or pass another --resume PATH",
    ) from error


def _verified(path: Path) -> RunDocument | str:
    """The checkpoint's document if every file is the one that was written, else what is wrong."""
    document = _document(path)
    if isinstance(document, str):
        return document
    try:
        with ThreadPoolExecutor(_THREADS) as pool:
            seals = pool.map(_seal, [path / name for name in document.files])
            wrong = [name for (name, seal), now in zip(document.files.items(), seals, strict=True) if seal != now]
    except OSError as error:
        return _missing(error, path)
    if wrong:
        return f"{', '.join(wrong)} {'is' if len(wrong) == 1 else 'are'} not as written"
    match, each = _NAME.fullmatch(path.name), document.identity.get("accumulate")
    counted = isinstance(each, int) and document.stream.get("consumed") == document.step * each
    if not counted or (match and int(match[1]) != document.step):
        return f"{STATE} is of another step"
    return document


def _seal(file: Path) -> FileSeal:
    with file.open("rb") as stream:
        total = hashlib.file_digest(stream, functools.partial(hashlib.blake2b, digest_size=16))
    return FileSeal(bytes=file.stat().st_size, digest=total.hexdigest())


def _generators(device: torch.device) -> dict[str, torch.Tensor]:
    """States of torch's generators of random numbers; nothing in a step draws from others."""
    states = {"cpu": torch.get_rng_state()}
    if device.type != "cpu":
        states["device"] = torch.get_device_module(device).get_rng_state()
    return states


def _set_generators(states: dict[str, torch.Tensor], device: torch.device) -> None:
    torch.set_rng_state(states["cpu"])
    if device.type != "cpu":
        torch.get_device_module(device).set_rng_state(states["device"])
