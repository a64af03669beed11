"""The models of the phase of images, loaded onto a device and compiled."""

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from inpo.common.batch_size import find_batch_size, memory_in_words
from inpo.common.cache import Manifest
from inpo.common.cache.document import MAX_PAIRS_PER_SHARD
from inpo.common.choices import AUTO, CompileName
from inpo.common.compiled import compile_network, uses_graphs
from inpo.common.denoiser import Denoiser, prepare_for_inference
from inpo.common.families import Family
from inpo.common.memory import bytes_of
from inpo.common.models import Model
from inpo.precompute.encode import ImageEncoder
from inpo.precompute.settings import PrecomputeSettings


@dataclass(kw_only=True, eq=False)
class Components:
    """The models of one device, loaded once."""

    family: Family
    denoiser: Denoiser
    images: ImageEncoder


@dataclass(frozen=True, kw_only=True)
class Share:
    """What a worker should know of its part of the work, and of the other processes."""

    num_rows: int | None = None
    """Rows that it will make, about; None: nobody knows, many."""
    least: Callable[[int], int] = int
    """Of a batch size that fits here the least of all processes' ones; called once, where the size is to be found."""


WHOLE = Share()
"""Of a worker that is alone, and does what it gets."""
_OTHERWISE = "take a device with more memory (`inpo plan` says how much), a lower --resolution, or --dtype bfloat16"


def in_words(pairs: int | None) -> contextlib.AbstractContextManager[None]:
    """Around work on `pairs` together: memory that runs out is told with what helps. None: no batch."""
    return memory_in_words(pairs, smaller="--resolution lowers it too", otherwise=_OTHERWISE)


def load_denoiser(model: Model, manifest: Manifest, device: torch.device) -> Denoiser:
    """Load the network onto `device`."""
    network = model.load_network()
    prepare_for_inference(network, network_dtype=manifest.network_dtype, device=device)
    return model.denoiser(network, manifest, network_dtype=manifest.network_dtype)


def load_components(model: Model, manifest: Manifest, device: torch.device) -> Components:
    """Load the network and the VAE onto `device`."""
    return Components(
        family=model.family,
        denoiser=load_denoiser(model, manifest, device),
        images=ImageEncoder(
            model.load_vae(),
            model.family,
            vae_dtype=manifest.vae_dtype,
            sample=manifest.vae_latent == "sample",
            seed=manifest.seed,
            device=device,
        ),
    )


def shard_bytes(model: Model, manifest: Manifest) -> int:
    """What an inversion holds of a shard of pairs: its images' conditions and clean latents."""
    one = model.family.blank(model.config, 1, manifest.resolution, manifest.max_tokens)
    spaces = 1 if manifest.inverter.guidance == 1.0 else 2
    return 2 * MAX_PAIRS_PER_SHARD * (spaces * bytes_of(iter(one.values())) + 2 * math.prod(manifest.latent_shape))


def call_blank(denoiser: Denoiser, model: Model, manifest: Manifest, pairs: int) -> Tensor:
    """One network call of so many pairs, of nobody's latents."""
    family, images = model.family, 2 * pairs
    blank = family.blank(model.config, images, manifest.resolution, manifest.max_tokens)
    with torch.inference_mode():
        x = torch.zeros(images, *manifest.latent_shape, device=denoiser.device)
        timestep = torch.zeros(images, dtype=torch.int64, device=denoiser.device)
        return denoiser.predict(x, timestep, blank.to(denoiser.device))


def compile_denoiser(
    denoiser: Denoiser, model: Model, manifest: Manifest, how: CompileName, batch_size: int, num_rows: int | None = None
) -> None:
    """Compile the network for batches of `batch_size` pairs, if `how` asks for it. `num_rows`: as Share has it."""
    first = partial(call_blank, denoiser, model, manifest, batch_size)
    denoiser.rows, device = 2 * batch_size, denoiser.device
    ahead = None if num_rows is None else math.ceil(num_rows / batch_size) * manifest.inverter.grid_points
    if not compile_network(
        denoiser.network,
        how,
        first,
        blocks=model.family.blocks,
        varying=model.family.varying,
        device=device,
        graphs=uses_graphs(how, device, denoiser.rows),
        ahead=ahead,
    ):
        denoiser.rows = None


def fit(denoiser: Denoiser, model: Model, manifest: Manifest, settings: PrecomputeSettings, share: Share) -> int:
    """The batch size in pairs, found where it is to be, with the network compiled for it. Raises OutOfMemory."""
    pairs = settings.batch_size
    if pairs == AUTO:
        held = shard_bytes(model, manifest)

        def trial(pairs: int) -> None:
            shard = torch.empty(held, dtype=torch.uint8, device=denoiser.device)
            call_blank(denoiser, model, manifest, pairs)
            del shard

        pairs = find_batch_size(trial, least=share.least, otherwise=_OTHERWISE)
    with in_words(pairs):
        compile_denoiser(denoiser, model, manifest, settings.compile, pairs, share.num_rows)
    return pairs
