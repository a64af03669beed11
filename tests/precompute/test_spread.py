"""The spread that precompute stores, and a training run that relies on it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from inpo.common.spread import SPREAD_RECORDS
from inpo.precompute.components import Components


@pytest.mark.parametrize(
    ("kind", "dtype", "settings"),
    [
        ("sd15", "bfloat16", {}),
        ("sd2-v", "float32", {"guidance": 0.0, "profile": "lean"}),
        ("sdxl", "bfloat16", {"inverter": "noise", "timesteps_per_pair": 1}),
    ],
)
def test_a_cache_of_any_dtype_is_trained_from_in_other_batches(
    pipelines: Callable,
    tars: Callable,
    run: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    kind: str,
    dtype: str,
    settings: dict[str, Any],
) -> None:
    from inpo.train.run import run_train

    cache = run.cache(tars(7, 4), pipelines(kind), tmp_path / "cache", dtype=dtype, batch_size=4, **settings)
    spreads = [commit.spread for commit in cache.commits.values()]
    expected = (1e-5, 1e-2) if dtype == "bfloat16" else (1e-9, 1e-6)
    assert all(expected[0] < spread < expected[1] for spread in spreads)
    flags = {"output": tmp_path / "run", "steps": 1, "batch_size": 3, "tracker": "none", "held_out": 0.0}
    assert run_train(None, {"model": str(pipelines(kind))}, [cache.location], flags, resume="never") == 0
    assert "zero-step proof holds" in capsys.readouterr().err


def test_the_records_are_evaluated_again_and_no_more(
    pipelines: Callable, tars: Callable, run: Any, tmp_path: Path
) -> None:
    """Eight latents a shard, however small it is, moved and in batches no larger than the run's."""
    sizes: list[int] = []

    def watch(components: Components) -> None:
        def seen(network: Any, arguments: tuple[Any, ...]) -> None:
            sizes.append(len(arguments[0]))

        components.denoiser.network.register_forward_pre_hook(seen)

    run.prepare = watch
    run.cache(tars(1, 1), pipelines(), tmp_path / "cache", batch_size=2)
    assert sum(sizes) == 2 * (3 + 1) + SPREAD_RECORDS
    assert sizes[-2:] == [4, 4]


def test_a_shard_without_a_pair_has_no_spread(pipelines: Callable, tars: Callable, run: Any, tmp_path: Path) -> None:
    def spoil(components: Components) -> None:
        encode, factors = components.images, iter((1.0, torch.nan))
        components.images = lambda *arguments: encode(*arguments) * next(factors)  # type: ignore[assignment]

    run.prepare = spoil
    commits = run.cache(tars(2, 1), pipelines(), tmp_path / "cache").commits.values()
    assert [(commit.num_pairs, commit.spread is None) for commit in commits] == [(1, False), (0, True)]
