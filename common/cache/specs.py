"""Which arrays a shard holds, in which shape and dtype, cut into which chunks."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

from inpo.common.choices import Profile

Chunking = Literal["image_record", "image", "prompt", "whole"]
PROFILES = get_args(Profile)
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
    chunking: Chunking
    meaning: str
    profiles: tuple[Profile, ...] = PROFILES
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


_RECORD = ("image", "record")


def _whole(
    path: str,
    dtype: str,
    axes: tuple[str, ...],
    meaning: str,
    *,
    profiles: tuple[Profile, ...] = PROFILES,
    option: str | None = None,
) -> ArraySpec:
    return ArraySpec(
        path=path, dtype=dtype, axes=axes, chunking="whole", meaning=meaning, profiles=profiles, option=option
    )


def _latents(
    path: str,
    meaning: str,
    *,
    dtype: str = "float16",
    profiles: tuple[Profile, ...] = PROFILES,
    option: str | None = None,
) -> ArraySpec:
    """Of every image x0, of every record of it the others."""
    owner: tuple[str, ...] = ("image",) if path == "x0" else _RECORD
    chunking: Chunking = "image" if path == "x0" else "image_record"
    axes = (*owner, "C", "H", "W")
    return ArraySpec(
        path=path, dtype=dtype, axes=axes, chunking=chunking, meaning=meaning, profiles=profiles, option=option
    )


ARRAYS: tuple[ArraySpec, ...] = (
    _latents(
        "x0",
        "clean latent, scaled by the VAE factor, rounded to float16 before the inversion starts",
        profiles=("full", "lean"),
    ),
    _latents(
        "x0",
        "the same, rounded to a multiple of its channel's x0_scale: x0 = value * scale, exactly",
        dtype="int8",
        profiles=("compact",),
    ),
    _whole(
        "x0_scale",
        "float16",
        ("image", "C"),
        "scale of x0, by channel: at least a 127th of the largest, with 4 significant bits",
        profiles=("compact",),
    ),
    _latents(
        "x_t", "latent at level t: float16 rounding of A * x0 + B * target, computed in float64", profiles=("full",)
    ),
    _latents("delta", "noise prediction of the inverting model at the stored x_t", profiles=("full",)),
    _latents("x0_t", "x0(t) = (x_t - s_t * delta) / a_t, from the unrounded prediction (Eq. 8)", profiles=("full",)),
    _latents(
        "target",
        "tau: what the loss aims at, noise (Eq. 18) or velocity, rounded to float16 before x_t is made of it",
        profiles=("full", "lean"),
    ),
    _latents(
        "target",
        "the same, rounded to a multiple of its channel's target_scale before x_t is made of it",
        dtype="int8",
        profiles=("compact",),
    ),
    _whole(
        "target_scale", "float16", (*_RECORD, "C"), "scale of target, by channel, as x0_scale", profiles=("compact",)
    ),
    _whole(
        "reference_error",
        "float32",
        _RECORD,
        "E_ref: mean over channel, height, width of (target - prediction)^2, the reference's at x_t under the caption",
    ),
    _whole(
        "inversion_error",
        "float32",
        ("image",),
        "relative RMS between x0 and where deterministic DDIM lands from the last x_t; NaN: not measured",
    ),
    _whole("timestep", "int16", ("group", "record"), "kept timesteps, ascending, 0..T-1"),
    _whole("image/id", "string", ("image",), "digest of the image's file (blake2b, 128 bits)"),
    _whole("image/group", "int32", ("image",), "row of the group, ascending"),
    _whole("image/score", "float32", ("image",), "the source's own score of the image; NaN: none on its group's scale"),
    _whole("group/id", "string", ("group",), "the pair's id, or where groups are lists or prompts a digest"),
    _whole(
        "group/prompt",
        "int32",
        ("group", "place"),
        "the original caption, also where it was dropped: place in the commit's `texts`, row there",
    ),
    _whole("group/caption_dropped", "bool", ("group",), "true: inverted, and to be trained, under the empty prompt"),
    _whole("pair/id", "string", ("pair",), "the pair's identity in its source"),
    _whole("pair/win", "int32", ("pair",), "row of the preferred image"),
    _whole("pair/lose", "int32", ("pair",), "row of the other image"),
    _whole("pair/label", "float32", ("pair",), "P(win preferred) from the source, 1.0 when hard"),
    _latents("delta_prev", "delta of the previous point of the inversion path", option="delta_prev"),
    _latents(
        "eps_ref",
        "reference noise prediction at x_t under the training caption, where it is not delta",
        option="eps_ref",
    ),
    _whole(
        "residual", "float32", _RECORD, "relative RMS change of the last fixed-point iteration", option="fixed_point"
    ),
)
"""Of a shard of images."""

TEXT = ArraySpec(path="text", dtype="string", axes=("prompt",), chunking="whole", meaning="the prompt", compressed=True)
"""Of a shard of texts, beside what prompts own."""
