"""Whether the images that a pipeline paints are finite."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def watch_decoder(pipeline: Any) -> Iterator[list[bool]]:
    """A list that grows by one for each image that the pipeline's VAE decodes: whether all its values are finite.
    Behind the decoder pixels are clamped, and infinity would be white."""
    finite: list[bool] = []

    def watch(_: Any, __: Any, decoded: torch.Tensor) -> None:
        finite.extend(decoded.isfinite().flatten(1).all(1).tolist())

    with pipeline.vae.decoder.register_forward_hook(watch):
        yield finite
