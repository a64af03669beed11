"""What the inversion asks of the device between two network calls: `python -m benchmarks.operations`.

No clock and no GPU: torch's meta device stands in for one. It holds no numbers, so that whatever waits for one must ask
this module, which counts; and the network is a function that costs no operation.
"""

import argparse
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import DDIMScheduler
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from inpo.common.cache.schema import InverterIdentity
from inpo.common.conditions import Condition
from inpo.common.denoiser import Denoiser
from inpo.common.inversion import Group, invert
from inpo.common.levels import Levels

SD15 = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
CHOICES: dict[str, dict[str, Any]] = {
    "ddim": {"name": "ddim"},
    "ab2, refine 3": {"name": "ab2", "refine_start": 3},
    "fireflow, refine 3": {"name": "fireflow", "refine_start": 3},
    "fixed_point": {"name": "fixed_point", "iterations": 5, "tolerance": 1e-3},
    "noise": {"name": "noise", "noised_start": 1.0},
    "ddim, noised start 0.3": {"name": "ddim", "noised_start": 0.3},
    "ddim, guidance 0": {"name": "ddim", "guidance": 0.0},
    "ddim, guidance 3": {"name": "ddim", "guidance": 3.0},
    "released": {"name": "ddim", "faithful": True},
}


@dataclass(kw_only=True)
class Counts:
    """What one inversion asked for."""

    operations: list[int] = field(default_factory=lambda: [0])
    """Torch operations on the device before the first network call, between every two, and after the last."""
    waits: int = 0
    """Numbers that the CPU asked for and went on with: .item(), .tolist(), float() and their like."""
    copies: int = 0
    """Tensors that were copied to the CPU."""

    @property
    def per_call(self) -> float:
        """Operations per network call, what comes before the first one and after the last included."""
        return sum(self.operations) / (len(self.operations) - 1)


class _OnMeta(Denoiser):
    def autocast(self) -> AbstractContextManager[None]:
        return nullcontext()  # torch knows no autocast there


class _Operations(TorchDispatchMode):
    def __init__(self, counts: Counts) -> None:
        super().__init__()
        self._counts = counts

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        told = out if isinstance(out, Tensor) and out.is_meta else (args, kwargs, out)
        if any(isinstance(leaf, Tensor) and leaf.is_meta for leaf in tree_leaves(told)):
            self._counts.operations[-1] += 1
        return out


class _Answers(TorchFunctionMode):
    """Ones and zeros for whoever wants to know a number that is on the device."""

    def __init__(self, counts: Counts) -> None:
        super().__init__()
        self._counts = counts

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensor = args[0] if args and isinstance(args[0], Tensor) else None
        if tensor is not None and tensor.is_meta:
            if func in (Tensor.tolist, Tensor.item, Tensor.__float__, Tensor.__bool__, Tensor.__int__):
                self._counts.waits += 1
                ones = torch.ones(tensor.shape)
                return ones.tolist() if func is Tensor.tolist else ones.item()
            if func is Tensor.cpu or (func is Tensor.to and str(args[1]) == "cpu"):
                self._counts.copies += 1
                return torch.zeros(tensor.shape, dtype=tensor.dtype)
        return func(*args, **(kwargs or {}))


@contextmanager
def counted() -> Iterator[tuple[Counts, Callable[..., Tensor]]]:
    """(counts of what happens inside, a family's `call` for a network that costs nothing)."""
    counts = Counts()

    def call(network: nn.Module, x: Tensor, label: Tensor, condition: Condition) -> Tensor:
        counts.operations.append(0)
        return x

    with _Operations(counts), _Answers(counts):
        yield counts, call


def count(identity: InverterIdentity, groups: list[Group], *, images_per_batch: int, **settings: Any) -> Counts:
    """Count one inversion of `groups`, K = 4."""
    images = sum(group.num_images for group in groups)
    condition = Condition(embedding=torch.zeros(images, 4, 8))
    with counted() as (counts, call):
        levels = Levels.from_scheduler(DDIMScheduler(**SD15))
        invert(
            _OnMeta(nn.Linear(1, 1, device="meta"), levels, call),
            torch.zeros(images, 4, 8, 8, dtype=torch.float16),
            groups,
            identity=identity,
            seed=0,
            timesteps_per_pair=4,
            caption=condition,
            empty=condition,
            images_per_batch=images_per_batch,
            **settings,
        )
    return counts


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, nargs="+", default=[1, 16, 64], help="per batch; four batches are made")
    options = parser.parse_args(arguments)
    print("| n = 10, K = 4 |", *(f"batch {pairs} |" for pairs in options.pairs), "waits |")
    print("|" + "---|" * (len(options.pairs) + 2))
    for name, settings in CHOICES.items():
        identity = InverterIdentity(**{"grid_points": 10, "timestep_range": (0, 1000), **settings})
        found = [
            count(identity, _pairs(4 * pairs), images_per_batch=2 * pairs, measure_inversion=0.02)
            for pairs in options.pairs
        ]
        print(f"| {name} |", *(f"{counts.per_call:.0f} |" for counts in found), f"{found[-1].waits} |")


def _pairs(count: int) -> list[Group]:
    return [Group(id=str(number), num_images=2) for number in range(count)]


if __name__ == "__main__":
    main()
