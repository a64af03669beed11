"""What precompute will hold on a device: its two phases, counted (common/memory.py)."""

import torch

from inpo.common.cache import Manifest
from inpo.common.denoiser import compute_name, prepare_for_inference
from inpo.common.memory import META, Peak, counting, line, weights_of
from inpo.common.models import Model
from inpo.precompute.components import shard_bytes
from inpo.precompute.encode import PROMPTS_PER_TEXT_CALL, images_per_vae_call


def precompute_peak(model: Model, manifest: Manifest, *, device_type: str = "cuda") -> Peak:
    """Of the phase of images; what the VAE and the phase of texts take is its `elsewhere`."""
    family, dtype = model.family, manifest.network_dtype
    network, vae = model.empty_component(family.network), model.empty_component("vae")
    prepare_for_inference(network, network_dtype=compute_name(dtype), device=META)
    weights = weights_of(network, dtype) + weights_of(vae)
    call, tokens = family.bound(manifest.static), manifest.max_tokens or 1

    @torch.inference_mode()
    def count(images: int) -> int:
        blank = family.blank(model.config, images, manifest.resolution, manifest.max_tokens).to(META)
        x = torch.zeros(images, *manifest.latent_shape, device=META)
        label = torch.zeros(images, device=META)
        with counting(dtype, tokens=tokens, device_type=device_type) as watch:
            call(network, x, label, blank).float()
        return watch.peak

    fixed, per_image = line(count)
    height, width = manifest.resolution
    with torch.inference_mode(), counting(manifest.vae_dtype, device_type=device_type) as watch:
        family.posterior(vae, torch.zeros(images_per_vae_call(height, width), 3, height, width, device=META))
    encoding = weights + watch.peak
    return Peak(
        weights=weights,
        fixed=fixed,
        per_image=per_image,
        shard=shard_bytes(model, manifest),
        elsewhere=max(encoding, _texts(model, manifest, device_type)),
    )


def _texts(model: Model, manifest: Manifest, device_type: str) -> int:
    """The text encoders, together, and the activations of the one that takes most."""
    weights, most = 0, 0
    for name in model.networks:
        if name not in model.family.text_encoders:
            continue
        encoder, config = model.empty_component(name), model.config(name)
        weights += weights_of(encoder)
        tokens = min(manifest.max_tokens or 1 << 16, config.get("max_position_embeddings", 512))
        prompts = torch.zeros(PROMPTS_PER_TEXT_CALL, tokens, dtype=torch.int64, device=META)
        with torch.inference_mode(), counting("float32", tokens=tokens, device_type=device_type) as watch:
            encoder(input_ids=prompts, output_hidden_states=True)
        most = max(most, watch.peak)
    return weights + most
