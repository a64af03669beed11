"""Joining or starting a Ray cluster, and counting the places for workers in it."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType
from typing import Any

from inpo.common.errors import InpoError, UsageError
from inpo.precompute.settings import RayOptions

_OBJECT_STORE_BYTES = 100_000_000
"""Tasks and commits go through Ray, never tensors."""


def connect(options: RayOptions) -> None:
    """Join the cluster at `--ray-address`, or start one on this machine. Does nothing if already connected.

    Raises UsageError if Ray is not installed or the address does not answer.
    """
    with _kept_signal_handlers():
        try:
            import ray
        except ImportError:
            raise UsageError(
                "The ray engine needs Ray, which is not installed.",
                where="--engine ray",
                fix="`pip install 'inpo-cache[ray]'`, or choose --engine local",
            ) from None
        if ray.is_initialized():
            return
        os.environ.setdefault("RAY_COLOR_PREFIX", "0")  # its colours before workers' lines would be escaped
        quiet: dict[str, Any] = {"logging_level": "warning", "log_to_driver": True}
        if options.address is None:
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
            cpus = max(len(os.sched_getaffinity(0)), options.workers or 1)
            quiet |= {"num_cpus": cpus, "object_store_memory": _OBJECT_STORE_BYTES, "include_dashboard": False}
            try:
                ray.init("local", **quiet)
            except Exception as error:  # Ray raises this itself where a part of it is not there in time
                raise InpoError(
                    "Ray does not start on this machine.",
                    where="--engine ray",
                    got=(str(error).splitlines() or [type(error).__name__])[0][:200],
                    fix="run again when the machine has less to do, or without --engine ray",
                ) from error
            return
        try:
            ray.init(options.address, **quiet)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise UsageError(
                "The Ray cluster does not answer.",
                where="--ray-address",
                expected="host:port of a running cluster",
                got=f"{options.address}: {str(error).splitlines()[0][:200]}",
                fix="check it with `ray status`",
            ) from error


def disconnect() -> None:
    """Stop the cluster that `connect` started, or leave the one that it joined."""
    import ray

    with _kept_signal_handlers():
        ray.shutdown()


def has_gpus() -> bool:
    """True if any node of the connected cluster has a GPU: then only GPUs are used."""
    import ray

    return any(node["Resources"].get("GPU", 0) > 0 for node in ray.nodes() if node["Alive"])


def places(options: RayOptions, *, use_gpus: bool) -> dict[str, int]:
    """{node id: workers that fit} for every living node with room: by GPUs, or by CPUs where there are none."""
    import ray

    found: dict[str, int] = {}
    for node in ray.nodes():
        if not node["Alive"]:
            continue
        if use_gpus:
            number = int(node["Resources"].get("GPU", 0)) * int(1 / (options.gpus_per_worker or 1.0))
        else:
            number = int(node["Resources"].get("CPU", 0))
        if number:
            found[node["NodeID"]] = number
    return found


@dataclass
class StopRequest:
    """Whether SIGTERM or SIGINT has arrived."""

    signal: int | None = None


@contextlib.contextmanager
def deferred_stop() -> Iterator[StopRequest]:
    """Signals only set a flag inside; at the end they reach the handler that was there before.

    An exception out of a signal handler would come up anywhere inside Ray's own code.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return

    def note(number: int, frame: FrameType | None) -> None:
        request.signal = number

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if request.signal is not None:
            signal.raise_signal(request.signal)


@contextlib.contextmanager
def _kept_signal_handlers() -> Iterator[None]:
    """Ray puts its own SIGTERM handler in place when it is imported and when it starts."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
