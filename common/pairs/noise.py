"""The noise that an image was made from, as a source keeps it: a NumPy file (.npy) of the latent's shape.

Its header says shape and dtype; nothing in it is run, and no more is kept than the file has.
"""

import io
import math

import numpy as np
from jaxtyping import Float32
from numpy.lib import format as npy

_DTYPES = ("<f2", "<f4", "<f8", ">f2", ">f4", ">f8")


def decode_noise(data: bytes) -> Float32[np.ndarray, "c h w"]:
    """The numbers of a .npy file of [C, H, W] or [1, C, H, W] in float16, 32 or 64. Raises ValueError in words."""
    stream = io.BytesIO(data)
    try:
        major, _ = npy.read_magic(stream)
        read_header = npy.read_array_header_1_0 if major == 1 else npy.read_array_header_2_0
        shape, is_fortran, dtype = read_header(stream)
    except (ValueError, TypeError, OverflowError, SyntaxError):
        raise ValueError(f"{len(data)} bytes that are no .npy file: write it with numpy.save") from None
    if dtype.str not in _DTYPES:
        raise ValueError(f"of dtype {dtype}, expected float32 or float16")
    if len(shape) == 4 and shape[0] == 1:
        shape = shape[1:]
    count, left = math.prod(shape), len(data) - stream.tell()
    if len(shape) != 3 or min(shape) < 1 or is_fortran:
        raise ValueError(f"of shape {list(shape)}{' in Fortran order' * is_fortran}, expected [C, H, W]")
    if count * dtype.itemsize != left:
        raise ValueError(f"of {left} bytes, and {list(shape)} {dtype} is {count * dtype.itemsize}")
    values = np.frombuffer(data, dtype, count, stream.tell()).reshape(shape).astype(np.float32)
    if not np.isfinite(values).all():
        raise ValueError("with NaN or infinity")
    return values
