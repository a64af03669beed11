"""Nothing waits for the device: not inside a batch of the inversion, not in a training step."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch

import inpo.precompute.worker as worker
import inpo.train.loop as loop
from inpo.common.cache import Cache
from inpo.common.denoiser import Denoiser


def test_an_inversion(
    device: torch.device, precompute: Callable[..., Cache], no_waits: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the second network call of an inversion to the last one: the first copies tables to the device, and the one
    wait is at the end."""
    predict, invert = Denoiser.predict, worker.invert
    calls: list[torch.device] = []
    expected: list[int] = []
    guard = ExitStack()

    def counted(self: Denoiser, *arguments: Any) -> Any:
        calls.append(self.device)
        if expected and len(calls) == 2:
            guard.enter_context(no_waits())
        output = predict(self, *arguments)
        if [len(calls)] == expected:
            guard.close()
        return output

    def inverted(*arguments: Any, **options: Any) -> Any:
        calls.clear()
        with monkeypatch.context() as patch:
            patch.setattr(Denoiser, "predict", counted)
            return invert(*arguments, **options)

    monkeypatch.setattr(worker, "invert", inverted)
    precompute("counted")
    expected.append(len(calls))
    assert len(calls) > 4
    precompute("guarded")
    assert [len(calls)] == expected
    assert {each.type for each in calls} == {device.type}


def test_training_steps(
    device: torch.device,
    precompute: Callable[..., Cache],
    train: Callable[..., Path],
    no_waits: Callable[[], Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All but the first, which makes the optimiser's state."""
    optimise = loop.Trainer._optimise
    guarded: list[int] = []

    def step(self: loop.Trainer, batches: Iterator[Any]) -> int:
        if self.step == 0:
            return optimise(self, batches)
        guarded.append(self.step)
        with no_waits():
            return optimise(self, batches)

    monkeypatch.setattr(loop.Trainer, "_optimise", step)
    train("run", precompute("cache"), steps=5, log_every=5, save_every=5)
    assert guarded == [1, 2, 3, 4]
