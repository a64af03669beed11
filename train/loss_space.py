"""The space that a loss is in: exact for every cache, because errors of one prediction are multiples of each other.

With x_t fixed, an output p x0 + q noise is off by (q - p s / a) times what its noise is off by: by 1 for noise, 1 / a
for v, s / a for the sample (its sign does not matter), and (a + s) / a for a flow's velocity. So both mean squares,
E_theta and E_ref, are multiplied by one number per timestep.
"""

import torch
from jaxtyping import Float

from inpo.common.choices import Space
from inpo.common.levels import Levels
from inpo.common.predictions import PREDICTIONS
from inpo.train.settings import LossSpace

_VELOCITY = "flow_prediction"


def error_weights(
    levels: Levels, prediction: str, loss_space: LossSpace, target: Space
) -> Float[torch.Tensor, " timestep"]:
    """Error in the loss's space over error in the target's, by timestep, float64. own: what the network predicts; v of
    a flow is its velocity."""
    a, s = levels.signal, levels.noise

    def square(kind: str) -> Float[torch.Tensor, " timestep"]:
        p, q = PREDICTIONS[kind](a, s)
        return (q - p * s / a).square()

    kind = predicted(levels, prediction, loss_space)
    return square(kind) / square("epsilon" if target == "noise" else _VELOCITY)


def predicted(levels: Levels, prediction: str, loss_space: LossSpace) -> str:
    """The prediction whose errors the loss has, by its name in PREDICTIONS. `prediction`: the network's."""
    v = _VELOCITY if levels.space == "velocity" else "v_prediction"
    return {"own": prediction, "noise": "epsilon", "v": v}[loss_space]
