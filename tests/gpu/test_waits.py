"""Nothing waits for the device: not inside a batch of the inversion, not in a training step."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch

import inpo.train.loop as loop
from inpo.common.cache import Cache
from inpo.common.denoiser import Denoiser


def test_an_inversion(
    device: torch.device, precompute: Callable[..., Cache], no_waits: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the first network call of a shard to the last one: the one wait is at its end."""
    import inpo.precompute.worker as worker

    predict, invert = Denoiser.predict, worker.invert
    calls: list[int] = []
    guard = ExitStack()

    def counting(self: Denoiser, *arguments: Any) -> Any:
        calls.append(0)
        return predict(self, *arguments)

    monkeypatch.setattr(Denoiser, "predict", counting)
    monkeypatch.setattr(worker, "measure_spread", lambda *arguments, **options: 0.1)  # which asks for its number
    precompute("counted")
    expected = len(calls)
    assert expected > 4
    calls.clear()

    def guarded(self: Denoiser, *arguments: Any) -> Any:
        calls.append(0)
        if len(calls) == 2:  # the first one copies tables to the device, once
            guard.enter_context(no_waits())
        output = predict(self, *arguments)
        if len(calls) == expected:
            guard.close()
        return output

    monkeypatch.setattr(Denoiser, "predict", guarded)
    precompute("guarded")
    assert len(calls) == expected
    assert worker.invert is invert


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
