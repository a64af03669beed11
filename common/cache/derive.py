"""The stored-point rule, and what follows from what is stored.

Every stored number describes one and the same point. x0 is rounded to float16 before the inversion; at a kept
timestep `target` is rounded to float16 first, then x_t is the float16 rounding of a * x0 + s * target computed in
float64, and the network is evaluated AT that x_t. So E_ref is exact for what a trainer sees, and a lean cache, which
stores no x_t, gives it back bit for bit. (a, s) are the levels' `mixture`: (a_t, s_t) where the target is noise, (1,
s_t) where it is velocity.

A compact cache rounds x0 and target to multiples of one scale per channel instead. Multiple and scale have so few bits
that their product is a float16 number: nothing else changes.

Products and sums are separate operations on purpose: a fused multiply-add would round differently.
"""

import numpy as np
import torch
from jaxtyping import Float, Float16, Int8
from torch import Tensor

_SCALE_BITS = 4
"""Of a scale, beside 7 of a value: their product fits the 11 of float16."""
_LEAST_SCALE = 2.0**-21


def _scale(value: Float[Tensor, "*image c h w"]) -> Float[Tensor, "*image c 1 1"]:
    """The least scale by which no value of a channel is more than 127, float32."""
    least = value.abs().amax(dim=(-2, -1), keepdim=True).float() / 127
    mantissa, exponent = torch.frexp(least)
    scale = torch.ldexp((mantissa * 2**_SCALE_BITS).ceil(), exponent - _SCALE_BITS)
    return scale.clamp(min=_LEAST_SCALE)


def coarse(value: Float[Tensor, "*image c h w"]) -> Float[Tensor, "*image c h w"]:
    """The float16 numbers nearest to `value` that a compact cache can hold: multiples of -127..127 of a scale."""
    scale = _scale(value)
    return ((value.float() / scale).round() * scale).half()


def split(
    value: Float[np.ndarray, "*image c h w"],
) -> tuple[Int8[np.ndarray, "*image c h w"], Float16[np.ndarray, "*image c"]]:
    """(multiples, scale) of what `coarse` gave: their product is `value` again, to the last bit. Raises ValueError for
    other values."""
    given = torch.from_numpy(value).float()
    # Of the largest multiple, which is 113 at least, the scale follows but for one step.
    scale = _scale(given)
    exact = (given / scale % 1 == 0).all(-1, keepdim=True).all(-2, keepdim=True)
    mantissa, exponent = torch.frexp(scale)
    scale = torch.where(exact, scale, torch.ldexp((mantissa * 2**_SCALE_BITS) + 1, exponent - _SCALE_BITS))
    multiples = given / scale
    if not bool(((multiples % 1 == 0) & (multiples.abs() <= 127)).all()):
        raise ValueError("values that are not multiples of a scale")
    return multiples.to(torch.int8).numpy(), scale[..., 0, 0].half().numpy()


def stored_point(
    x0: Float[Tensor, "*image c h w"],
    x_t: Float[Tensor, "*image c h w"],
    a: Float[Tensor, "*image 1 1 1"] | float,
    s: Float[Tensor, "*image 1 1 1"] | float,
    *,
    compact: bool = False,
) -> tuple[Float[Tensor, "*image c h w"], Float[Tensor, "*image c h w"]]:
    """(target, x_t), both float16, nearest to the trajectory's float32 `x_t`; `compact`: the target as `coarse` has it.

    tau_t = (x_t - a * x0) / s (Eq. 18 with Eq. 16), with x0 float16 as stored, a and s float64.
    """
    x0 = x0.double()
    target = ((x_t.double() - a * x0) / s).half()
    if compact:
        target = coarse(target)
    return target, point_from_target(x0, target, a, s)


def point_from_target(
    x0: Float[Tensor, "*image c h w"],
    target: Float[Tensor, "*image c h w"],
    a: Float[Tensor, "*image 1 1 1"] | float,
    s: Float[Tensor, "*image 1 1 1"] | float,
) -> Float[Tensor, "*image c h w"]:
    """x_t := float16(a * x0 + s * target), computed in float64."""
    signal = a * x0.double()
    noise = s * target.double()
    return round_to_half(signal + noise)


def round_to_half(value: Float[Tensor, " *shape"]) -> Float[Tensor, " *shape"]:
    """The float16 nearest to a float64, ties to even: what numpy's `astype` gives.

    torch's own conversion goes through float32 and so rounds twice; about one value in 16,000 comes out one step
    off, and a lean cache would not give a full one's x_t back. Rounding to odd in between makes the second rounding
    exact (Boldo and Melquiond, "Emulation of a FMA and correctly rounded sums", 2008, theorem 2).
    """
    single = value.float()
    missing = value - single.double()
    even = (single.view(torch.int32) & 1) == 0
    outwards = torch.copysign(torch.full_like(single, torch.inf), missing.float())
    odd = torch.where(even & (missing != 0), torch.nextafter(single, outwards), single)
    return odd.half()


def derive_x_t(
    x0: Float[np.ndarray, "image c h w"],
    target: Float[np.ndarray, "image record c h w"],
    a: Float[np.ndarray, "image record"],
    s: Float[np.ndarray, "image record"],
) -> Float[np.ndarray, "image record c h w"]:
    """x_t of a lean cache, float16, bit-identical to what `point_from_target` stored in a full one.

    One record at a time: float64 intermediates that stay in the processor's cache take a third of the time.
    """
    x_t = np.empty_like(target)
    for image, record in np.ndindex(target.shape[:2]):
        point = target[image, record].astype(np.float64)
        point *= s[image, record]
        point += a[image, record] * x0[image].astype(np.float64)
        x_t[image, record] = point
    return x_t


def mean_square(value: Float[Tensor, "*image c h w"]) -> Float[Tensor, " *image"]:
    """Mean over channel, height and width of the square: the MSE of the released code."""
    return torch.mean(value.float() ** 2, dim=(-3, -2, -1))
