"""What a network's output means: p * x0 + q * noise, two numbers at every level.

With x = a x0 + s noise and det = a q - s p, both quantities follow from x and the output:

    x0    = (q x - s output) / det
    noise = (a output - p x) / det
"""

from collections.abc import Callable, Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from inpo.common.errors import ModelError

Table = Float[Tensor, "timestep"]

PREDICTIONS: Mapping[str, Callable[[Table, Table], tuple[Table, Table]]] = {
    "epsilon": lambda a, s: (torch.zeros_like(a), torch.ones_like(s)),
    "v_prediction": lambda a, s: (-s, a),
    "sample": lambda a, s: (torch.ones_like(a), torch.zeros_like(s)),
    "flow_prediction": lambda a, s: (-torch.ones_like(a), torch.ones_like(s)),
}
"""(signal, noise) -> (p, q) by the name that diffusers' schedulers have for it; flow_prediction is noise - x0."""


def prediction_of(scheduler: object, allowed: tuple[str, ...] = ("epsilon", "v_prediction", "sample")) -> str:
    """What a diffusers scheduler says its network predicts. Raises ModelError unless it is one of `allowed`."""
    name = getattr(scheduler, "config", {}).get("prediction_type", "epsilon")
    if name not in allowed:
        raise ModelError(
            "Unknown prediction type.",
            where=type(scheduler).__name__,
            expected=", ".join(allowed),
            got=name,
            fix="use a model that predicts noise, v or the sample",
        )
    return str(name)
