"""A network compiled in place, for one shape, with a word about it; and left as it is where that fails.

`Module.compile` leaves the network the object that it was: names of weights, LoRA layers, wrappers and checkpoints do
not change. Kernels are made when the network is called, for the shapes that it is called with, which takes seconds to
minutes. So there is a first call at the very shapes of all later ones, and it happens before anything hangs on it.
"""

import gc
import math
import os
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import nn
from torch._inductor.runtime.cache_dir_utils import default_cache_dir

from inpo.common.batch_size import fits
from inpo.common.choices import CompileName
from inpo.common.errors import InpoError
from inpo.common.log import note, say

_FOLDER = "TORCHINDUCTOR_CACHE_DIR"
SMALL = 8
"""Images of a call, at most, whose kernels are shorter than what it takes to launch them."""
_CALLS_TO_A_GRAPH = 3
"""One that compiles, one that records, one that plays."""
_WORTH = {False: 120, True: 600}
"""Seconds that the work ahead must take as it is, {with gradients: seconds}, for `auto` to compile. On an H200 SD1.5's
blocks took 43 s to compile and 152 s with gradients; that saved a third and a quarter (with an earlier version,
docs/performance.md)."""
_ENTRIES_PER_PART = 8
"""Kernels for one part: with and without gradients, under autocast, and what torch makes again for layouts."""


def uses_graphs(how: CompileName, device: torch.device, images: int) -> bool:
    """Whether a network that is compiled so, for calls of so many images, runs as a CUDA graph: where calls are small,
    launching kernels one by one takes longer than they do.

    It is torch's own mode (reduce-overhead) and not torch.cuda.graph around the call: it keeps the memory of graphs
    with and without gradients apart, copies inputs to where a graph has them, and goes on without a graph where one
    cannot be. Blocks get none: each graph would write over what an earlier one gave to the skips. What a graph gives is
    valid until the next call, so that outputs are copied, and gradients are added up in memory of their own.
    """
    return how == "whole" and device.type == "cuda" and images <= SMALL


def compile_network(
    network: nn.Module,
    how: CompileName,
    first: Callable[[], object],
    *,
    blocks: Sequence[str],
    device: torch.device,
    varying: bool = False,
    graphs: bool = False,
    shapes: int = 1,
    ahead: int | None = None,
    agree: Callable[[bool], bool] = bool,
    meeting: bool = False,
) -> bool:
    """Compile `network` in place. Returns whether it is compiled now: no if nobody asked, if it is left to us and does
    not pay, or if it failed, with a note.

    Args:
        first: calls the network once in every way that it will be called, at each shape of the calls to come; under
            training that is forward and backward.
        graphs: run it as a CUDA graph (see uses_graphs).
        shapes: how many those shapes are.
        blocks: class names of what `blocks` compiles; empty: what diffusers names for this class of networks.
        varying: sizes inside the network change from call to call, and kernels are made for any of them.
        ahead: how many calls like `first` there will be, about; None: nobody knows, many.
        agree: of "it is so here" whether it is so in all processes; called equally often in all of them.
        meeting: processes wait for one another inside `first`, so that out of memory in one of them ends it.

    Raises what `first` raises of our own, and out of memory.
    """
    # With sizes of their own for every call, no graph and no kernels of the whole would be used twice.
    how, graphs = ("blocks" if varying and how == "whole" else how), graphs and not varying
    parts = _parts(network, how, blocks, device)
    if not parts or (how == "auto" and ahead is not None and not _pays(network, first, ahead, agree, meeting)):
        return False
    what = "the whole network" if parts == [network] else f"{len(parts)} blocks of the network ({_names(parts)})"
    what += " and its CUDA graph" if graphs else ""
    say(f"compiling {what}; kernels are kept in {kernel_folder()}")
    clock = time.perf_counter()
    failure: Exception | None = None
    _allow_kernels(_ENTRIES_PER_PART * len(parts) * shapes)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, of how it compiles; what the network's calls warn of comes again
            for part in parts:
                part.compile(dynamic=varying, mode="reduce-overhead" if graphs else None)
            for _ in range(_CALLS_TO_A_GRAPH if graphs else 1):
                first()
    except (InpoError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # torch, the C++ compiler, Triton, a full disk: whatever it was, eager does without it
        failure = error
    if agree(failure is None):
        say(f"compiled in {time.perf_counter() - clock:.1f} s, a first call included")
        return True
    for part in parts:
        part._compiled_call_impl = None
    reason = "it failed in another process" if failure is None else _in_words(failure)
    note(f"the network runs as it is, because compiling it failed: {reason} (--compile off does not try)")
    return False


def _allow_kernels(count: int) -> None:
    """All parts share torch's limit, because they share the code that calls a module. It is raised for good: behind it
    a call at a shape of its own would run as it is, without a word."""
    settings = torch._dynamo.config
    settings.recompile_limit = max(settings.recompile_limit, count)
    settings.accumulated_recompile_limit = max(settings.accumulated_recompile_limit, 2 * count)


def _pays(
    network: nn.Module, first: Callable[[], object], ahead: int, agree: Callable[[bool], bool], meeting: bool
) -> bool:
    """Whether the work ahead takes long as it is, in all processes. The first call, which loads libraries too, may say
    no already."""
    worth = _WORTH[any(each.requires_grad for each in network.parameters())]
    for _ in range(2):
        if not agree(ahead * _seconds(first, meeting) >= worth):
            say("nothing is compiled: the work ahead is too short for that to pay (--compile blocks asks for it)")
            return False
    return True


def _seconds(call: Callable[[], object], meeting: bool) -> float:
    """What a call takes; infinity where it does not fit into memory: a compiled one, which holds less, may."""
    _synchronise()
    clock = time.perf_counter()
    if meeting:
        call()
    elif not fits(call):
        return math.inf
    _synchronise()
    return time.perf_counter() - clock


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def kernel_folder() -> str:
    """Where kernels stay between runs: where torch's own variable says, else in the user's cache folder."""
    # torch writes its own default there as soon as it has looked; only another one has been chosen by anybody.
    if os.environ.get(_FOLDER) in (None, default_cache_dir()):
        base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        folder = Path(base) / "inpo" / "kernels"
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError:  # no home that can be written: torch takes the system's temporary folder
            return "torch's temporary folder"
        if not os.access(folder, os.W_OK):
            return "torch's temporary folder"
        os.environ[_FOLDER] = str(folder)
    return os.environ[_FOLDER]


def release() -> None:
    """Give back what work that has ended held: models in circles of references, compiled code, a device's memory."""
    gc.collect()
    torch.compiler.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _parts(network: nn.Module, how: CompileName, blocks: Sequence[str], device: torch.device) -> list[nn.Module]:
    """The modules to be compiled; none if nothing is to be."""
    if how == "auto":
        how = "blocks" if device.type == "cuda" else "off"
    if how == "off":
        return []
    if how == "whole":
        return [network]
    names = set(blocks or getattr(network, "_repeated_blocks", None) or ())
    # A wrapper may have put a class of its own over a block's: its parents are asked too.
    return [each for each in network.modules() if names & {parent.__name__ for parent in type(each).__mro__}]


def _names(parts: Sequence[nn.Module]) -> str:
    return ", ".join(sorted({type(part).__name__ for part in parts}))


def _in_words(error: Exception) -> str:
    """The beginning of an error: compilers print pages, with all that they were called with."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines[:2])[:300]}" if lines else type(error).__name__
