"""What a training step costs, counted: network calls, waits for the device, bytes read, bytes held. No clock."""

import functools
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextModel

from inpo.common.cache import Cache, open_cache
from inpo.common.cache.committed import CommittedArrays
from inpo.common.denoiser import Denoiser
from inpo.common.tensor_watch import TensorWatch
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
    short, long = train(2, folder / "short"), train(4, folder / "long")
    # Two steps more are 6 calls more, each of the 2 x 2 images of a micro-batch, win and lose together.
    assert Counter(long) - Counter(short) == Counter({4: 6})
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
    # Three logs instead of one: each asks whether all was finite, and for the gradient's norm.
    assert waits(log_every=1) - plain == 4


def test_an_epoch_reads_every_needed_byte_once_and_no_other(cache: str, monkeypatch: pytest.MonkeyPatch) -> None:
    read: Counter[str] = Counter()
    original = CommittedArrays._ranges

    def ranges(self: CommittedArrays, file: str, spans: Any) -> list[bytes]:
        found = original(self, file, spans)
        read[file.split("/c/")[0]] += sum(map(len, found))
        return found

    monkeypatch.setattr(CommittedArrays, "_ranges", ranges)
    opened = open_cache(cache)
    stream = _one_window_a_slice(opened)
    batches = iter(stream)
    for _ in range(opened.num_records // 3):  # one epoch; the next one's windows are read ahead meanwhile
        next(batches)
    stream.close()  # lets a window that is being read be read to its end
    sizes: Counter[str] = Counter()
    for shard in opened:
        for file, size in shard.commit.files.items():
            sizes[file.split("/c/")[0]] += size
    for name in ("x_t", "target"):
        # A window is one of the two slices of an epoch. Each shard's chunk index is read once.
        index = sum(16 * shard.num_images * 2 + 4 for shard in opened)
        windows = (read[name] - index) / ((sizes[name] - index) / 2)
        assert windows in (2, 3, 4, 5, 6), name  # how far it reads ahead is up to the machine
    assert not {"x0", "delta", "x0_t"} & read.keys()


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


def _one_window_a_slice(cache: Cache) -> RecordStream:
    return RecordStream(
        build_index([cache], soft=False, held_out=0.0), Needs(), batch_size=3, window_shards=len(cache.shards), seed=0
    )


def _inputs(world: Any, cache: str, images: int) -> dict[str, torch.Tensor]:
    shard = next(iter(open_cache(cache)))
    (text,) = (text for text in shard.cache.texts if text.name == "texts")
    embedding = torch.from_numpy(text.read_stored("embedding")).float()
    return {
        "sample": torch.from_numpy(shard.read("x_t")).float().flatten(0, 1)[:images],
        "timestep": torch.full((images,), 500),
        "encoder_hidden_states": embedding[:1].expand(images, -1, -1),
    }


def test_no_weight_is_written_out_as_text(run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Python's signal module does that with a handler's object, for a message that nobody sees."""
    monkeypatch.setattr(torch.nn.Parameter, "__repr__", lambda _: pytest.fail("a weight as text"))
    assert (run(steps=1) / "pipeline").is_dir()


@pytest.mark.parametrize(
    ("work", "waits"),
    [
        (lambda x: x.sum().item(), 1),
        (lambda x: bool((x > 0).any()), 1),
        (lambda x: x[x > 0], 1),
        (lambda x: x.masked_select(x > 0), 1),
        (lambda x: x.__setitem__(x > 0, x.new_zeros(())), 1),
        (lambda x: x.unique(), 1),
        (lambda x: x.repeat_interleave(x.new_ones(4, dtype=torch.int64)), 1),
        (lambda x: x.nonzero(), 1),
        (lambda x: x[torch.tensor([2, 0])], 0),
        (lambda x: x.repeat_interleave(2), 0),
        (lambda x: torch.where(x > 0, x, 0).sum(), 0),
    ],
    ids=range(11),
)
def test_what_a_gpu_would_be_waited_for_is_counted(work: Callable[[Any], object], waits: int) -> None:
    x = torch.tensor([1.0, -1.0, 2.0, 0.0])
    with TensorWatch() as watch:
        work(x)
    assert min(watch.waits.total(), 1) == waits
