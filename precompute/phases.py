"""The two phases of a run, and the worker of each: texts with the text encoders, then images with network and VAE."""

import gc
from collections.abc import Callable
from typing import Literal

import torch

from inpo.common.cache import CacheWriter
from inpo.common.models import Model
from inpo.precompute.encode import TextEncoder
from inpo.precompute.pipeline import Worker
from inpo.precompute.settings import PrecomputeSettings
from inpo.precompute.texts import TextWorker, texts_in_words
from inpo.precompute.worker import build_worker

Phase = Literal["texts", "images"]


def load_worker(
    phase: Phase,
    model: Model,
    writer: CacheWriter,
    settings: PrecomputeSettings,
    device: torch.device,
    least: Callable[[int], int] = int,
) -> Worker:
    """Load what a phase needs onto `device`, and no more: text encoders and network are never there together.

    `least`: see build_worker.
    """
    gc.collect()  # references in a circle would keep the models of the phase before on the device
    if phase == "texts":
        with texts_in_words():
            encoder = TextEncoder(
                model.load_text_pipeline(), model.family, device=device, max_tokens=writer.manifest.max_tokens
            )
        return TextWorker(encoder=encoder, writer=writer)
    return build_worker(model, writer, settings, device, least)
