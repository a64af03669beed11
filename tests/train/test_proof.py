"""The zero-step proof: what rounding explains passes; what is another network's, or of other records, does not."""

import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from inpo.common.cache import open_cache
from inpo.common.denoiser import Denoiser
from inpo.common.models import Model
from inpo.train.index import build_index
from inpo.train.proof import Proof, run_proof

ROUNDING = {"float32": 2.0**-22, "bfloat16": 2.0**-8}


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
    change: Callable[[Denoiser], None] = lambda denoiser: None,
) -> Proof:
    """The proof of a cache with a model's network, prepared so."""
    cache = open_cache(location)
    network = model.load_network().eval()
    for each in prepare:
        each(network)
    levels = cache.manifest.levels.levels()
    denoiser = model.denoiser(network, levels, network_dtype=cache.manifest.network_dtype)
    change(denoiser)
    return run_proof(denoiser, build_index([cache], soft=False, held_out=0.0), batch_size=batch_size)


@pytest.mark.parametrize(
    ("kind", "dtype", "side", "batch_size", "shards"),
    [
        ("sd15", "float32", 8, 4, (5, 4)),
        ("pixart-sigma", "float32", 16, 3, (4,)),
        ("sd15", "bfloat16", 8, 16, (9, 9)),
        ("sd2-v", "bfloat16", 8, 1, (9, 1, 8)),
        ("sdxl", "bfloat16", 16, 5, (7, 9)),
        ("pixart-sigma", "bfloat16", 16, 2, (16,)),
        ("sd15", "bfloat16", 32, 7, (8,)),
        ("sd15", "bfloat16", 64, 1, (2,)),
    ],
)
def test_rounding_passes_and_a_percent_of_the_weights_does_not(
    make_world: Callable, tmp_path: Path, kind: str, dtype: str, side: int, batch_size: int, shards: tuple[int, ...]
) -> None:
    """Whether the writer's kernels, this run's, both or neither round by their batch; up to 16 times as much."""
    world = make_world(kind)
    for number, (writer, trainer) in enumerate(((1, 1), (1, 0), (0, 1), (16, 16))):
        size = ROUNDING[dtype]
        made_by, here = (noisy(each * size) if each else as_it_is for each in (writer, trainer))
        location = world.cache(
            tmp_path / str(number), shards=shards, side=side, network_dtype=dtype, prepare=made_by, profile="lean"
        )
        proof = proof_of(world.model, location, here, batch_size=batch_size)
        print(
            f"\n{kind} {dtype} {side} {batch_size} {writer} {trainer} {proof.shift / proof.limit:.2f} {proof.spread:.2e} {proof.cache_spread:.2e}",
            end=" ",
        )
        assert proof.holds, (writer, trainer, proof)
        for seed in range(2 if writer < 16 and side < 64 else 0):
            p = proof_of(world.model, location, other_weights(seed), here, batch_size=batch_size)
            print(f"{p.shift / p.limit:.2f}", end=" ")
            assert not p.holds
