"""Memory of windows that are done with, for the arrays of the next ones."""

import math
import threading

import numpy as np


class Buffers:
    """Free memory by size. Fresh memory costs the system about as much time as reading a window into it.

    Nothing piles up: what no longer fits, because shards have other sizes now, is let go.
    """

    def __init__(self) -> None:
        self._free: list[np.ndarray] = []
        self._lock = threading.Lock()

    def take(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """An array with any values, in given-back memory of at most twice its size if there is any."""
        size = math.prod(shape) * dtype.itemsize
        with self._lock:
            fitting = [number for number, free in enumerate(self._free) if size <= free.nbytes <= 2 * size]
            if fitting:
                memory = self._free.pop(min(fitting, key=lambda number: self._free[number].nbytes))
            else:
                self._free.clear()
                memory = np.empty(size, np.uint8)
        return memory[:size].view(dtype).reshape(shape)

    def give(self, array: np.ndarray) -> None:
        """Take back an array of `take`, which nobody may use any more. Others are ignored."""
        memory = array.base
        if isinstance(memory, np.ndarray) and memory.dtype == np.uint8 and memory.ndim == 1:
            with self._lock:
                self._free.append(memory)
