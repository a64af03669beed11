"""Which arrays a shard holds, in which shape and dtype, cut into which chunks."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from inpo.common.choices import Profile

_CRC_BYTES, _INDEX_BYTES = 4, 16
"""CRC-32C of a chunk and of a chunk index; offset and length of a chunk in the index."""


@dataclass(frozen=True, kw_only=True)
class ArraySpec:
    """One array of a shard. `axes` name the dimensions; `chunking` says how the pair axis is cut.

    pair_step: zarr sharding codec, the outer chunk is all pairs of the shard, the inner chunk 1 pair and 1 step.
    pair: the same with an inner chunk of 1 pair. whole: one chunk, no sharding.
    """

    path: str
    dtype: str
    axes: tuple[str, ...]
    chunking: Literal["pair_step", "pair", "whole"]
    meaning: str
    profiles: tuple[Profile, ...] = ("full", "lean")
    option: str | None = None
    """The `--extra` name or inverter that makes this array appear; None: always there."""

    @property
    def is_text(self) -> bool:
        return self.dtype == "string"

    @property
    def numpy_dtype(self) -> np.dtype[Any]:
        return np.dtype("O") if self.is_text else np.dtype(self.dtype)

    @property
    def chunk_file(self) -> str:
        """The one file with the array's numbers, below the shard's folder."""
        return f"{self.path}/c" + "/0" * len(self.axes)

    def inner_chunk(self, shape: Sequence[int]) -> tuple[int, ...]:
        """1 pair and 1 step, 1 pair, or everything: see `chunking`."""
        cut = {"pair_step": 2, "pair": 1, "whole": 0}[self.chunking]
        return (*(1,) * cut, *shape[cut:])

    def chunk_bytes(self, shape: Sequence[int]) -> int | None:
        """Bytes of the chunk file of an array of this shape; None for text, whose length is its own."""
        if self.is_text:
            return None
        numbers = math.prod(shape) * self.numpy_dtype.itemsize
        if self.chunking == "whole":
            return numbers + _CRC_BYTES
        inner = math.prod(shape) // max(1, math.prod(self.inner_chunk(shape)))
        return numbers + inner * (_CRC_BYTES + _INDEX_BYTES) + _CRC_BYTES

    def problem(self, shape: tuple[int, ...], dtype: object, lengths: Mapping[str, int]) -> str | None:
        """What is wrong with an array of this shape and dtype, or None. `lengths` gives known axes their length."""
        found = f"{dtype} {list(shape)}"
        wanted = f"{self.dtype} [{', '.join(str(lengths.get(axis, axis)) for axis in self.axes)}]"
        if len(shape) != len(self.axes):
            return f"{found} instead of {wanted}"
        wrong_axis = any(lengths.get(axis, size) != size for axis, size in zip(self.axes, shape, strict=True))
        wrong_dtype = not self.is_text and np.dtype(dtype) != np.dtype(self.dtype)  # type: ignore[call-overload]
        return f"{found} instead of {wanted}" if wrong_axis or wrong_dtype else None


_LATENT = ("C", "H", "W")
_RECORD = ("pair", "step", "side")

ARRAYS: tuple[ArraySpec, ...] = (
    ArraySpec(
        path="x0",
        dtype="float16",
        axes=("pair", "side", *_LATENT),
        chunking="pair",
        meaning="clean latent, scaled by the VAE factor, rounded to float16 before the inversion starts",
    ),
    ArraySpec(
        path="x_t",
        dtype="float16",
        axes=(*_RECORD, *_LATENT),
        chunking="pair_step",
        profiles=("full",),
        meaning="latent at level t: float16 rounding of a_t * x0 + s_t * target, computed in float64",
    ),
    ArraySpec(
        path="delta",
        dtype="float16",
        axes=(*_RECORD, *_LATENT),
        chunking="pair_step",
        profiles=("full",),
        meaning="noise prediction of the inverting model at the stored x_t",
    ),
    ArraySpec(
        path="x0_t",
        dtype="float16",
        axes=(*_RECORD, *_LATENT),
        chunking="pair_step",
        profiles=("full",),
        meaning="x0(t) = (x_t - s_t * delta) / a_t, from the unrounded prediction (Eq. 8)",
    ),
    ArraySpec(
        path="target",
        dtype="float16",
        axes=(*_RECORD, *_LATENT),
        chunking="pair_step",
        meaning="tau: what the loss aims at (Eq. 18), rounded to float16 before x_t is formed from it",
    ),
    ArraySpec(
        path="reference_error",
        dtype="float32",
        axes=_RECORD,
        chunking="whole",
        meaning="E_ref: mean over channel, height, width of (target - eps_ref(x_t, t, caption))^2",
    ),
    ArraySpec(
        path="inversion_error",
        dtype="float32",
        axes=("pair", "side"),
        chunking="whole",
        meaning="relative RMS between x0 and where deterministic DDIM lands from the last x_t; NaN: not measured",
    ),
    ArraySpec(
        path="timestep",
        dtype="int16",
        axes=("pair", "step"),
        chunking="whole",
        meaning="kept timesteps, ascending, 0..T-1",
    ),
    ArraySpec(
        path="pair_id", dtype="string", axes=("pair",), chunking="whole", meaning="the pair's identity in its source"
    ),
    ArraySpec(
        path="prompt_index",
        dtype="int32",
        axes=("pair",),
        chunking="whole",
        meaning="row of the prompt arrays with the original caption, also where it was dropped",
    ),
    ArraySpec(
        path="caption_dropped",
        dtype="bool",
        axes=("pair",),
        chunking="whole",
        meaning="true: inverted, and to be trained, under the empty prompt (row 0)",
    ),
    ArraySpec(
        path="label",
        dtype="float32",
        axes=("pair",),
        chunking="whole",
        meaning="P(win preferred) from the source, 1.0 when hard",
    ),
    ArraySpec(
        path="prompt/text",
        dtype="string",
        axes=("prompt",),
        chunking="whole",
        meaning="distinct prompts of the shard; row 0 is the empty prompt",
    ),
    ArraySpec(
        path="delta_prev",
        dtype="float16",
        axes=(*_RECORD, *_LATENT),
        chunking="pair_step",
        option="delta_prev",
        meaning="delta of the previous point of the inversion path",
    ),
    ArraySpec(
        path="eps_ref",
        dtype="float16",
        axes=(*_RECORD, *_LATENT),
        chunking="pair_step",
        option="eps_ref",
        meaning="reference noise prediction at x_t under the training caption, where it is not delta",
    ),
    ArraySpec(
        path="residual",
        dtype="float32",
        axes=_RECORD,
        chunking="whole",
        option="fixed_point",
        meaning="relative RMS change of the last fixed-point iteration",
    ),
)
