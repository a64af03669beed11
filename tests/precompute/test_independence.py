"""Everything random hangs on (seed, group id) or (seed, image id): batch size, tars, order and workers change nothing
but rounding."""

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from inpo.common.cache import Shard
from inpo.common.conditions import Condition, read_prompts
from inpo.common.seeding import normal
from tests.precompute.conftest import assert_same_but_for_rounding, png
from tests.rounding import HALF_STEP, UNIT, half_unit, of_mean, rms


def test_batch_size_tars_and_order(
    pipelines: Callable, examples: Callable, write_tars: Callable, run: Callable, tmp_path: Path, by_id: Callable
) -> None:
    pairs = examples(8)
    settings = {
        "flip": True,
        "vae_latent": "sample",
        "caption_dropout": 0.4,
        "timesteps_per_pair": 2,
        "seed": 5,
        "measure_inversion": 0.5,
    }
    first = run.cache(write_tars(tmp_path / "one", pairs, 8), pipelines(), tmp_path / "first", batch_size=1, **settings)
    second = run.cache(
        write_tars(tmp_path / "three", pairs[::-1], 3),
        pipelines(),
        tmp_path / "second",
        batch_size=8,
        decode_workers=2,
        **settings,
    )
    assert (len(first.shards), len(second.shards)) == (1, 3)
    for name in ("timestep", "group/caption_dropped", "pair/label", "group/id", "image/id"):
        left, right = by_id(first, name), by_id(second, name)
        assert left.keys() == {pair.pair_id for pair in pairs}
        for pair_id, value in left.items():
            np.testing.assert_array_equal(value, right[pair_id])
    dropped = by_id(first, "group/caption_dropped")
    assert 0 < sum(dropped.values()) < 8
    assert_same_but_for_rounding(first, second, by_id)
    left, right = by_id(first, "inversion_error"), by_id(second, "inversion_error")
    x0, last, signal = by_id(first, "x0"), by_id(first, "x0_t"), first.manifest.levels.signal
    for pair_id, value in left.items():
        # Where the last x_t leads is off by what its x0(t) is; the error is that distance's mean over x0's size.
        a = signal[by_id(first, "timestep")[pair_id][-1]]
        moved = UNIT * (rms(last[pair_id][:, -1]) + 2 / a) / rms(x0[pair_id])
        bound = of_mean(moved, x0[pair_id][0].size)
        np.testing.assert_allclose(value, right[pair_id], rtol=0, atol=bound, equal_nan=True)
    assert 0 < sum(np.isnan(value).all() for value in left.values()) < 8


def wins(shard: Shard, path: str) -> np.ndarray:
    """The first record of every pair's preferred image."""
    return shard.read(path, shard.sides()[:, 0])[:, 0]


def test_a_dropped_caption_is_the_empty_prompt(
    pipelines: Callable, examples: Callable, write_tars: Callable, run: Callable, tmp_path: Path
) -> None:
    """Inverted under the empty prompt, with the original caption still named: the network is called again with it."""
    pairs = examples(6)
    source = write_tars(tmp_path / "pairs", pairs, 6)
    cache = run.cache(source, pipelines(), tmp_path / "cache", caption_dropout=0.5, seed=1)
    (shard,) = cache
    dropped = shard.dropped()
    assert 0 < dropped.sum() < 6
    assert shard.prompts().tolist() == [pair.prompt for pair in pairs]
    unet = run.components[-1].denoiser.network
    images = shard.sides()[:, 0]
    timestep = torch.from_numpy(shard.timesteps(images)[:, 0]).long()
    trained, empty = Condition.of(shard, images)["embedding"], Condition.empty(shard, images)["embedding"]
    named = [(shard.commit.texts[text], row) for text, row in shard.read("group/prompt").tolist()]
    own = torch.from_numpy(read_prompts(cache.texts, named)["embedding"])
    assert torch.equal(trained, torch.where(torch.from_numpy(dropped)[:, None, None], empty, own))
    for told, expected in ((trained, [True] * 6), (empty, dropped.tolist()), (own, (~dropped).tolist())):
        with torch.no_grad():
            x_t = torch.from_numpy(wins(shard, "x_t")).float()
            eps = unet(x_t, timestep, encoder_hidden_states=told.float()).sample.numpy()
        # Half a unit in the last place, and a float32 network's own rounding.
        same = (np.abs(eps - wins(shard, "delta")) <= half_unit(eps) + 1e-5).all((1, 2, 3))
        assert same.tolist() == expected


