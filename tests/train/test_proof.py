"""The zero-step proof: what rounding explains passes; what is another network's, or of other records, does not."""

import re
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from inpo.common.cache import open_cache
from inpo.common.denoiser import Denoiser
from inpo.common.levels import Levels
from inpo.common.models import Model
from inpo.train.index import build_index
from inpo.train.proof import Proof, run_proof
from tests.light import LIGHT_V

ROUNDING = {"float32": 2.0**-22, "bfloat16": 2.0**-8}


@pytest.fixture(autouse=True)
def short_proof() -> None:
    """None: the proof is what is tested."""


def as_it_is(network: nn.Module) -> None:
    """The network itself: on a CPU its numbers do not depend on the batch."""


def noisy(size: float) -> Callable[[nn.Module], None]:
    """Kernels that round by what else is in the batch: every output off by up to `size` of all outputs' root mean
    square, anew for every batch and the same for the same one."""

    def perturb(network: nn.Module, arguments: Any, keywords: Any, output: Any) -> Any:
        sample = output[0] if isinstance(output, tuple) else output.sample
        (x,) = arguments[:1] or (keywords["hidden_states"],)
        seed = zlib.crc32(x.detach().float().numpy().tobytes())
        noise = torch.rand(sample.shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1
        changed = sample + size * noise * sample.square().mean().sqrt()
        return (changed, *output[1:]) if isinstance(output, tuple) else type(output)(sample=changed)

    def prepare(network: nn.Module) -> None:
        network.register_forward_hook(perturb, with_kwargs=True)

    return prepare


def other_weights(seed: int) -> Callable[[nn.Module], None]:
    """Every weight times 1 plus 1% of a standard normal number."""

    @torch.no_grad()
    def prepare(network: nn.Module) -> None:
        generator = torch.Generator().manual_seed(seed)
        for weight in network.parameters():
            weight.mul_(1 + 0.01 * torch.randn(weight.shape, generator=generator))

    return prepare


def proof_of(
    model: Model,
    location: str,
    *prepare: Callable[[nn.Module], None],
    batch_size: int = 4,
    change: Callable[[Denoiser], Denoiser] = lambda denoiser: denoiser,
) -> Proof:
    """The proof of a cache with a model's network, prepared so."""
    cache = open_cache(location)
    network = model.load_network().eval()
    for each in prepare:
        each(network)
    denoiser = change(model.denoiser(network, cache.manifest, network_dtype=cache.manifest.network_dtype))
    return run_proof(denoiser, build_index([cache], soft=False, held_out=0.0), batch_size=batch_size)


SETTINGS = (
    ("sd15", "float32", 8, 4, (5, 4)),
    ("sd15", "bfloat16", 8, 16, (9, 9)),
    (LIGHT_V, "bfloat16", 8, 1, (9, 1, 8)),
    ("sdxl", "bfloat16", 16, 5, (4, 5)),
    ("pixart-sigma", "bfloat16", 16, 2, (5,)),
    ("sd15", "bfloat16", 32, 1, (1,)),
)
"""Kind, dtype, side of the latents, batch size of the run, pairs of the shards."""


@pytest.mark.parametrize(
    ("kind", "dtype", "side", "batch_size", "shards", "writer", "trainer"),
    [
        *((*setting, size, size) for setting in SETTINGS for size in (1, 16)),
        # One of the two alone, on small latents: their errors move furthest.
        *((*setting, *sizes) for setting in SETTINGS[1:3] for sizes in ((4, 0), (0, 4))),
    ],
)
def test_rounding_passes_and_a_percent_of_the_weights_does_not(
    make_world: Callable,
    tmp_path: Path,
    kind: str,
    dtype: str,
    side: int,
    batch_size: int,
    shards: tuple[int, ...],
    writer: int,
    trainer: int,
) -> None:
    """Kernels of the writer, of this run, or of both round by their batch, up to 16 times as far as the dtype does."""
    world = make_world(kind)
    made_by, here = (noisy(each * ROUNDING[dtype]) if each else as_it_is for each in (writer, trainer))
    location = world.cache(
        tmp_path / "c", shards=shards, side=side, network_dtype=dtype, prepare=made_by, profile="lean"
    )
    proof = proof_of(world.model, location, here, batch_size=batch_size)
    assert proof.holds, proof
    if writer == trainer == 1:
        found = proof_of(world.model, location, other_weights(0), here, batch_size=batch_size)
        assert found.shift > 1.5 * found.limit, found


def linear(levels: Levels) -> Levels:
    """Another schedule: a straight line of betas."""
    betas = torch.linspace(1e-4, 0.02, levels.num_train_timesteps, dtype=torch.float64)
    return Levels.from_alphas_cumprod(torch.cumprod(1 - betas, 0))


def scaled(shard: int, arrays: dict[str, np.ndarray]) -> None:
    """Latents of a VAE whose factor is SDXL's and not SD1.5's."""
    arrays["x0"] = (arrays["x0"] * np.float32(0.13025 / 0.18215)).astype(np.float16)


def other_captions(shard: int, arrays: dict[str, np.ndarray]) -> None:
    """Every caption is that of the next prompt."""
    arrays["group/prompt"][:, 1] = (arrays["group/prompt"][:, 1] + 1) % 7


def rebuilt(denoiser: Denoiser, levels: Levels, prediction: str) -> Denoiser:
    return Denoiser(denoiser.network, levels, denoiser.call, prediction, network_dtype=denoiser.network_dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_no_rounding_is_refused(make_world: Callable, tmp_path: Path, dtype: str) -> None:
    world = make_world(LIGHT_V)
    options = {"shards": (9, 9), "network_dtype": dtype, "profile": "lean"}
    as_it_is = world.cache(tmp_path / "c", **options)
    scale = world.cache(tmp_path / "scale", change=scaled, **options)
    caption = world.cache(tmp_path / "caption", change=other_captions, **options)
    for batch_size in (1, 16):
        proof = partial(proof_of, world.model, batch_size=batch_size)
        assert proof(as_it_is).holds
        for name, other in {
            "another VAE scale": proof(scale),
            "other captions": proof(caption),
            "noise for v": proof(as_it_is, change=lambda made: rebuilt(made, made.levels, "epsilon")),
            "another schedule": proof(
                as_it_is, change=lambda made: rebuilt(made, linear(made.levels), made.prediction)
            ),
        }.items():
            assert other.shift > 2 * other.limit, (batch_size, name, other)


def test_a_foreign_shard_among_many_is_refused(make_world: Callable, tmp_path: Path) -> None:
    """One record of each is looked at: what is far off in it would be little in the mean of all."""
    world = make_world("pixart-sigma")

    def foreign(shard: int, arrays: dict[str, np.ndarray]) -> None:
        if shard == 37:
            arrays["reference_error"] *= np.float32(1.05)

    location = world.cache(
        tmp_path / "c", shards=(1,) * 40, timesteps_per_pair=1, change=foreign, network_dtype="bfloat16", profile="lean"
    )
    proof = proof_of(world.model, location, batch_size=16)
    assert not proof.holds
    assert "shard shard-037" in proof.what


@pytest.mark.parametrize(("shards", "num_records"), [((1, 3, 40), 32), ((40, 3, 1), 32), ((2, 3), 5)])
def test_what_small_shards_lack_the_others_give(
    world: Any, tmp_path: Path, shards: tuple[int, ...], num_records: int
) -> None:
    location = world.cache(tmp_path / "c", shards=shards, timesteps_per_pair=1, profile="lean")
    assert proof_of(world.model, location).num_records == num_records


@pytest.mark.parametrize("spread", [None, 0.0, 1e-2])
def test_the_spread_of_the_cache_widens_what_passes(
    world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spread: float | None
) -> None:
    """It was measured where the cache was made; where it was not, this run's has to do."""
    monkeypatch.setitem(type(world)._arrays.__globals__, "measure_spread", lambda *arguments, **keywords: spread)

    def shift(shard: int, arrays: dict[str, np.ndarray]) -> None:
        arrays["reference_error"] = np.square(np.sqrt(arrays["reference_error"]) + np.float32(5e-3))

    proof = proof_of(world.model, world.cache(tmp_path / "c", change=shift))
    assert proof.cache_spread == spread
    assert proof.shift == pytest.approx(5e-3, rel=1e-3)
    assert proof.holds == (spread == 1e-2)


@pytest.mark.parametrize(
    ("batch_size", "first", "again"), [(4, [8, 8, 8, 8, 4], [16, 16, 4]), (18, [36], [18, 18]), (64, [36], [18, 18])]
)
def test_the_second_look_is_in_batches_of_another_size(
    world: Any, cache: str, batch_size: int, first: list[int], again: list[int]
) -> None:
    """Images in each call of the network; of 18 records."""
    sizes: list[int] = []

    def watched(network: nn.Module) -> None:
        network.register_forward_pre_hook(lambda module, given: sizes.append(len(given[0])))

    assert proof_of(world.model, cache, watched, batch_size=batch_size).num_records == 18
    assert sizes == first + again


def test_what_is_not_finite_is_refused(world: Any, cache: str) -> None:
    def spoil(network: nn.Module) -> None:
        with torch.no_grad():
            next(iter(network.parameters())).fill_(torch.nan)

    assert not proof_of(world.model, cache, spoil).holds


def test_the_line_states_logits_at_the_runs_beta(
    world: Any, run: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    location = world.cache(tmp_path / "c", network_dtype="bfloat16")
    proof = proof_of(world.model, location, batch_size=2)
    for beta in (500.0, 5000.0):
        run(caches=[location], beta=beta, steps=1, output=tmp_path / f"{beta:g}")
        (line,) = (line for line in capsys.readouterr().err.splitlines() if "zero-step proof holds" in line)
        found = re.search(
            r"logit at beta (\d+) off by (\S+) .*at most (\S+): rounding moves it by (\S+) in .* by (\S+)$", line
        )
        assert float(found[1]) == beta
        # An image's error counts beta / 2 on the logit, and dE = 2 sqrt(E) d sqrt(E).
        per_root = 0.5 * beta * 2 * proof.reference_error**0.5
        shown = [float(each) for each in found.groups()[1:]]
        wanted = [per_root * each for each in (proof.shift, proof.limit, proof.spread, proof.cache_spread)]
        assert shown == pytest.approx(wanted, rel=0.05)
