"""The largest batch that a device takes, found by trying; and what is said where one was too large."""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch

from inpo.common.errors import OutOfMemory
from inpo.common.log import say

MOST = 64
"""Pairs: where the network is the limit, larger batches are no faster."""
_WORDS = ("out of memory", "can't allocate memory", "not enough memory", "STATUS_ALLOC_FAILED", "_ALLOCATION_FAILED")
"""In what torch raises where it has no class of error for it: a CPU's allocator, Apple's, CUDA's own calls, and the
libraries that allocate beside torch (cuBLAS, cuDNN)."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory is short, of whatever device."""
    if isinstance(error, OutOfMemory):
        return False
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _WORDS)


@contextmanager
def memory_in_words(batch_size: int | None, *, smaller: str = "", otherwise: str, auto: bool = True) -> Iterator[None]:
    """Raise OutOfMemory for whatever says inside that memory is short.

    Args:
        batch_size: pairs, or images, together; None: what is done inside does not hang on it.
        smaller: what to do beside taking a smaller batch.
        otherwise: what to do where there is none.
        auto: whether `--batch-size auto` is known there.
    """
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        fix, asked = otherwise, None
        if batch_size is not None and batch_size > 1:
            fix = f"try --batch-size {batch_size // 2}"
            fix += ", or, unless it has found this one, --batch-size auto" if auto else ""
            fix += smaller and f"; {smaller}"
        if batch_size is not None:
            asked = f"--batch-size {batch_size}"
        raise OutOfMemory(
            "The memory is too small.",
            where=asked,
            got=(str(error).strip().splitlines() or [type(error).__name__])[0][:300],
            fix=fix,
        ) from error


def find_batch_size(trial: Callable[[int], object], *, least: Callable[[int], int] = int, otherwise: str) -> int:
    """The largest power of two, in pairs and at most MOST, with which `trial` does not run out of memory. Shards have
    256 rows, which such batches fill.

    Args:
        least: of a number the least of all processes' numbers; called once, by all of them.
        otherwise: what to do where not even one pair fits.

    Raises OutOfMemory if one does not fit, in any process.
    """
    fitting, pairs = 0, 1
    while pairs <= MOST and fits(partial(trial, pairs)):
        fitting, pairs = pairs, 2 * pairs
    found = least(fitting)
    if not found:
        raise OutOfMemory("The memory is too small for one pair.", where="--batch-size auto", fix=otherwise)
    say(f"batch size: {found} pairs, " + ("the most that is tried" if found == MOST else "the most that fit"))
    return found


def fits(trial: Callable[[], object]) -> bool:
    """Whether `trial` does not run out of memory. What it held is given back."""
    try:
        trial()
        return True
    except Exception as error:
        if not is_out_of_memory(error):
            raise
    # What the failed call has held hangs on its error, in a circle.
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return False
