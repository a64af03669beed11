"""Which arrays a shard holds, in which shape and dtype, cut into which chunks."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from inpo.common.choices import Profile

CRC_BYTES, INDEX_BYTES = 4, 16
"""CRC-32C of a chunk and of a chunk index; offset and length of a chunk in the index."""
_MAX_ROW_BYTES = 1 << 28


@dataclass(frozen=True, kw_only=True)
class ArraySpec:
    """One array of a shard. `axes` name the dimensions; `chunking` says how its first axes are cut.

    image_record: zarr sharding codec, the outer chunk is the whole array, the inner chunk 1 image and 1 record. image,
    prompt: the same with an inner chunk of 1 image, or 1 prompt. whole: one chunk, no sharding.
    """

    path: str
    dtype: str
    axes: tuple[str, ...]
    chunking: Literal["image_record", "image", "prompt", "whole"]
    meaning: str
    profiles: tuple[Profile, ...] = ("full", "lean", "compact")
    option: str | None = None
    """The `--extra` name or inverter that makes this array appear; None: always there."""
    compressed: bool = False
    """zstd before the checksum."""

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
        """1 image and 1 record, 1 image or prompt, or everything: see `chunking`."""
        return (*(1,) * self.num_cut, *shape[self.num_cut :])

    @property
    def num_cut(self) -> int:
        """How many of the first axes are cut into single rows."""
        return {"image_record": 2, "image": 1, "prompt": 1, "whole": 0}[self.chunking]

    def chunk_bytes(self, shape: Sequence[int]) -> int | None:
        """Bytes of the chunk file of an array of this shape; None for text and for what is compressed."""
        if self.is_text or self.compressed:
            return None
        numbers = math.prod(shape) * self.numpy_dtype.itemsize
        if self.chunking == "whole":
            return numbers + CRC_BYTES
        inner = math.prod(shape) // max(1, math.prod(self.inner_chunk(shape)))
        return numbers + inner * (CRC_BYTES + INDEX_BYTES) + CRC_BYTES

    def too_large(self, shape: Sequence[int]) -> str | None:
        """What is wrong with the size of a row of a compressed array, whose file does not tell it; or None."""
        size = math.prod(shape[1:]) * self.numpy_dtype.itemsize
        return f"{size} bytes by {self.axes[0]}, limit {_MAX_ROW_BYTES}" if size > _MAX_ROW_BYTES else None

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
_RECORD = ("image", "record")

ARRAYS: tuple[ArraySpec, ...] = (
    ArraySpec(
        path="x0",
        dtype="float16",
        axes=("image", *_LATENT),
        chunking="image",
        profiles=("full", "lean"),
        meaning="clean latent, scaled by the VAE factor, rounded to float16 before the inversion starts",
    ),
    ArraySpec(
        path="x0",
        dtype="int8",
        axes=("image", *_LATENT),
        chunking="image",
        profiles=("compact",),
        meaning="the same, rounded to a multiple of its channel's x0_scale: x0 = value * scale, exactly",
    ),
    ArraySpec(
        path="x0_scale",
        dtype="float16",
        axes=("image", "C"),
        chunking="whole",
        profiles=("compact",),
        meaning="scale of x0, by channel: at least a 127th of the largest, with 4 significant bits",
    ),
    ArraySpec(
        path="x_t",
        dtype="float16",
        axes=(*_RECORD, *_LATENT),
        chunking="image_record",
        profiles=("full",),
        meaning="latent at level t: float16 rounding of A * x0 + B * target, computed in float64",
    ),
    ArraySpec(
        path="delta",
        dtype="float16",
        axes=(*_RECORD, *_LATENT),
        chunking="image_record",
        profiles=("full",),
        meaning="noise prediction of the inverting model at the stored x_t",
    ),
    ArraySpec(
        path="x0_t",
        dtype="float16",
        axes=(*_RECORD, *_LATENT),
        chunking="image_record",
        profiles=("full",),
        meaning="x0(t) = (x_t - s_t * delta) / a_t, from the unrounded prediction (Eq. 8)",
    ),
    ArraySpec(
        path="target",
        dtype="float16",
        axes=(*_RECORD, *_LATENT),
        chunking="image_record",
        profiles=("full", "lean"),
        meaning="tau: what the loss aims at, noise (Eq. 18) or velocity, rounded to float16 before x_t is made of it",
    ),
    ArraySpec(
        path="target",
        dtype="int8",
        axes=(*_RECORD, *_LATENT),
        chunking="image_record",
        profiles=("compact",),
        meaning="the same, rounded to a multiple of its channel's target_scale before x_t is made of it",
    ),
    ArraySpec(
        path="target_scale",
        dtype="float16",
        axes=(*_RECORD, "C"),
        chunking="whole",
        profiles=("compact",),
        meaning="scale of target, by channel, as x0_scale",
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
        axes=("image",),
        chunking="whole",
        meaning="relative RMS between x0 and where deterministic DDIM lands from the last x_t; NaN: not measured",
    ),
    ArraySpec(
        path="timestep",
        dtype="int16",
        axes=("group", "record"),
        chunking="whole",
        meaning="kept timesteps, ascending, 0..T-1",
    ),
    ArraySpec(
        path="image/id",
        dtype="string",
        axes=("image",),
        chunking="whole",
        meaning="digest of the image's file (blake2b, 128 bits)",
    ),
    ArraySpec(
        path="image/group", dtype="int32", axes=("image",), chunking="whole", meaning="row of the group, ascending"
    ),
    ArraySpec(
        path="image/score",
        dtype="float32",
        axes=("image",),
        chunking="whole",
        meaning="the source's own score of the image; NaN: none",
    ),
    ArraySpec(
        path="group/id",
        dtype="string",
        axes=("group",),
        chunking="whole",
        meaning="the pair's id, or where groups are lists or prompts a digest",
    ),
    ArraySpec(
        path="group/prompt",
        dtype="int32",
        axes=("group", "place"),
        chunking="whole",
        meaning="the original caption, also where it was dropped: place in the commit's `texts`, row there",
    ),
    ArraySpec(
        path="group/caption_dropped",
        dtype="bool",
        axes=("group",),
        chunking="whole",
        meaning="true: inverted, and to be trained, under the empty prompt",
    ),
    ArraySpec(
        path="pair/id", dtype="string", axes=("pair",), chunking="whole", meaning="the pair's identity in its source"
    ),
    ArraySpec(path="pair/win", dtype="int32", axes=("pair",), chunking="whole", meaning="row of the preferred image"),
    ArraySpec(path="pair/lose", dtype="int32", axes=("pair",), chunking="whole", meaning="row of the other image"),
    ArraySpec(
        path="pair/label",
        dtype="float32",
        axes=("pair",),
        chunking="whole",
        meaning="P(win preferred) from the source, 1.0 when hard",
    ),
    ArraySpec(
        path="delta_prev",
        dtype="float16",
        axes=(*_RECORD, *_LATENT),
        chunking="image_record",
        option="delta_prev",
        meaning="delta of the previous point of the inversion path",
    ),
    ArraySpec(
        path="eps_ref",
        dtype="float16",
        axes=(*_RECORD, *_LATENT),
        chunking="image_record",
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
"""Of a shard of images."""

TEXT = ArraySpec(path="text", dtype="string", axes=("prompt",), chunking="whole", meaning="the prompt", compressed=True)
"""Of a shard of texts, beside what prompts own."""
