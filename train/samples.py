"""Sample images during training: fixed prompts and seeds, so that pictures of different steps can be compared."""

import gc
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor, nn

from inpo.common.cache import Cache, Manifest
from inpo.common.decoded import watch_decoder
from inpo.common.denoiser import DTYPES, compute_dtype
from inpo.common.log import warn
from inpo.common.models import Model
from inpo.train.metrics import MetricsWriter
from inpo.train.settings import TrainSettings

_PROMPTS = 4


def sample_prompts(settings: TrainSettings, caches: Sequence[Cache]) -> tuple[str, ...]:
    """The settings' own, or the first four prompts of the caches that are not empty; the empty one if all are."""
    if settings.sample_prompts:
        return settings.sample_prompts
    texts: dict[str, None] = {}
    for shard in (shard for cache in caches for shard in cache):
        texts |= dict.fromkeys(str(text) for text in shard.prompts() if text)
        if len(texts) >= _PROMPTS:
            break
    return tuple(texts)[:_PROMPTS] or ("",)


@torch.no_grad()
def sample_images(
    network: nn.Module, model: Model, prompts: Sequence[str], manifest: Manifest, settings: TrainSettings
) -> UInt8[np.ndarray, "height width 3"]:
    """One image per prompt, side by side, of the cache's size, number of tokens and network dtype; the noise of an
    image is drawn on the CPU from its own seed. VAE and text encoders are loaded for this and freed again. An image
    that is not finite is black, and told."""
    device = next(network.parameters()).device
    dtype = compute_dtype(manifest.network_dtype)
    height, width = manifest.resolution
    images = []
    # Loading and sampling leave the training's random state alone, and compile nothing for their few images.
    with (
        torch.random.fork_rng(devices=[] if device.type == "cpu" else [device]),  # of all GPUs otherwise
        torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32),
        torch.compiler.set_stance("force_eager"),
    ):
        pipeline = model.load_pipeline(**{model.family.network: network})
        pipeline.scheduler = model.family.sampler(pipeline.scheduler)
        pipeline.set_progress_bar_config(disable=True)
        pipeline.to(device)
        pipeline.vae.decode = _in_its_dtype(pipeline.vae.decode, DTYPES[manifest.vae_dtype], device)
        for number, prompt in enumerate(prompts):
            with watch_decoder(pipeline) as finite:
                (image,) = pipeline(
                    num_inference_steps=settings.sample_steps,
                    output_type="np",
                    height=height,
                    width=width,
                    **model.family.drawing([prompt], settings.sample_guidance, manifest.max_tokens),
                    generator=torch.Generator().manual_seed(settings.seed + number),
                ).images
            if not all(finite):
                warn(f"the sample of prompt {prompt[:80]!r} is not finite, and black: the weights or their dtype fail")
            images.append(image if all(finite) else np.zeros_like(image))
    del pipeline
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return (np.concatenate(images, axis=1).astype(np.float32) * 255).round().clip(0, 255).astype(np.uint8)


def _in_its_dtype(decode: Callable[..., Any], dtype: torch.dtype, device: torch.device) -> Callable[..., Any]:
    """A VAE's `decode` as the cache has the VAE: some overflow in the network's dtype."""

    def decoded(latents: Tensor, *told: Any, **options: Any) -> Any:
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            return decode(latents.float(), *told, **options)

    return decoded


def drawn_with(prompts: Sequence[str], settings: TrainSettings) -> dict[str, str]:
    """What a sample hangs on beside the model, as its PNG names it."""
    told = {
        "prompts": prompts,
        "steps": settings.sample_steps,
        "guidance": settings.sample_guidance,
        "seed": settings.seed,
    }
    return {name: json.dumps(value) for name, value in told.items()}


@dataclass(kw_only=True, eq=False)
class Sampler:
    """Draws sample images at a step, as a PNG that names what they were drawn with, and in the tracker."""

    draw: Callable[[], UInt8[np.ndarray, "height width 3"]]
    told: Mapping[str, str]
    """See `drawn_with`."""
    metrics: MetricsWriter

    def __call__(self, step: int) -> None:
        pixels = self.draw()
        image, told = io.BytesIO(), PngInfo()
        for name, text in self.told.items():
            told.add_text(name, text)
        Image.fromarray(pixels).save(image, format="PNG", pnginfo=told)
        self.metrics.image("samples", pixels, step, png=image.getvalue())
