"""What runs on a Ray cluster: a worker per device, models loaded once, the local engine's pipeline inside."""

import contextlib
import copy
import os
import queue
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, cast

import torch

from inpo.common.cache import CacheWriter, Manifest
from inpo.common.cache.identity import check_identity
from inpo.common.cache.schema import MANIFEST
from inpo.common.cache.store import CacheStore, digest
from inpo.common.errors import CacheCorrupt, CacheMismatch, CacheMissing, InpoError
from inpo.common.recipe import ModelSection
from inpo.precompute.engines.watchdog import Watchdog
from inpo.precompute.phases import Phase
from inpo.precompute.pipeline import Outcome, Task, Timing, Worker, run_tasks
from inpo.precompute.settings import PrecomputeSettings
from inpo.precompute.tasks import ShardTask


@dataclass(frozen=True, kw_only=True)
class Reply:
    """A worker's answer: an outcome, or an error that ends the run. `timing` covers the worker's life so far."""

    outcome: Outcome | None = None
    error: InpoError | None = None
    timing: Timing


class RayWorker:
    """An actor. `make` is called from several threads at once, each with one task, and feeds one pipeline."""

    def __init__(
        self,
        *,
        phase: Phase,
        folder: str,
        model: ModelSection,
        location: str,
        manifest: Manifest,
        manifest_digest: str,
        settings: PrecomputeSettings,
    ) -> None:
        # Relative paths of pairs and model mean the driver's folder, where this node has it.
        with contextlib.suppress(OSError):
            os.chdir(folder)
        self._phase = phase
        self._model = model
        self._location = location
        self._manifest = manifest
        self._manifest_digest = manifest_digest
        self._settings = settings
        self._timing = Timing()
        self._tasks: queue.SimpleQueue[Task] = queue.SimpleQueue()
        self._promises: dict[str, Future[Outcome]] = {}
        self._failure: BaseException | None = None
        self._lock = threading.Lock()

    def load(self) -> InpoError | None:
        """Open the cache, load the models and start the pipeline; returns what a user can mend, raises what not."""
        try:
            model = self._model.open()
            if model.fingerprints != self._manifest.fingerprints:
                raise CacheMismatch(
                    f"The model on node {socket.gethostname()} is not the one that this run began with.",
                    where=model.folder,
                    expected=self._manifest.fingerprints,
                    got=model.fingerprints,
                    fix="put the same files at this path on every node",
                )
            writer = _open_writer(self._location, self._manifest, self._manifest_digest)
        except InpoError as error:
            return error
        # Ray shows a worker only the devices that it was given.
        device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
        try:
            worker = self._phase.worker(model, writer, self._settings, device)
        except InpoError as error:
            return error
        threading.Thread(target=self._run, args=(worker,), name="pipeline", daemon=True).start()
        return None

    def make(self, task: Task, shared: Any) -> Reply:
        """Make one shard and wait for its commit. Raises what no user can mend (a device that failed).

        `shared` is the input shard that `task` was sent without: it may hold an index of many rows, and travels to a
        node only once.
        """
        if shared is not None:
            task = cast(ShardTask, task).of(shared)
        promise: Future[Outcome] = Future()
        with self._lock:
            if self._failure is None:
                self._promises[task.name] = promise
                self._tasks.put(task)
            else:
                promise.set_exception(self._failure)
        try:
            return Reply(outcome=promise.result(), timing=copy.deepcopy(self._timing))
        except InpoError as error:
            return Reply(error=error, timing=copy.deepcopy(self._timing))

    def _pulled(self) -> Iterator[Task]:
        while True:
            yield self._tasks.get()

    def _run(self, worker: Worker) -> None:
        try:
            with Watchdog(self._timing, name=f"worker {os.getpid()} on {socket.gethostname()}"):
                for outcome in run_tasks(worker, self._pulled(), self._timing):
                    with self._lock:
                        promise = self._promises.pop(outcome.task.name)
                    promise.set_result(outcome)
        except BaseException as error:  # every caller is told, whatever it was
            with self._lock:
                self._failure = error
                promises, self._promises = list(self._promises.values()), {}
            for promise in promises:
                promise.set_exception(error)


def _open_writer(location: str, manifest: Manifest, manifest_digest: str) -> CacheWriter:
    """The cache that the driver has opened already: never made anew here, or a node would fill a disk of its own."""
    fix = "use storage that every node reaches by this address: a shared file system, s3:// or gs://"
    try:
        store = CacheStore(location)
    except CacheMissing as error:
        raise CacheMissing(
            f"Node {socket.gethostname()} does not see the cache.", where=location, got=error.got, fix=fix
        ) from error
    data = store.get(MANIFEST)
    if data is None:
        raise CacheMissing(
            f"Node {socket.gethostname()} sees another folder at the cache's address.",
            where=location,
            expected=MANIFEST,
            got="no such file",
            fix=fix,
        )
    existing = Manifest.from_json(data, store.path(MANIFEST))
    check_identity(existing, manifest, location)
    if digest(data) != manifest_digest:
        raise CacheCorrupt(
            f"Node {socket.gethostname()} finds another manifest than the run began with.",
            where=store.path(MANIFEST),
            expected=f"digest {manifest_digest}",
            got=digest(data),
            fix="manifest.json was edited or replaced: restore it from a copy",
        )
    return CacheWriter(store, existing, data)
