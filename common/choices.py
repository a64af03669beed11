"""The closed sets of names, and the bounds, that settings offer and documents of a cache keep to."""

from typing import Annotated, Literal

from pydantic import BeforeValidator, PlainSerializer

InverterName = Literal["ddim", "ab2", "fireflow", "fixed_point", "noise", "tracked", "recorded"]
ChosenInverter = Literal["ddim", "ab2", "fireflow", "fixed_point", "noise", "tracked"]
"""What a user may ask for: recorded points come of sampling."""
NOISING: frozenset[InverterName] = frozenset({"noise", "tracked"})
"""Those that take no step: every grid point is x0 and noise."""
Profile = Literal["full", "lean", "compact"]
ExtraName = Literal["delta_prev", "eps_ref"]
GroupName = Literal["pair", "list", "prompt"]
PairsFrom = Literal["all", "adjacent", "best-worst"]
LoraFormat = Literal["kohya", "diffusers", "peft"]
DtypeName = Literal["float32", "bfloat16", "float16"]
NetworkDtypeName = Literal["float32", "bfloat16", "float16", "float32-int8", "bfloat16-int8"]
"""Of a network: with -int8 the weights of linear layers are stored in 8 bits, and computed with in the dtype."""
Space = Literal["noise", "velocity"]
DensityName = Literal["uniform", "logit-normal"]
CompileName = Literal["auto", "blocks", "whole", "off"]
EMBEDDED_GUIDANCE = "embedded_guidance"
"""What a network with guidance built in is told: its name among what a cache's network is told at every call."""
MAX_TIMESTEPS = 32767
"""Timesteps are stored as int16."""
AUTO = 0
"""A batch size that is to be found."""


def _batch_size(value: object) -> object:
    if value == "auto":
        return AUTO
    try:
        number = int(str(value))
    except ValueError:
        number = 0
    if isinstance(value, bool) or number < 1:
        raise ValueError("auto, or a number above 0")
    return number


BatchSize = Annotated[
    int,
    BeforeValidator(_batch_size, json_schema_input_type=int | Literal["auto"]),
    PlainSerializer(lambda value: value or "auto", when_used="json"),
]
"""How many pairs go through the network together; `auto` is AUTO until it has been found."""
