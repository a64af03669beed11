"""The closed sets of names that settings offer and the code knows."""

from typing import Literal

InverterName = Literal["ddim", "ab2", "fixed_point", "noise"]
Profile = Literal["full", "lean"]
ExtraName = Literal["delta_prev", "eps_ref"]
DtypeName = Literal["float32", "bfloat16", "float16"]
