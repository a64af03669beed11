"""One network behind one signature: whatever it predicts, noise, x0(t) or velocity come out."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from inpo.common.choices import DtypeName, NetworkDtypeName, Space
from inpo.common.conditions import Condition, NetworkCall
from inpo.common.errors import UsageError
from inpo.common.levels import Levels
from inpo.common.predictions import PREDICTIONS

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_ALIASES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
_INT8 = "-int8"


def dtype_name(name: str) -> str:
    """The canonical name of a network dtype; accepts fp32, bf16 and fp16 too."""
    canonical = _ALIASES.get(name, name)
    known = get_args(NetworkDtypeName)
    if canonical not in known:
        raise UsageError("Unknown dtype.", where="--dtype", expected=", ".join(known), got=name, fix="name one of them")
    return canonical


def is_quantised(network_dtype: str) -> bool:
    """Whether the weights of the network's linear layers are stored in 8 bits."""
    return network_dtype.endswith(_INT8)


def compute_name(network_dtype: str) -> str:
    """The dtype that a network of this one computes in, by name."""
    return network_dtype.removesuffix(_INT8)


def compute_dtype(network_dtype: str) -> torch.dtype:
    """What a network of this dtype computes in."""
    return DTYPES[compute_name(network_dtype)]


def default_dtype(device_type: str) -> DtypeName:
    """What an unset dtype means in every stage: bfloat16 on a GPU, float32 on a CPU."""
    return "float32" if device_type == "cpu" else "bfloat16"


