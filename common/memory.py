"""What a run will hold on its device, counted on torch's meta device, which has shapes and no numbers.

The network itself runs there, forward and backward, so that what is counted is its own graph, of whatever family and
library version: every tensor that is alive, with the copies that autocast makes. Not counted: what a device's library
takes inside one operation, the gaps between tensors, and its own share (half a gigabyte for CUDA).
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.experimental import _config as symbolic
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from inpo.common.denoiser import compute_dtype, is_quantised
from inpo.common.tensor_watch import TensorWatch

META = torch.device("meta")
USABLE = 0.9
"""Of a device's memory: the rest is for what is not counted."""
_COUNTED_AT = (4, 8)
"""Images at which activations are counted; they grow by the same with every image more."""

LOWER = frozenset(
    "addbmm addmm addmv addr baddbmm bmm chain_matmul conv1d conv2d conv3d conv_tbc conv_transpose1d conv_transpose2d "
    "conv_transpose3d convolution einsum linalg_multi_dot linalg_vecdot linear matmul mm mv prelu "
    "scaled_dot_product_attention".split()
)
"""What autocast runs in the network's dtype, but for recurrent cells; everywhere."""
FLOAT32 = {
    "cuda": frozenset(
        "acos asin binary_cross_entropy_with_logits cdist cosh cosine_embedding_loss cosine_similarity cumprod cumsum "
        "dist erfinv exp expm1 frobenius_norm group_norm hinge_embedding_loss huber_loss interpolate kl_div l1_loss "
        "layer_norm linalg_matrix_norm linalg_vector_norm log log10 log1p log2 log_softmax logsumexp "
        "margin_ranking_loss mse_loss multi_margin_loss multilabel_margin_loss native_layer_norm nll_loss nll_loss2d "
        "norm nuclear_norm pdist poisson_nll_loss pow prod reciprocal renorm rms_norm rsqrt sinh smooth_l1_loss "
        "soft_margin_loss softmax softplus sum tan triplet_margin_loss upsample_bicubic2d upsample_bilinear2d "
        "upsample_linear1d upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_trilinear3d".split()
    )
}
"""What it runs in float32, by device; elsewhere none of these. Both as torch's autocast_mode.h has them, and
`interpolate`, which calls the upsampling ones."""


