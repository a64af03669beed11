"""The closed sets of names, and the bounds, that settings offer and documents of a cache keep to."""

from typing import Literal

InverterName = Literal["ddim", "ab2", "fixed_point", "noise", "tracked"]
NOISING: frozenset[InverterName] = frozenset({"noise", "tracked"})
"""Those that take no step: every grid point is x0 and noise."""
Profile = Literal["full", "lean", "compact"]
ExtraName = Literal["delta_prev", "eps_ref"]
GroupName = Literal["pair", "prompt"]
LoraFormat = Literal["kohya", "diffusers", "peft"]
DtypeName = Literal["float32", "bfloat16", "float16"]
NetworkDtypeName = Literal["float32", "bfloat16", "float16", "float32-int8", "bfloat16-int8"]
"""Of a network: with -int8 the weights of linear layers are stored in 8 bits, and computed with in the dtype."""
Space = Literal["noise", "velocity"]
DensityName = Literal["uniform", "logit-normal"]
CompileName = Literal["auto", "blocks", "whole", "off"]
MAX_TIMESTEPS = 32767
"""Timesteps are stored as int16."""
