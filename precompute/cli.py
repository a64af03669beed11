"""`inpo precompute`."""

import signal
from collections.abc import Callable
from types import FrameType
from typing import Annotated

import typer

from inpo.common.options import Given, RecipeOption, options
from inpo.common.recipe import DataSection, ModelSection, resolve
from inpo.precompute.settings import PrecomputeSettings, RayOptions


class Stopped(BaseException):
    """SIGTERM or SIGINT arrived: no error, but the run ends before its work."""


@options(ModelSection, DataSection, PrecomputeSettings, RayOptions)
def precompute(
    given: Given,
    recipe: RecipeOption = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print configuration and plan, then stop.", show_default="off")
    ] = False,
) -> None:
    """Invert every pair once and store (x_t, delta, x0(t)) with the reference error in a zarr cache.

    Run the same command again to resume: committed shards are never made twice.
    """
    from inpo.precompute.run import run_precompute

    raise typer.Exit(
        stoppable(
            lambda: run_precompute(
                recipe,
                given[ModelSection],
                given[DataSection],
                given[PrecomputeSettings],
                ray_options=resolve(RayOptions, "ray", {}, given[RayOptions]),
                dry_run=dry_run,
            )
        )
    )


def stoppable(work: Callable[[], int]) -> int:
    """The exit code of work on a cache, which SIGTERM and SIGINT end in good order: 1 then."""
    from inpo.common.log import say

    previous = {number: signal.signal(number, _stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        return work()
    except Stopped:
        say("stopped: committed shards stay, the ones in flight are dropped; run the same command again to go on")
        return 1
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _stop(number: int, frame: FrameType | None) -> None:
    # A second signal must not interrupt the orderly end of the first.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    raise Stopped