class _Counting(TorchFunctionMode):
    """autocast for the meta device, which has none; attention as GPUs do it, without its scores; and an answer for who
    asks for a number: `tokens` for how long a prompt is, which is all that networks ask."""

    def __init__(self, network_dtype: str, device_type: str, tokens: int) -> None:
        super().__init__()
        dtype = compute_dtype(network_dtype)
        self.dtype = None if dtype == torch.float32 else dtype
        self.float32 = FLOAT32.get(device_type, frozenset())
        self.tokens = tokens

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "").strip("_")
        if func in (Tensor.tolist, Tensor.item, Tensor.__bool__, Tensor.__int__, Tensor.__float__, Tensor.__index__):
            told = torch.full(args[0].shape, self.tokens, device="cpu")
            return bool(self.tokens) if func is Tensor.__bool__ else getattr(told, func.__name__)()
        if self.dtype is not None and (name in LOWER or name in self.float32):
            dtype = self.dtype if name in LOWER else torch.float32
            args = [_cast(each, dtype) for each in args]
            kwargs = {key: _cast(each, dtype) for key, each in kwargs.items()}
        if name == "scaled_dot_product_attention":
            return _attention(*args, **kwargs)
        return func(*args, **kwargs)


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, list | tuple):
        return type(value)(_cast(each, dtype) for each in value)
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if attn_mask is not None:
        attn_mask = attn_mask.to(query.dtype)
    if enable_gqa:
        key, value = (each.repeat_interleave(query.shape[1] // each.shape[1], 1) for each in (key, value))
    output: Tensor = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale
    )[0]
    return output


@contextmanager
def counting(network_dtype: str, *, tokens: int = 1, device_type: str = "cuda") -> Iterator[TensorWatch]:
    """Count the tensors that are made inside, as `device_type` would hold them under autocast in `network_dtype`."""
    with (
        symbolic.patch(meta_nonzero_assume_all_nonzero=True),  # type: ignore[attr-defined]
        warnings.catch_warnings(),
        _Counting(network_dtype, device_type, tokens),
        TensorWatch() as watch,
    ):
        warnings.simplefilter("ignore")  # torch's, of how slow something would be
        yield watch


def checkpoint_counted(network: nn.Module, network_dtype: str, *, tokens: int, device_type: str = "cuda") -> None:
    """Gradient checkpointing that computes again as it has computed: the backward pass is outside of every mode."""
    again = partial(_Counting, network_dtype, device_type, tokens)
    network.enable_gradient_checkpointing(  # type: ignore[operator]
        partial(checkpoint, use_reentrant=False, preserve_rng_state=False, context_fn=lambda: (nullcontext(), again()))
    )


def bytes_of(tensors: Iterator[Tensor]) -> int:
    """Of all these tensors."""
    return sum(each.numel() * each.element_size() for each in tensors)


def weights_of(network: nn.Module, network_dtype: str = "float32") -> int:
    """Bytes of parameters and buffers; in a quantised dtype with one for each frozen weight of a linear layer, and a
    scale for each row."""
    whole = bytes_of(network.parameters()) + bytes_of(network.buffers())
    if not is_quantised(network_dtype):
        return whole
    frozen = [
        each.weight for each in network.modules() if isinstance(each, nn.Linear) and not each.weight.requires_grad
    ]
    return whole - sum(each.numel() * (each.element_size() - 1) - len(each) * each.element_size() for each in frozen)


@dataclass(frozen=True, kw_only=True)
class Peak:
    """The most that one device holds in bytes, for any number of images in the network together."""

    weights: int
    optimizer: int = 0
    """Its state, and the weights' moving average."""
    gradients: int = 0
    """Of all trained weights. They come while activations go, so that the larger of the two counts."""
    gradients_stay: bool = False
    """Where processes exchange them: they lie in memory that is taken from the start, so that both count."""
    fixed: float = 0.0
    per_image: float = 0.0
    """Activations are fixed + per_image * images."""
    shard: int = 0
    """What lies there of a whole shard, while a batch of it is in the network."""
    elsewhere: int = 0
    """At least so much, in another phase of the run."""

    def activations(self, images: int) -> int:
        return round(self.fixed + self.per_image * images)

    def at(self, images: int) -> int:
        """With so many images."""
        stay, come = (self.gradients, 0) if self.gradients_stay else (0, self.gradients)
        beside = stay + max(come, self.activations(images))
        return max(self.elsewhere, self.weights + self.optimizer + self.shard + beside)

    def most_images(self, memory: int) -> int:
        """How many fit into a device's memory, with a tenth of it to spare; 0: none."""
        room = int(USABLE * memory)
        if self.at(1) > room:
            return 0
        stay = self.gradients if self.gradients_stay else 0
        room -= self.weights + self.optimizer + self.shard + stay
        return int((room - self.fixed) // max(self.per_image, 1.0))


def line(count: Callable[[int], int]) -> tuple[float, float]:
    """(fixed, per image) of what `count` finds for a number of images."""
    (low, at_low), (high, at_high) = ((images, count(images)) for images in _COUNTED_AT)
    slope = (at_high - at_low) / (high - low)
    return at_low - slope * low, slope


@dataclass(frozen=True, kw_only=True)
class Need:
    """What one way to run needs, for a plan."""

    what: str
    batch_size: int
    """Pairs, or lists; 0: as many as fit."""
    peak: Peak
    sides: int = 2
    """Images of each of them."""

    def to_json(self, memory: int | None) -> dict[str, Any]:
        """Bytes, and batches in pairs or lists. `memory`: bytes of a device; None: not known."""
        largest = None if memory is None else self.peak.most_images(memory) // self.sides
        batch_size = self.batch_size or largest or 1
        return {
            "what": self.what,
            "batch_size": batch_size,
            "weights": self.peak.weights,
            "optimizer": self.peak.optimizer,
            "shard": self.peak.shard,
            "gradients": self.peak.gradients,
            "activations": self.peak.activations(self.sides * batch_size),
            "peak": self.peak.at(self.sides * batch_size),
            "device_memory": memory,
            "largest_batch_size": largest,
        }


def device_memory(gibibytes: float | None) -> int | None:
    """Bytes of the device that a plan is for: as told, or this machine's first GPU; None: neither."""
    if gibibytes is not None:
        return int(gibibytes * 2**30)
    return torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None
