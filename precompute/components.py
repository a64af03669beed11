"""The models of the phase of images, loaded onto a device and compiled."""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from inpo.common.cache import Manifest
from inpo.common.choices import CompileName
from inpo.common.compiled import compile_network, uses_graphs
from inpo.common.denoiser import Denoiser, prepare_for_inference
from inpo.common.families import Family
from inpo.common.models import Model
from inpo.precompute.encode import ImageEncoder


@dataclass(kw_only=True, eq=False)
class Components:
    """The models of one device, loaded once."""

    family: Family
    denoiser: Denoiser
    images: ImageEncoder


def load_components(model: Model, manifest: Manifest, device: torch.device) -> Components:
    """Load the network and the VAE onto `device`."""
    network = model.load_network()
    prepare_for_inference(network, network_dtype=manifest.network_dtype, device=device)
    return Components(
        family=model.family,
        denoiser=model.denoiser(network, manifest, network_dtype=manifest.network_dtype),
        images=ImageEncoder(
            model.load_vae(),
            model.family,
            vae_dtype=manifest.vae_dtype,
            sample=manifest.vae_latent == "sample",
            seed=manifest.seed,
            device=device,
        ),
    )


def call_blank(components: Components, model: Model, manifest: Manifest, pairs: int) -> Tensor:
    """One network call of so many pairs, of nobody's latents."""
    denoiser, family, images = components.denoiser, model.family, 2 * pairs
    blank = family.blank(model.config, images, manifest.resolution[0], manifest.max_tokens)
    with torch.inference_mode():
        x = torch.zeros(images, *manifest.latent_shape, device=denoiser.device)
        timestep = torch.zeros(images, dtype=torch.int64, device=denoiser.device)
        return denoiser.predict(x, timestep, blank.to(denoiser.device))


def compile_components(
    components: Components, model: Model, manifest: Manifest, how: CompileName, batch_size: int
) -> None:
    """Compile the network for batches of `batch_size` pairs, if `how` asks for it."""
    denoiser = components.denoiser
    first = partial(call_blank, components, model, manifest, batch_size)
    denoiser.rows, device = 2 * batch_size, denoiser.device
    graphs = uses_graphs(how, device, denoiser.rows)
    if not compile_network(denoiser.network, how, first, blocks=model.family.blocks, device=device, graphs=graphs):
        denoiser.rows = None
