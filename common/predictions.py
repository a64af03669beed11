"""What a network's output means: p * x0 + q * noise, two numbers at every level.

With x = a x0 + s noise and det = a q - s p, both quantities follow from x and the output:

    x0    = (q x - s output) / det
    noise = (a output - p x) / det
"""

from collections.abc import Callable, Mapping

import torch
from jaxtyping import Float
from torch import Tensor

Table = Float[Tensor, " timestep"]

PREDICTIONS: Mapping[str, Callable[[Table, Table], tuple[Table, Table]]] = {
    "epsilon": lambda a, s: (torch.zeros_like(a), torch.ones_like(s)),
    "v_prediction": lambda a, s: (-s, a),
    "sample": lambda a, s: (torch.ones_like(a), torch.zeros_like(s)),
    "flow_prediction": lambda a, s: (-torch.ones_like(a), torch.ones_like(s)),
}
"""(signal, noise) -> (p, q) by the name that diffusers' schedulers have for it; flow_prediction is noise - x0."""
