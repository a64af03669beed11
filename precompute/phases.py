"""The two phases of a run, and the worker of each: texts with the text encoders, then images with network and VAE."""

import gc
from collections.abc import Callable
from dataclasses import dataclass

import torch

from inpo.common.cache import CacheWriter, Commit, TextCommit
from inpo.common.models import Model
from inpo.precompute.components import WHOLE, Share
from inpo.precompute.encode import TextEncoder
from inpo.precompute.pipeline import Worker
from inpo.precompute.settings import PrecomputeSettings
from inpo.precompute.texts import TextWorker, texts_in_words
from inpo.precompute.worker import build_worker

Load = Callable[[Model, CacheWriter, PrecomputeSettings, torch.device, Share], Worker]


@dataclass(frozen=True, kw_only=True)
class Phase:
    """What is made by tasks of one kind, and the worker that makes it. Ray sends it by the names in it."""

    name: str
    kind: type[Commit] | type[TextCommit]
    load: Load
    """Loads what the phase needs onto a device, and no more: text encoders and network are never there together."""

    def worker(
        self,
        model: Model,
        writer: CacheWriter,
        settings: PrecomputeSettings,
        device: torch.device,
        share: Share = WHOLE,
    ) -> Worker:
        """A worker for `device`."""
        if self.kind is not TextCommit:  # those come first
            gc.collect()  # references in a circle would keep the models of the phase before on the device
        return self.load(model, writer, settings, device, share)


def _encoder(
    model: Model, writer: CacheWriter, settings: PrecomputeSettings, device: torch.device, share: Share = WHOLE
) -> TextWorker:
    with texts_in_words():
        encoder = TextEncoder(
            model.load_text_pipeline(), model.family, device=device, max_tokens=writer.manifest.max_tokens
        )
    return TextWorker(encoder=encoder, writer=writer)


TEXTS = Phase(name="texts", kind=TextCommit, load=_encoder)
IMAGES = Phase(name="images", kind=Commit, load=build_worker)
