"""What an inversion stores, on its way from the device to the CPU; and copies that wait for nothing."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float, Float16, Float32, Int
from torch import Tensor


def upload(values: Tensor, device: torch.device) -> Tensor:
    """A CPU tensor on the device, without waiting for what the device still has to do."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)


def _download(values: Tensor) -> Tensor:
    """A tensor on the CPU, in pinned memory; there is something in it once the device has come so far."""
    return values.to("cpu", non_blocking=values.is_cuda)


def rms(value: Float32[Tensor, "row c h w"]) -> Float32[Tensor, "row 1 1 1"]:
    """Root mean square of every row."""
    return value.square().mean((-3, -2, -1), keepdim=True).sqrt()


class Records:
    """All records of a set of images. They are copied as they are made, and put in their places at the end.

    Args:
        latents: names of the float16 arrays [image, record, c, h, w].
        figures: names of the float32 arrays [image, record].
    """

    def __init__(self, num_images: int, num_records: int, *, latents: Sequence[str], figures: Sequence[str]) -> None:
        self._shape = (num_images, num_records)
        self._latents = latents
        self._figures = figures
        self._made: list[tuple[np.ndarray, np.ndarray, Tensor, Tensor]] = []
        self._round_trips: list[tuple[np.ndarray, Tensor]] = []

    def add(
        self,
        images: Int[np.ndarray, " row"],
        records: Int[np.ndarray, " row"],
        latents: Mapping[str, Float[Tensor, "row c h w"]],
        figures: Mapping[str, Float32[Tensor, " row"]],
    ) -> None:
        """A record of each of `images`, the image's record of that number. May be told more than is stored."""
        halves = torch.stack([latents[name].half() for name in self._latents])
        finite = halves.isfinite().flatten(2).all(2).all(0)
        singles = torch.stack([*(figures[name] for name in self._figures), finite.float()])
        self._made.append((images, records, _download(halves), _download(singles)))

    def add_round_trips(
        self, images: Int[np.ndarray, " row"], clean: Float32[Tensor, "row c h w"], x0: Float16[Tensor, "row c h w"]
    ) -> None:
        """Relative RMS between x0 and where the way back of `images` has led."""
        self._round_trips.append((images, _download((rms(clean - x0.float()) / rms(x0.float())).flatten())))

    def collect(
        self, device: torch.device
    ) -> tuple[dict[str, Tensor], Float32[Tensor, " image"], Bool[Tensor, " image"]]:
        """(arrays by name, inversion_error, finite): waits for the device, once.

        inversion_error is NaN where it was not measured. finite: whether all that is stored of an image is a number.
        """
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()
        halves: Float16[np.ndarray, "array image record c h w"] = np.empty(0)
        singles = np.full((len(self._figures) + 1, *self._shape), np.nan, np.float32)
        while self._made:
            images, records, latents, figures = self._made.pop()
            if not halves.size:
                halves = np.empty((len(latents), *self._shape, *latents.shape[2:]), np.float16)
            halves[:, images, records] = latents.numpy()
            singles[:, images, records] = figures.numpy()
        error = np.full(self._shape[0], np.nan, np.float32)
        finite = ((singles[-1] == 1) & np.isfinite(singles).all(0)).all(1)
        for images, values in self._round_trips:
            error[images] = values.numpy()
            finite[images] &= np.isfinite(error[images])
        arrays = dict(zip((*self._latents, *self._figures), (*halves, *singles[:-1]), strict=True))
        return (
            {name: torch.from_numpy(array) for name, array in arrays.items()},
            torch.from_numpy(error),
            torch.from_numpy(finite),
        )
