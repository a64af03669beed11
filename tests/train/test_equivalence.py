"""Different ways to the same weights: inversion on the fly, accumulation, lean caches; and a trace of the loss."""

import json
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from torch import Tensor

from inpo.common.cache import open_cache
from inpo.common.conditions import Condition
from inpo.common.inversion import Group, invert
from inpo.train.index import build_index
from inpo.train.order import GlobalOrder, OrderedShard

GOLDEN = Path(__file__).parent / "golden_trace.json"
EPS = 1e-2
"""Adam's eps in comparisons: at 1e-8 a weight without gradient takes a whole step in the direction of its rounding."""


def weights(output: Path) -> dict[str, Tensor]:
    return dict(UNet2DConditionModel.from_pretrained(output / "pipeline", subfolder="unet").state_dict())


def difference(left: dict[str, Tensor], right: dict[str, Tensor]) -> float:
    assert left.keys() == right.keys()
    return max(float((left[name] - right[name]).abs().max()) for name in left)


def metrics(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def test_cached_training_equals_inversion_on_the_fly(world: Any, cache: str, run: Callable[..., Path]) -> None:
    """More than an epoch from the cache, and as many steps of a loop written here that inverts with the frozen
    reference every time."""
    output = run(steps=10, batch_size=2, learning_rate=1e-4, adam_eps=EPS)

    opened = open_cache(cache)
    manifest = opened.manifest
    shards = [part.shard for part in build_index([opened], soft=False, held_out=0.0).training]
    ordered = [
        OrderedShard(group=np.arange(shard.num_pairs), num_records=manifest.timesteps_per_pair) for shard in shards
    ]
    order = GlobalOrder(ordered, window_shards=4, seed=0)
    (text,) = (text for text in opened.texts if text.name == "texts")
    embedding = torch.from_numpy(text.read_stored("embedding")).float()
    reference = world.model.denoiser(world.model.load_network().eval())
    unet = world.model.load_network().train()
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-4, betas=(0.9, 0.999), eps=EPS, weight_decay=1e-2)
    for step in range(10):
        rows, kept = [], []
        for each in order.micro_batch(step, 2):
            number, pair, which = order.shuffled(each.key)[each.offset].tolist()
            rows.append((shards[number], pair))
            kept += [which, which]
        captions = embedding[[int(shard.read("group/prompt")[pair, 1]) for shard, pair in rows]].repeat_interleave(2, 0)
        inverted = invert(
            reference,
            torch.from_numpy(np.concatenate([shard.read("x0")[2 * pair : 2 * pair + 2] for shard, pair in rows])),
            [Group(id=str(shard.read("pair/id")[pair]), num_images=2) for shard, pair in rows],
            identity=manifest.inverter,
            seed=manifest.seed,
            timesteps_per_pair=manifest.timesteps_per_pair,
            caption=Condition(embedding=captions),
        )
        here = (torch.arange(4), torch.tensor(kept))
        x_t, target = (getattr(inverted, name)[here].float() for name in ("x_t", "target"))
        timestep = inverted.timestep.repeat_interleave(2, 0)[here].long()
        eps = unet(x_t, timestep, encoder_hidden_states=captions).sample
        e_theta = ((target - eps) ** 2).mean((1, 2, 3)).view(-1, 2)
        gap = e_theta - inverted.reference_error[here].view(-1, 2)
        loss = -F.logsigmoid(-1000.0 * (gap[:, 0] - gap[:, 1])).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
    start = dict(world.model.load_network().state_dict())
    moved = difference(start, dict(unet.state_dict()))
    assert moved > 1e-4
    assert difference(weights(output), dict(unet.state_dict())) < 1e-3 * moved


def test_accumulation_equals_a_larger_batch(run: Callable[..., Path], tmp_path: Path) -> None:
    whole = run(steps=3, batch_size=4, adam_eps=EPS, output=tmp_path / "whole")
    for batch_size, accumulate in ((1, 4), (2, 2)):
        output = tmp_path / f"split-{accumulate}"
        split = run(steps=3, batch_size=batch_size, accumulate=accumulate, adam_eps=EPS, output=output)
        assert difference(weights(whole), weights(split)) < 1e-6
        for left, right in zip(metrics(whole)[1:], metrics(split)[1:], strict=True):
            assert left["step"] == right["step"]
            assert left["loss"] == pytest.approx(right["loss"], rel=1e-4)
            assert left["margin"] == pytest.approx(right["margin"], abs=1e-3)


def test_two_runs_of_one_seed_are_equal_and_another_seed_is_not(run: Callable[..., Path], tmp_path: Path) -> None:
    first, second, third = (
        weights(run(steps=2, seed=seed, output=tmp_path / name)) for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    assert difference(first, second) == 0
    assert difference(first, third) > 0


def test_the_loss_trace_is_the_committed_one(
    make_world: Callable[..., Any], run: Callable[..., Path], tmp_path: Path
) -> None:
    """20 steps on the CPU. To record it again after a change of numbers that is meant: GOLDEN.unlink(), run the test
    twice, and say in the commit why the trace changed."""
    world = make_world("sd15")
    place = {"model": str(world.model.folder), "caches": [world.cache(tmp_path / "cache")]}
    output = run(steps=20, log_every=1, learning_rate=3e-6, **place)
    trace = {name: [line[name] for line in metrics(output)] for name in ("loss", "margin", "gradient_norm")}
    if not GOLDEN.exists():
        environment = {"torch": torch.__version__, "numpy": np.__version__, "machine": platform.machine()}
        GOLDEN.write_text(json.dumps({"environment": environment} | trace, indent=1) + "\n")
        pytest.fail(f"{GOLDEN} was recorded; commit it and run again")
    golden = json.loads(GOLDEN.read_text())
    assert golden["loss"][0] == pytest.approx(0.693147, abs=1e-4)
    for name, highest, mean in (("loss", 2e-3, 4e-4), ("margin", 5e-3, 1e-3), ("gradient_norm", 5e-2, 1e-2)):
        gap = np.array(trace[name]) - np.array(golden[name])
        scale = 1.0 if name != "gradient_norm" else np.abs(golden[name]).mean()
        assert np.abs(gap).max() / scale < highest, name
        assert abs(gap.mean()) / scale < mean, f"{name} drifts to one side"