class Denoiser:
    """What targets are of, predicted: eps(x, t, c), or v(x, t, c) on levels in velocity space; in float32, whatever
    the network was trained to predict.

    The network runs under autocast in `network_dtype`; inputs and outputs are float32. What its output means at a
    timestep follows from `levels` and `prediction` (common/predictions.py). A timestep may be the number of any point
    that a path visits (common/levels.py).
    """

    def __init__(
        self,
        network: nn.Module,
        levels: Levels,
        call: NetworkCall,
        prediction: str = "epsilon",
        *,
        network_dtype: str = "float32",
    ) -> None:
        self.network = network
        self.levels = levels
        self.call = call
        self.prediction = prediction
        self.network_dtype = dtype_name(network_dtype)
        self.num_calls = 0
        """Latents evaluated so far: one call is one latent through the network."""
        self.rows: int | None = None
        """Latents in every call of the network, where that is compiled for one shape; None: as they come."""
        signal, noise, label = levels.walked
        p, q = PREDICTIONS[prediction](signal, noise)
        # In float64: for v the determinant is a^2 + s^2, which must come out as 1.
        det = signal * q - noise * p
        self._tables = torch.stack([signal, noise, p, q, det, label]).float()

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    def predict(
        self, x: Float[Tensor, "batch c h w"], timestep: Int[Tensor, " batch"], condition: Condition
    ) -> Float[Tensor, "batch c h w"]:
        """The network's own output, float32."""
        self.num_calls += x.shape[0]
        if self.levels.clean < 0:
            label = self._beside(timestep)[-1, timestep.long()]
        else:  # before the table, where the released code asks, the label goes on as the index does
            label = self._beside(timestep)[-1, timestep.long().clamp(min=0)] + timestep.clamp(max=0)
        if self.rows is None:
            return self._output(x, label, condition)
        # Another number of rows, or order in memory, would be compiled anew: what is missing repeats the last row.
        outputs = []
        for first in range(0, len(x), self.rows):
            places = torch.arange(first, first + self.rows, device=x.device).clamp(max=len(x) - 1)
            outputs.append(self._output(x[places].contiguous(), label[places], condition.rows(places)))
        return torch.cat(outputs)[: len(x)]

    def _output(
        self, x: Float[Tensor, "batch c h w"], label: Float[Tensor, " batch"], condition: Condition
    ) -> Float[Tensor, "batch c h w"]:
        """One call of the network."""
        with self.autocast():
            output = self.call(self.network, x, label, condition)
        # What a compiled network gives may be written over by its next call.
        return output.to(torch.float32, copy=self.rows is not None)

    def __call__(
        self,
        x: Float[Tensor, "batch c h w"],
        timestep: Int[Tensor, " batch"],
        condition: Condition,
        space: Space | None = None,
    ) -> Float[Tensor, "batch c h w"]:
        """Noise or velocity, as `space` says; None: what the levels' targets are of."""
        return self.to_space(self.predict(x, timestep, condition), x, timestep, space)

    def to_space(
        self,
        output: Float[Tensor, "batch c h w"],
        x: Float[Tensor, "batch c h w"],
        timestep: Int[Tensor, " batch"],
        space: Space | None = None,
    ) -> Float[Tensor, "batch c h w"]:
        """Noise or velocity = noise - x0(t) from the network's own output at (x, t)."""
        if (space or self.levels.space) == "noise":
            return self.to_noise(output, x, timestep)
        if self.prediction == "flow_prediction":
            return output
        return self.to_noise(output, x, timestep) - self.to_clean(output, x, timestep)

    def to_noise(
        self, output: Float[Tensor, "batch c h w"], x: Float[Tensor, "batch c h w"], timestep: Int[Tensor, " batch"]
    ) -> Float[Tensor, "batch c h w"]:
        """Noise from the network's own output at (x, t); the output itself where that is noise."""
        if self.prediction == "epsilon":
            return output
        a, _, p, _, det = self.at(timestep)
        return (a * output - p * x) / det

    def to_clean(
        self, output: Float[Tensor, "batch c h w"], x: Float[Tensor, "batch c h w"], timestep: Int[Tensor, " batch"]
    ) -> Float[Tensor, "batch c h w"]:
        """x0(t) from the network's own output at (x, t), Eq. 8; the output itself where that is x0."""
        if self.prediction == "sample":
            return output
        _, s, _, q, det = self.at(timestep)
        return (q * x - s * output) / det

    def at(self, timestep: Int[Tensor, " batch"]) -> tuple[Float[Tensor, "batch 1 1 1"], ...]:
        """(a, s, p, q, a q - s p) in float32 where the timesteps are."""
        return self._beside(timestep)[:-1, timestep.long(), None, None, None].unbind()

    def _beside(self, timestep: Tensor) -> Float[Tensor, "6 timestep"]:
        """The tables on the timesteps' device, copied there once: looking up must not wait for a GPU."""
        if self._tables.device != timestep.device:
            with torch.inference_mode(False):  # the copy outlives the call, and a trainer may differentiate past it
                self._tables = self._tables.to(timestep.device)
        return self._tables

    @contextmanager
    def autocast(self) -> Iterator[None]:
        """autocast in the network's dtype; nothing in float32."""
        dtype = compute_dtype(self.network_dtype)
        with torch.autocast(self.device.type, dtype=dtype, enabled=dtype != torch.float32):
            yield


def check_quantiser(network_dtype: str) -> None:
    """Raise UsageError for a quantised dtype without the package that quantises."""
    if is_quantised(network_dtype) and find_spec("torchao") is None:
        raise UsageError(
            f"The network dtype {network_dtype} needs the package torchao, which is not installed.",
            where="--dtype",
            fix="`pip install torchao`, or choose another dtype",
        )


def prepare_for_inference(network: nn.Module, *, network_dtype: str, device: torch.device) -> None:
    """Freeze `network`, move it, and store convolution and linear weights in `network_dtype`.

    autocast would cast exactly those weights at every call, so the numbers do not change; memory and time do. Of a
    quantised dtype they do: each row of a linear layer's weights has a scale. Raises UsageError if torchao is missing.
    """
    network.requires_grad_(False).eval()
    dtype = compute_dtype(dtype_name(network_dtype))
    if dtype != torch.float32:  # before it moves: a network of 20 billion weights does not fit a device in float32
        for module in network.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                module.to(dtype)
    if is_quantised(network_dtype):
        check_quantiser(network_dtype)
        from torchao.quantization import Int8WeightOnlyConfig, quantize_

        quantize_(network, Int8WeightOnlyConfig(version=2))
    network.to(device)
    if device.type == "cuda":
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
