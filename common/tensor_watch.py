"""Counting what a piece of torch code holds and waits for, with no clock: for tests and benchmarks."""

import weakref
from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

WAITS = frozenset(
    f"aten.{name}"
    for name in "_local_scalar_dense nonzero is_nonzero equal item masked_select _unique2 unique_dim "
    "unique_consecutive bincount".split()
)
"""Operators whose answer, or its size, the CPU must wait for when the numbers are on a GPU. A copy to the CPU, which
waits too, looks like nothing where all is on the CPU."""
_WAITS_OF_MASKS = frozenset(f"aten.{name}" for name in ("index", "index_put", "index_put_", "_unsafe_index"))


def _is_mask(index: Any) -> bool:
    """Whether an index is a mask, whose true places are counted first."""
    return isinstance(index, torch.Tensor) and index.dtype in (torch.bool, torch.uint8)


class TensorWatch(TorchDispatchMode):
    """While entered, in this thread: `waits` by operator, and bytes of the tensors made since that are alive.

    `held` is now, `peak` the most so far. Memory that was there before does not count, nor do views.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()
        self.held = 0
        self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = str(func).rsplit(".", 1)[0]
        if name in WAITS or (name in _WAITS_OF_MASKS and any(_is_mask(each) for each in args[1])):
            self.waits[name] += 1
        if name == "aten.repeat_interleave" and "output_size" not in (kwargs or {}):
            self.waits[name] += 1
        given = {
            leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)
        }
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor) and leaf.untyped_storage()._cdata not in given:
                self._hold(leaf.untyped_storage())
        return out

    def _hold(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.held += size
        self.peak = max(self.peak, self.held)
        weakref.finalize(storage, self._release, key, size)

    def _release(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.held -= size