def test_flips_are_shared_by_the_sides(
    pipelines: Callable, examples: Callable, write_tars: Callable, run: Callable, tmp_path: Path
) -> None:
    pairs = examples(8)
    source = write_tars(tmp_path / "pairs", pairs, 8)
    cache = run.cache(source, pipelines(), tmp_path / "cache", flip=True)
    encode = run.components[-1].images.vae
    (shard,) = cache
    flipped = []
    for row, pair in enumerate(pairs):
        sides = []
        for side, pixels in enumerate((pair.win, pair.lose)):
            with torch.no_grad():
                both = torch.stack([torch.tensor(pixels), torch.tensor(pixels[:, ::-1].copy())])
                latents = encode.encode(both.permute(0, 3, 1, 2) / 127.5 - 1).latent_dist.mean * 0.18215
            distance = np.abs(latents.numpy() - shard.read("x0")[2 * row + side]).max((1, 2, 3))
            assert distance.min() < 2e-3 < distance.max()  # half a unit of latents below 4, as these are
            sides.append(int(distance.argmin()))
        assert sides[0] == sides[1]
        flipped.append(sides[0])
    assert 0 < sum(flipped) < 8


def test_the_vae_sample_comes_from_the_hash(
    pipelines: Callable, examples: Callable, write_tars: Callable, run: Callable, tmp_path: Path
) -> None:
    pairs = examples(2)
    source = write_tars(tmp_path / "pairs", pairs, 2)
    cache = run.cache(source, pipelines(), tmp_path / "cache", vae_latent="sample", seed=9)
    vae = run.components[-1].images.vae
    (shard,) = cache
    for row, pair in enumerate(pairs):
        for side, pixels in enumerate((pair.win, pair.lose)):
            with torch.no_grad():
                posterior = vae.encode(torch.tensor(pixels).permute(2, 0, 1)[None] / 127.5 - 1).latent_dist
            image_id = hashlib.blake2b(png(pixels), digest_size=16).hexdigest()
            assert shard.read("image/id")[2 * row + side] == image_id
            noise = normal((4, 8, 8), 9, image_id, "vae")
            want = (posterior.mean + posterior.std * noise)[0] * 0.18215
            want = want.numpy()
            assert (np.abs(shard.read("x0")[2 * row + side] - want) <= half_unit(want) + 1e-5).all()
            assert np.abs(shard.read("x0")[2 * row + side] - posterior.mean[0].numpy() * 0.18215).max() > 1e-2


@pytest.mark.parametrize("inverter", ["ddim", "noise"])
def test_lean_is_full_bit_for_bit(
    pipelines: Callable, examples: Callable, write_tars: Callable, run: Callable, tmp_path: Path, inverter: str
) -> None:
    source = write_tars(tmp_path / "pairs", examples(4), 4)
    full = run.cache(source, pipelines(), tmp_path / "full", inverter=inverter)
    lean = run.cache(source, pipelines(), tmp_path / "lean", inverter=inverter, profile="lean")
    for one, other in zip(full, lean, strict=True):
        assert "x_t" in one.stored
        assert "x_t" not in other.stored
        for name in ("x_t", "x0", "target", "reference_error", "timestep"):
            np.testing.assert_array_equal(one.read(name), other.read(name))


def test_extras(pipelines: Callable, examples: Callable, write_tars: Callable, run: Callable, tmp_path: Path) -> None:
    source = write_tars(tmp_path / "pairs", examples(3), 3)
    cache = run.cache(
        source, pipelines(), tmp_path / "cache", guidance=0.0, extra=("eps_ref", "delta_prev"), measure_inversion=1.0
    )
    (shard,) = cache
    eps_ref, target = shard.read("eps_ref").astype(np.float64), shard.read("target").astype(np.float64)
    error = np.mean((target - eps_ref) ** 2, axis=(-3, -2, -1))
    # eps_ref is stored with half a unit of rounding, in each element of the mean.
    rounding = of_mean(2 * HALF_STEP * rms(eps_ref) * np.sqrt(error.max()), target[0, 0].size)
    np.testing.assert_allclose(shard.read("reference_error"), error, rtol=0, atol=rounding + 1e-6)
    np.testing.assert_array_equal(shard.read("delta_prev")[:, 1:], shard.read("delta")[:, :-1])
    # E_ref belongs to the caption, delta to the empty prompt.
    assert np.abs(eps_ref - shard.read("delta")).max() > 1e-3
    unet = run.components[-1].denoiser.network
    images = shard.sides()[:, 0]
    with torch.no_grad():
        eps = unet(
            torch.from_numpy(wins(shard, "x_t")).float(),
            torch.from_numpy(shard.timesteps(images)[:, 0]).long(),
            encoder_hidden_states=Condition.of(shard, images)["embedding"].float(),
        ).sample.numpy()
    assert (np.abs(wins(shard, "eps_ref") - eps) <= half_unit(eps) + 1e-5).all()
    assert np.isfinite(shard.read("inversion_error")).all()
