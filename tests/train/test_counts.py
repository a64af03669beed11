"""What a training step costs, counted: network calls, waits for the device, bytes read, bytes held. No clock."""

import functools
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextModel

from benchmarks.tensor_watch import TensorWatch
from inpo.common.cache import Cache, open_cache
from inpo.common.cache.arrays import CommittedStore
from inpo.common.denoiser import Denoiser
from inpo.train.buffers import Buffers
from inpo.train.index import build_index
from inpo.train.records import Needs
from inpo.train.stream import RecordStream


def test_one_network_call_per_micro_batch_and_one_network(
    run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    made: Counter[str] = Counter()
    predict = Denoiser.predict
    monkeypatch.setattr(Denoiser, "predict", lambda self, x, *rest: (calls.append(len(x)), predict(self, x, *rest))[1])
    for kind in (UNet2DConditionModel, AutoencoderKL, CLIPTextModel):
        load = kind.from_pretrained

        @functools.wraps(load)
        def counted(*args: Any, _load: Any = load, _name: str = kind.__name__, **kwargs: Any) -> Any:
            made[_name] += 1
            return _load(*args, **kwargs)

        monkeypatch.setattr(kind, "from_pretrained", counted)

    def train(steps: int, output: Path) -> list[int]:
        calls.clear()
        run(steps=steps, accumulate=3, batch_size=2, log_every=100, output=output)
        return list(calls)

    folder = Path(run(steps=1, output=None)).parent
    made.clear()
    short, long = train(2, folder / "short"), train(7, folder / "long")
    # Five steps more are 15 calls more, each of the 2 x 2 images of a micro-batch, win and lose together.
    assert Counter(long) - Counter(short) == Counter({4: 15})
    # Two runs: each reads one network to train; the pipelines that they write at the end hold theirs and the base's
    # parts, which are read then and not before.
    assert made["UNet2DConditionModel"] == 2
    assert made["AutoencoderKL"] <= 2
    assert made["CLIPTextModel"] <= 2


def test_micro_batches_wait_for_nothing_and_the_device_is_asked_once_per_log(
    run: Callable[..., Path], tmp_path: Path
) -> None:
    def waits(**flags: Any) -> int:
        settings = {"steps": 3, "accumulate": 1, "log_every": 100, "save_every": 100} | flags
        name = "-".join(f"{name}-{value}" for name, value in flags.items()) or "plain"
        with TensorWatch() as watch:
            run(output=tmp_path / name, **settings)
        return watch.waits.total()

    plain = waits()
    # On a CPU AdamW keeps its step numbers as tensors beside the weights and asks for them; a micro-batch does not.
    assert waits(accumulate=2) == plain
    # Two logs and three instead of one: each asks whether all was finite, and for the gradient's norm.
    assert waits(log_every=2) - plain == 2
    assert waits(log_every=1) - plain == 4


def test_an_epoch_reads_every_needed_byte_once_and_no_other(cache: str, monkeypatch: pytest.MonkeyPatch) -> None:
    read: Counter[str] = Counter()
    original = CommittedStore.get

    async def get(self: CommittedStore, key: str, *args: Any, **kwargs: Any) -> Any:
        found = await original(self, key, *args, **kwargs)
        if not key.endswith("zarr.json"):
            read[key.split("/c/")[0].removesuffix("/c")] += len(found) if found is not None else 0
        return found

    monkeypatch.setattr(CommittedStore, "get", get)
    opened = open_cache(cache)
    stream = _one_window_an_epoch(opened)
    batches = iter(stream)
    for _ in range(opened.num_records // 3):  # one window; the next ones are read ahead meanwhile
        next(batches)
    stream.close()  # lets a window that is being read be read to its end
    sizes: Counter[str] = Counter()
    for shard in opened:
        for file, size in shard.commit.files.items():
            if not file.endswith("zarr.json"):
                sizes[file.split("/c/")[0].removesuffix("/c")] += size
    windows = read["x_t"] // sizes["x_t"]
    assert 2 <= windows <= 3
    for name in ("x_t", "target"):
        # Data once per window; the sharding codec's index is read apart from its chunks.
        assert windows * sizes[name] <= read[name] <= 1.05 * windows * sizes[name], name
    assert not {"x0", "delta", "x0_t"} & read.keys()


def test_windows_are_read_into_the_memory_of_earlier_ones(cache: str, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[np.ndarray] = []  # held, so that fresh memory never has an earlier one's address
    take = Buffers.take

    def counted(self: Buffers, *args: Any) -> Any:
        array = take(self, *args)
        taken.append(array.base)
        return array

    monkeypatch.setattr(Buffers, "take", counted)
    opened = open_cache(cache)
    stream = _one_window_an_epoch(opened)
    batches = iter(stream)
    for _ in range(4 * opened.num_records // 3):
        next(batches)
    stream.close()
    # Each window takes x_t and target of each shard; memory there is for the current window and the one read ahead.
    each = 2 * len(opened.shards)
    assert len(taken) >= 4 * each
    assert len({id(memory) for memory in taken}) <= 3 * each


def test_no_more_is_held_than_one_network_in_training_needs(
    world: Any, cache: str, run: Callable[..., Path], tmp_path: Path
) -> None:
    def peak(**flags: Any) -> int:
        with TensorWatch() as watch:
            run(output=tmp_path / "-".join(map(str, flags.values())), steps=2, save_every=100, **flags)
        return watch.peak

    weights = sum(p.numel() * p.element_size() for p in world.model.load_network().parameters())
    unet = world.model.load_network().train()
    one = _inputs(world, cache, 4)
    with TensorWatch() as alone:
        unet(**one).sample.square().mean().backward()
    # Beside one forward and backward: the weights as loaded, two moments, and what AdamW works with.
    whole = peak(batch_size=2)
    assert whole <= 1.1 * (alone.peak + 4 * weights)
    # Accumulating holds the gradients while the next graph is built, and no second graph.
    assert peak(batch_size=2, accumulate=2) <= 1.02 * (whole + weights)
    assert json.loads((tmp_path / "2" / "metrics.jsonl").read_text().splitlines()[-1])["step"] == 2


def _one_window_an_epoch(cache: Cache) -> RecordStream:
    return RecordStream(
        build_index([cache], soft=False, held_out=0.0), Needs(), batch_size=3, window_shards=len(cache.shards), seed=0
    )


def _inputs(world: Any, cache: str, images: int) -> dict[str, torch.Tensor]:
    shard = next(iter(open_cache(cache)))
    embedding = torch.from_numpy(shard.read("prompt/embedding")).float()
    return {
        "sample": torch.from_numpy(shard.read("x_t")).float().flatten(0, 2)[:images],
        "timestep": torch.full((images,), 500),
        "encoder_hidden_states": embedding[:1].expand(images, -1, -1),
    }
