"""The closed sets of names, and the bounds, that settings offer and documents of a cache keep to."""

from typing import Literal

InverterName = Literal["ddim", "ab2", "fixed_point", "noise"]
Profile = Literal["full", "lean"]
ExtraName = Literal["delta_prev", "eps_ref"]
GroupName = Literal["pair", "prompt"]
LoraFormat = Literal["kohya", "diffusers", "peft"]
DtypeName = Literal["float32", "bfloat16", "float16"]
Space = Literal["noise", "velocity"]
DensityName = Literal["uniform", "logit-normal"]
CompileName = Literal["auto", "blocks", "whole", "off"]
MAX_TIMESTEPS = 32767
"""Timesteps are stored as int16."""
