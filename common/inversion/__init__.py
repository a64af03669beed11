"""The inversion: from clean latents to records, exact to the equation, by any inverter."""

from inpo.common.inversion.invert import Inverted, invert
from inpo.common.inversion.inverters import INVERTERS
from inpo.common.inversion.path import build_path, check_settings

__all__ = ["INVERTERS", "Inverted", "build_path", "check_settings", "invert"]
