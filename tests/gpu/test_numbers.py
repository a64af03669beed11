"""Numbers on a device whose kernels depend on the batch: what may differ is what the spread explains."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from inpo.common.cache import Cache
from inpo.common.compiled import compile_network, uses_graphs
from inpo.common.denoiser import Denoiser, prepare_for_inference
from inpo.common.models import open_model
from inpo.train.index import build_index
from inpo.train.proof import run_proof

_COMPILED = pytest.mark.parametrize(
    "device", [pytest.param("cpu", marks=pytest.mark.slow), pytest.param("cuda", marks=pytest.mark.gpu)], indirect=True
)
"""Compiled networks on a CPU are train/test_options.py's and precompute/test_compiled.py's as well."""


def _denoiser(model: Path, cache: Cache, device: torch.device) -> Denoiser:
    opened = open_model(str(model))
    network = opened.load_network()
    prepare_for_inference(network, network_dtype=cache.manifest.network_dtype, device=device)
    return opened.denoiser(network, cache.manifest, network_dtype=cache.manifest.network_dtype)


def _proof(model: Path, cache: Cache, device: torch.device, batch_size: int) -> Any:
    index = build_index([cache], soft=False, held_out=0.0)
    return run_proof(_denoiser(model, cache, device), index, batch_size=batch_size)


def _close(left: Cache, right: Cache) -> None:
    """The same timesteps; latents apart by what bfloat16's rounding makes of a few steps."""
    for mine, other in zip(left, right, strict=True):
        assert np.array_equal(mine.read("timestep"), other.read("timestep"))
        for name in ("x0", "x_t"):
            one, two = (each.read(name).astype(np.float64) for each in (mine, other))
            assert np.sqrt(np.square(one - two).mean() / np.square(one).mean()) < 0.05, name


def test_two_batch_sizes_make_the_same_cache(
    model: Path, device: torch.device, precompute: Callable[..., Cache]
) -> None:
    """Each cache's errors are those of the other's batches, but for the spread that it stores."""
    large, small = precompute("large", batch_size=6), precompute("small", batch_size=1)
    _close(large, small)
    for cache, batch_size in ((large, 1), (small, 6)):
        assert all(shard.commit.spread for shard in cache)
        proof = _proof(model, cache, device, batch_size)
        assert proof.holds, proof


@_COMPILED
@pytest.mark.parametrize("how", ["blocks", "whole"])
def test_a_compiled_network_makes_the_same_cache(
    how: Any, model: Path, device: torch.device, precompute: Callable[..., Cache], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Real kernels on a GPU, of the whole network as a CUDA graph; on a CPU graphs are captured as ever, and run by
    PyTorch."""
    if device.type == "cpu":
        monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    torch.compiler.reset()
    eager, compiled = precompute("eager"), precompute("compiled", compile=how)
    _close(eager, compiled)
    assert _proof(model, compiled, device, 3).holds
    denoiser, images, opened = _denoiser(model, eager, device), 6, open_model(str(model))
    blank = opened.family.blank(opened.config, images, (32, 32))

    def first() -> None:
        with torch.no_grad():
            denoiser.predict(
                torch.zeros(images, 4, 8, 8, device=device),
                torch.zeros(images, dtype=torch.int64, device=device),
                blank.to(device),
            )

    assert compile_network(
        denoiser.network, how, first, blocks=(), device=device, graphs=uses_graphs(how, device, images)
    )
    denoiser.rows = images
    assert run_proof(denoiser, build_index([eager], soft=False, held_out=0.0), batch_size=3).holds


def test_a_run_that_is_resumed_is_the_run_that_was_not(
    device: torch.device, precompute: Callable[..., Cache], train: Callable[..., Path]
) -> None:
    """To the last digit on a CPU; on a GPU as far as its kernels repeat themselves."""
    cache = precompute("cache")
    whole = train("whole", cache)
    train("parts", cache, steps=2)
    parts = train("parts", cache)

    def losses(folder: Path) -> list[float]:
        return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]

    assert len(losses(whole)) == len(losses(parts)) == 3
    assert losses(parts) == pytest.approx(losses(whole), rel=0.0 if device.type == "cpu" else 0.02, abs=0.0)


@_COMPILED
def test_compiled_training_is_eager_training_but_for_rounding(
    device: torch.device, precompute: Callable[..., Cache], train: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gradients of a graph are added up in memory of the trainer's own, over two micro-batches. Kernels round in their
    own way, and beta multiplies it: in bfloat16 an error of a record moves by about 1e-4, which at this beta moves the
    loss by 0.005. With this epsilon an update is as long as its gradient, so that no sign is left to rounding."""
    if device.type == "cpu":
        monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    torch.compiler.reset()
    cache = precompute("cache")
    runs = [
        train(how, cache, compile=how, accumulate=2, log_every=1, beta=100.0, adam_eps=1e-2) for how in ("off", "whole")
    ]
    lines = [[json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in runs]
    for eager, compiled in zip(*lines, strict=True):
        for name in ("loss", "gradient_norm"):
            assert compiled[name] == pytest.approx(eager[name], rel=0.05, abs=0.01), name
