"""How a walk gets from one point to the next, in numbers alone: network calls, levels and coefficients.

A walk (walk.py) is a sequence of Calls, and a Call says what is done around one network call of an image: how x is made
before it, and what its output is for. No tensor is touched here: batch.py does what the Calls say, for all images at
once. `docs/inversion.md` compares the inverters.
"""

import math
from collections.abc import Callable, Sequence
from enum import IntEnum
from typing import NamedTuple

import numpy as np

from inpo.common.cache.schema import InverterIdentity
from inpo.common.choices import InverterName
from inpo.common.levels import Levels


class Move(IntEnum):
    """How x is made. (clean, delta) are those of the point visited last, delta' is the delta of the one before."""

    STAY = 0
    """x is what it was."""
    START = 1
    """(clean, delta) := (x0, noise), then DDIM: a noised point; with a = 1 and s = 0 the clean end."""
    DDIM = 2
    """a clean + s delta."""
    AB2 = 3
    """a (clean + sigma delta + weight (delta - delta'))."""


class Use(IntEnum):
    """What the output is for."""

    HALF = 0
    """Guidance: half of the inverting model's output, the caption's; the empty prompt's comes next."""
    ITERATE = 1
    """fixed_point: x := a (x' / a' + rise eps), where (x', a') is the point visited last."""
    VISIT = 2
    """A point: clean and delta there, and a record if x was stored."""
    REFERENCE = 3
    """eps_ref of the record visited last."""
    TURN = 4
    """fireflow: what leads on from the point behind, in place of the delta there. x itself is no point."""


class Call(NamedTuple):
    """One network call of an image, as numbers: a row of the tensor that is sent to the device for a batch."""

    timestep: int
    a: float
    s: float
    move: Move = Move.STAY
    sigma: float = 0.0
    """ab2: here. fireflow: at the point behind; of a flow the time."""
    weight: float = 0.0
    rise: float = 0.0
    """fixed_point: sigma - sigma'."""
    a_from: float = 1.0
    """fixed_point: a'."""
    store: bool = False
    """x becomes the stored point nearest to it."""
    empty: bool = False
    """Under the empty prompt."""
    use: Use = Use.VISIT
    record: int = -1
    """The number of the record that is finished with this output; -1: none."""

    @property
    def is_noised(self) -> bool:
        return self.move is Move.START and self.s > 0


def ddim(here: Call, behind: Sequence[Call], floor: float) -> Call:
    """x_t = a_t x0(s) + s_t delta_s: Eq. 15 with Eq. 16. First order."""
    return here._replace(move=Move.DDIM)


def ab2(here: Call, behind: Sequence[Call], floor: float) -> Call:
    """Second order: dz/dsigma = eps(a z, t) with z = x / a, eps extrapolated linearly in A = asinh(sigma / sigma_0).

    z_t = z_s + (sigma_t - sigma_s) delta_s + C (delta_s - delta_r) with
    C = [sigma_t (A_t - A_s) - (R_t - R_s)] / (A_s - A_r), R = sqrt(sigma^2 + sigma_0^2). Our derivation: in plain
    sigma the weight overshoots at the clean end. With one point behind it the step is ddim's.
    """
    if len(behind) < 2:
        return ddim(here, behind, floor)
    before, last, sigma = (each.s / each.a for each in (*behind, here))

    def stretched(sigma: float) -> float:
        return math.asinh(sigma / floor)

    def radius(sigma: float) -> float:
        return math.hypot(sigma, floor)

    weight = (sigma * (stretched(sigma) - stretched(last)) - (radius(sigma) - radius(last))) / (
        stretched(last) - stretched(before)
    )
    return here._replace(move=Move.AB2, sigma=sigma, weight=weight)


def midway(here: Call, last: Call, levels: Levels) -> Call:
    """Half a step towards `here` with what led to the last point: the only network call of a step of fireflow.

    FireFlow, arXiv 2412.07517: v_{i+1/2} = v(x_i + (h / 2) v_{i-1/2}, t_i + h / 2), x_{i+1} = x_i + h v_{i+1/2}; second
    order. For a network of noise it is our transfer: z = x / a for x, sigma for t, eps for v. The middle is the nearest
    level behind the last point, at the latest `here`.
    """
    a, s, _ = levels.walked[:, levels.points].numpy()
    is_flow = levels.space == "velocity"
    times = s if is_flow else s / a
    left, right = (each.s if is_flow else each.s / each.a for each in (last, here))
    between = np.flatnonzero((times > left) & (times <= right))
    nearest = between[np.abs(times[between] - (left + right) / 2).argmin()]
    middle = int(levels.points[nearest])
    return Call(timestep=middle, a=a[nearest], s=s[nearest], move=Move.DDIM, sigma=left, use=Use.TURN)


def iteration(here: Call, last: Call) -> Call:
    """fixed_point, of the ReNoise family: x^{k+1} is the DDIM step of x_s with eps(x^k, t).

    z_t = z_s + (sigma_t - sigma_s) eps with z = x / a; at convergence the exact DDIM inverse.
    """
    return here._replace(rise=here.s / here.a - last.s / last.a, a_from=last.a, use=Use.ITERATE)


def takes_half_steps(identity: InverterIdentity) -> bool:
    """Whether the network is called between the points, and at those alone that become records."""
    return identity.name == "fireflow"


def most_iterations(identity: InverterIdentity) -> int:
    """How often a point is iterated at most: fixed_point's alone."""
    return (identity.iterations or 0) if identity.name == "fixed_point" else 0


INVERTERS: dict[InverterName, Callable[[Call, Sequence[Call], float], Call]] = {
    "ddim": ddim,
    "ab2": ab2,
    "fireflow": ddim,  # along what half a step has found (walk.py)
    "fixed_point": ddim,  # where the iteration starts
    "noise": ddim,  # every grid point is noised (path.py), so that no step is ever taken
    "tracked": ddim,
    "recorded": ddim,  # its points are given (given.py); nothing walks
}
"""(the point to arrive at, the last one or two behind, Levels.floor) -> the Call that steps there."""
