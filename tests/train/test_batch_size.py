"""Too large a batch: in words, with the one to try; and `--batch-size auto`, which finds one that fits."""

import json
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import inpo.train.run as train_run
from inpo.common.batch_size import MOST, find_batch_size, memory_in_words
from inpo.common.errors import OutOfMemory, TrainingError, UsageError
from inpo.train.checkpoint import list_checkpoints
from inpo.train.settings import TrainSettings

ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nand much more"),
    RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)"),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
    MemoryError("Unable to allocate 9 GiB for an array"),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_whatever_a_device_says_becomes_words(error: Exception) -> None:
    with pytest.raises(OutOfMemory) as raised, memory_in_words(12, smaller="or less", otherwise="no more"):
        raise error
    said = str(raised.value)
    assert "--batch-size 12" in said
    assert "try --batch-size 6" in said
    assert "or less" in said
    assert str(error).splitlines()[0] in said
    with pytest.raises(OutOfMemory, match="no more"), memory_in_words(1, otherwise="no more"):
        raise error


@pytest.mark.parametrize(
    "error", [RuntimeError("shapes differ"), TrainingError("mine", fix=""), OutOfMemory("mine", fix="")]
)
def test_what_says_something_else_is_raised_as_it_is(error: Exception) -> None:
    with pytest.raises(type(error)) as raised, memory_in_words(12, otherwise="no more"):
        raise error
    assert raised.value is error


@pytest.mark.parametrize(("fits", "found"), [(1, 1), (2, 2), (7, 4), (8, 8), (10_000, MOST)])
def test_the_largest_power_of_two_is_found(fits: int, found: int, capsys: pytest.CaptureFixture[str]) -> None:
    tried: list[int] = []

    def trial(pairs: int) -> None:
        tried.append(pairs)
        if pairs > fits:
            raise torch.OutOfMemoryError("full")

    assert find_batch_size(trial, otherwise="no more") == found
    assert tried == sorted(set(tried))
    assert f"batch size: {found} pairs" in capsys.readouterr().err
    assert find_batch_size(trial, least=lambda mine: min(mine, 1), otherwise="no more") == 1  # another process


def test_one_pair_that_does_not_fit_ends_it_everywhere() -> None:
    def trial(pairs: int) -> None:
        raise torch.OutOfMemoryError("full")

    with pytest.raises(OutOfMemory, match="no more"):
        find_batch_size(trial, otherwise="no more")
    with pytest.raises(OutOfMemory):
        find_batch_size(lambda pairs: None, least=lambda mine: 0, otherwise="no more")
    with pytest.raises(UsageError):  # what is no lack of memory is nobody's batch size
        find_batch_size(_refuse, otherwise="no more")


def _refuse(pairs: int) -> None:
    raise UsageError("mine", fix="none")


@contextmanager
def _memory_for(images: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A device that has room for so many images of 8 x 8 latents in the network, and for twice as many without
    gradients."""
    prepare = train_run.prepare_network

    def watched(network: torch.nn.Module, *arguments: Any, **options: Any) -> Any:
        def full(module: Any, given: Any, told: Any) -> None:
            if given[0][:, 0].numel() > 64 * images * (1 if torch.is_grad_enabled() else 2):
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

        network.register_forward_pre_hook(full, with_kwargs=True)
        return prepare(network, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(train_run, "prepare_network", watched)
        yield


def test_a_run_whose_batch_is_too_large_says_which_to_try(
    run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with _memory_for(4, monkeypatch), pytest.raises(OutOfMemory) as raised:
        run(batch_size=6)
    for words in ("--batch-size 6", "try --batch-size 3", "--batch-size auto", "--accumulate"):
        assert words in str(raised.value)
    with _memory_for(1, monkeypatch), pytest.raises(OutOfMemory, match="--gradient-checkpointing"):
        run(batch_size=1)


def test_a_run_finds_its_batch_and_keeps_it(run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal to a run that was told the number; and what is recorded is the number, with which it goes on."""
    with _memory_for(5, monkeypatch):
        found = run(batch_size="auto", steps=2, save_every=2, output=None)
    recorded = tomllib.loads((found / "recipe.toml").read_text())["train"]["batch_size"]
    (place,) = list_checkpoints(found / "checkpoints")
    assert recorded == json.loads((place / "run.json").read_text())["identity"]["batch_size"] == 2
    told = run(batch_size=2, steps=2, save_every=2, output=found.with_name("told"))

    def losses(folder: Path) -> list[float]:
        return [json.loads(each)["loss"] for each in (folder / "metrics.jsonl").read_text().splitlines()]

    assert losses(found) == losses(told)
    with _memory_for(100, monkeypatch):  # more room now changes nothing
        run(batch_size="auto", steps=4, save_every=2)
    assert tomllib.loads((found / "recipe.toml").read_text())["train"]["batch_size"] == 2
    with pytest.raises(TrainingError, match="batch_size"):
        run(batch_size=4, steps=6)


def test_the_batch_that_is_found_fits_the_largest_of_several_shapes(
    world: Any, run: Callable[..., Path], cache: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = world.cache(tmp_path / "small", shards=(4,), side=4)
    with _memory_for(5, monkeypatch):
        found = run(batch_size="auto", steps=6, caches=[small, cache])
    assert tomllib.loads((found / "recipe.toml").read_text())["train"]["batch_size"] == 2


@pytest.mark.parametrize("value", [0, -1, "0", "many", True, 1.5])
def test_other_batch_sizes_are_refused(value: Any) -> None:
    with pytest.raises(ValueError, match="not true or false" if value is True else "auto, or a number above 0"):
        TrainSettings(batch_size=value)
