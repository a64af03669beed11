"""Starts processes of `inpo` fast: imports everything once, then forks one child per request.

    -> {"arguments": [...], "environment": {...}, "log": path}   <- pid
    -> {"wait": pid}                                             <- exit code, -9 if killed

Each child runs the real command in a process of its own, from its signal handlers to its exit code, but does not wait
for the disk, which outlives a killed process. With arguments of its own this program is that command, and waits.
Shards of samples are small here, so that there are several of few images. Where its environment says SHORT_OF_MEMORY,
there is room for so many images in the network, and no more; where a training looks without gradients, for twice as
many.
"""

import gc
import json
import os
import sys
import traceback
from typing import Any

import torch

import inpo.precompute.run
import inpo.rounds.prompts
import inpo.rounds.sample
import inpo.train.run
from inpo.cli import main
from inpo.common.denoiser import Denoiser
from inpo.common.models import Model

inpo.rounds.prompts.MAX_IMAGES_PER_SHARD = 4
_load, _predict = Model.load_network, Denoiser.predict


def _loaded(self: Model) -> Any:
    """From now on calls of the network take memory; loading it has called it itself."""
    network = _load(self)
    Denoiser.predict = _limited  # type: ignore[method-assign]
    return network


def _limited(self: Denoiser, x: torch.Tensor, *rest: Any) -> torch.Tensor:
    """The allocator's own error, of a request that no machine can serve."""
    looks = not torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
    if len(x) > int(os.environ["SHORT_OF_MEMORY"]) * (2 if looks else 1):
        torch.empty(1 << 46, dtype=torch.uint8)
    return _predict(self, x, *rest)


def run(arguments: list[str]) -> int:
    sys.argv[1:] = arguments
    if "SHORT_OF_MEMORY" in os.environ:
        Model.load_network = _loaded  # type: ignore[method-assign]
    try:
        main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def child(request: dict) -> None:
    code = 70
    try:
        log = os.open(request["log"], os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.environ.update(request["environment"])
        code = run(request["arguments"])
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    if sys.argv[1:]:
        sys.exit(run(sys.argv[1:]))
    os.fsync = lambda _: None  # type: ignore[assignment]
    gc.collect()
    gc.freeze()  # each child collects garbage twice, and would copy the libraries' objects by looking at them
    print("ready", flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            answer = os.waitstatus_to_exitcode(os.waitpid(request["wait"], 0)[1])
        else:
            answer = os.fork()
            if answer == 0:
                child(request)
        print(answer, flush=True)
