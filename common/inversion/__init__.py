"""The inversion: from clean latents to records, exact to the equation, by any inverter."""

from inpo.common.inversion.given import evaluate_points, own_noise
from inpo.common.inversion.invert import Group, Inverted, build_path, invert, together
from inpo.common.inversion.inverters import INVERTERS
from inpo.common.inversion.path import check_distinct, check_settings
from inpo.common.inversion.released import ReleasedLoop

__all__ = [
    "INVERTERS",
    "Group",
    "Inverted",
    "ReleasedLoop",
    "build_path",
    "check_distinct",
    "check_settings",
    "evaluate_points",
    "invert",
    "own_noise",
    "together",
]
