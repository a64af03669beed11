"""precompute on a device that is too small for a batch."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from inpo.common.errors import OutOfMemory
from inpo.precompute.components import Components
from tests.precompute.conftest import assert_same_but_for_rounding


def _memory_for(images: int) -> Callable[[Components], None]:
    """A device that has room for so many images in the network."""

    def full(module: Any, given: Any, told: Any) -> None:
        if len(given[0]) > images:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    return lambda components: components.denoiser.network.register_forward_pre_hook(full, with_kwargs=True)


def test_the_batch_that_fits_is_found_and_recorded(
    pipelines: Callable, tars: Callable, run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, cache = tars(3, 3), tmp_path / "cache"
    run.prepare = _memory_for(5)
    with pytest.raises(OutOfMemory) as raised:
        run(source, pipelines(), cache, batch_size=3)
    assert "--batch-size 3" in str(raised.value)
    assert "try --batch-size 1" in str(raised.value)
    assert run(source, pipelines(), cache, batch_size="auto") == 0
    assert "batch size: 2 pairs" in capsys.readouterr().err
    told = [each.read_text() for each in sorted((cache / "configurations").iterdir())]
    assert ["batch_size = 3" in told[0], 'batch_size = "auto"' in told[1], "batch_size = 2" in told[2]] == [True] * 3
    run.prepare = _memory_for(1)
    with pytest.raises(OutOfMemory, match="too small for one pair"):
        run(source, pipelines(), tmp_path / "other", batch_size="auto")


def test_the_vae_takes_fewer_images_where_memory_is_short(
    pipelines: Callable, tars: Callable, run: Any, tmp_path: Path, by_id: Callable, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever the batch of the network: no --batch-size would help. Where one does not fit, none is advised."""
    source, tried = tars(6, 6), []

    def has_room(most: int) -> Callable[[Components], None]:
        def full(module: Any, given: Any) -> None:
            tried.append(len(given[0]))
            if len(given[0]) > most:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

        return lambda components: components.images.vae.encoder.register_forward_pre_hook(full)

    whole = run.cache(source, pipelines(), tmp_path / "whole", batch_size=2)
    run.prepare = has_room(5)
    cache = run.cache(source, pipelines(), tmp_path / "cache", batch_size=2)
    assert tried == [12, 6, 3, 3, 3, 3]
    assert "the VAE takes 3 images at a time" in capsys.readouterr().err
    assert_same_but_for_rounding(whole, cache, by_id)
    run.prepare = has_room(0)
    with pytest.raises(OutOfMemory) as raised:
        run(source, pipelines(), tmp_path / "none", batch_size=2)
    assert "--batch-size" not in str(raised.value)
