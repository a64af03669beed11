"""Images decoded and resized in worker processes.

A decoder that crashes takes down a worker, not the run, and no decoder holds the interpreter lock of the main process.
This module and what it imports leave torch out, so that a worker starts fast and stays small. For the same reason it is
an interpreter of its own and no `multiprocessing.Process`, which imports the main module of the program: a script with
torch in it takes seconds to start and half a gigabyte, and it does so for every worker.

Every worker has a pipe of its own. The standard library's pool has one for the results of all: a worker that is killed
while it writes leaves half a message there, and the pool waits for the rest for ever.
"""

import contextlib
import hashlib
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from multiprocessing import connection
from typing import Any, Generic, TypeVar, cast

import numpy as np

from inpo.common.errors import InpoError
from inpo.common.pairs.images import ImageError, PreparedImage, decode_image, prepare_image
from inpo.common.pairs.noise import decode_noise
from inpo.common.pairs.pair import Pair, Skipped

_AHEAD_PER_WORKER = 4
_SECONDS_TO_START = 300.0
_WORKER = """
import signal, sys
signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the main process's affair
sys.path[:] = {path}
from inpo.common.pairs.decode import serve
serve({pipe})
"""

Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True, eq=False)
class PreparedPair:
    """A pair whose two images are decoded and resized; the encoded ones are gone."""

    pair_id: str
    prompt: str
    label: float
    row: int
    win: PreparedImage
    lose: PreparedImage
    ids: tuple[str, str]
    """Digests of both image files."""
    list: str | None = None
    scores: tuple[float, float] | None = None
    scores_of: str | None = None
    seeds: tuple[int, int] | None = None
    """As the pair has them."""
    noise: tuple[np.ndarray, np.ndarray] | None = None
    """float32 [C, H, W] each."""


def prepare_pair(pair: Pair, flip: bool, *, resolution: tuple[int, int]) -> PreparedPair | Skipped:
    """Both sides of a pair, cropped and flipped alike; or, if either is no good image, the reason."""
    sides: list[PreparedImage] = []
    for side, data in (("win", pair.win), ("lose", pair.lose)):
        try:
            sides.append(prepare_image(decode_image(data), resolution=resolution, crop="center", flip=flip))
        except ImageError as error:
            return _skipped(pair, side, error)
    try:
        noise = None if pair.noise is None else (decode_noise(pair.noise[0]), decode_noise(pair.noise[1]))
    except ValueError as error:
        return Skipped(pair_id=pair.pair_id, reason="missing_noise", detail=f"noise {error}", row=pair.row)
    win, lose = sides
    ids = (image_digest(pair.win), image_digest(pair.lose))
    return PreparedPair(
        pair_id=pair.pair_id,
        prompt=pair.prompt,
        label=pair.label,
        row=pair.row,
        win=win,
        lose=lose,
        ids=ids,
        list=pair.list,
        scores=pair.scores,
        scores_of=pair.scores_of,
        seeds=pair.seeds,
        noise=noise,
    )


def image_digest(data: bytes) -> str:
    """An image's id in a cache: its file's digest."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def measure_pair(pair: Pair) -> list[int] | Skipped:
    """Widths and heights of both images, which are decoded whole; or the reason why one cannot be."""
    sizes: list[int] = []
    for side, data in (("win", pair.win), ("lose", pair.lose)):
        try:
            sizes.extend(decode_image(data).size)
        except ImageError as error:
            return _skipped(pair, side, error)
    return sizes


def _skipped(pair: Pair, side: str, error: ImageError) -> Skipped:
    return Skipped(pair_id=pair.pair_id, reason=error.reason, detail=f"{side}: {error.detail}", row=pair.row)


@dataclass(kw_only=True, eq=False)
class _Waiting(Generic[Result]):
    """A row whose result has not been asked for."""

    row: Pair | Skipped
    arguments: tuple[Any, ...] = ()
    deaths: int = 0
    """Workers that have died over it."""
    result: Result | Skipped | None = None
    done: bool = False


class _Worker:
    """A process and this side of its pipe. Raises OSError if it cannot be started."""

    def __init__(self) -> None:
        self.pipe, theirs = connection.Pipe()
        self.entry: _Waiting[Any] | None = None
        program = _WORKER.format(path=sys.path, pipe=theirs.fileno())
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-c", program], stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()]
            )
        finally:
            theirs.close()  # so that the worker's death is the end of the pipe

    def end(self) -> None:
        """The pipe stays open for a thread that may be waiting at it."""
        self.process.kill()
        self.process.wait()


class DecodePool:
    """`workers` processes, started when rows come for them, or before; with 0 the calling thread does the work itself.

    `start` and `map` are called by one thread at a time; `close` may come from another.
    """

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self._started: list[_Worker] = []
        self._closed = False
        self._lock = threading.Lock()

    def start(self) -> None:
        """Start all processes now, for instance while a model is loaded. Raises InpoError if one cannot start."""
        self._start(self.workers - len(self._started))

    def map(
        self,
        work: Callable[..., Result | Skipped],
        rows: Iterable[Pair | Skipped],
        *,
        arguments: Callable[[Pair], tuple[Any, ...]] = lambda pair: (),
        on_crash: Callable[[Pair], Skipped],
    ) -> Iterator[tuple[Pair | Skipped, Result | Skipped]]:
        """(row, work(pair, *arguments(pair))) for every row, in order, a bounded number ahead; a Skipped row is its
        own result.

        `work` is a function of a module. A pair over which a worker dies goes to another; when that dies too,
        `on_crash` says what becomes of it. Raises what `work` raises, and InpoError if no worker can start.
        """
        waiting: deque[_Waiting[Result | Skipped]] = deque()
        ahead = _AHEAD_PER_WORKER * self.workers
        for row in rows:
            if isinstance(row, Skipped):
                waiting.append(_Waiting(row=row, result=row, done=True))
            else:
                waiting.append(_Waiting(row=row, arguments=arguments(row)))
            self._receive(on_crash, wait=False)
            self._hand_out(work, waiting)
            while len(waiting) > ahead:
                yield self._first(work, waiting, on_crash)
        while waiting:
            yield self._first(work, waiting, on_crash)

    def close(self) -> None:
        """End the workers, whatever they are doing; a `map` under way fails."""
        with self._lock:
            self._closed = True
            workers, self._started = self._started, []
        for worker in workers:
            worker.end()

    def _first(
        self,
        work: Callable[..., Result | Skipped],
        waiting: deque[_Waiting[Result]],
        on_crash: Callable[[Pair], Skipped],
    ) -> tuple[Pair | Skipped, Result | Skipped]:
        """The first row's result, when it is there."""
        head = waiting[0]
        while not head.done:
            if self.workers:
                self._receive(on_crash, wait=True)
                self._hand_out(work, waiting)
            else:
                self._refuse_closed()
                head.result, head.done = work(head.row, *head.arguments), True
        waiting.popleft()
        return head.row, cast(Any, head.result)

    def _hand_out(self, work: Callable[..., Result | Skipped], waiting: deque[_Waiting[Result]]) -> None:
        """Give every idle worker the first pair that none has, one at a time: two could block each other in a full
        pipe.
        """
        if not self.workers:
            return
        given = {id(worker.entry) for worker in self._started}
        for entry in waiting:
            if entry.done or id(entry) in given:
                continue
            worker = next((worker for worker in self._started if worker.entry is None), None)
            if worker is None:
                if len(self._started) >= self.workers:
                    return
                (worker,) = self._start(1)
            worker.entry = entry
            # A worker that has died is found at the end of its pipe.
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                worker.pipe.send((work, entry.row, *entry.arguments))

    def _receive(self, on_crash: Callable[[Pair], Skipped], *, wait: bool) -> None:
        """Keep what workers give: what is there, or the next to come if it is to `wait`."""
        self._refuse_closed()
        by_pipe = {worker.pipe: worker for worker in self._started if worker.entry is not None}
        for pipe in connection.wait(list(by_pipe), timeout=None if wait else 0.0):
            worker = by_pipe[cast(Any, pipe)]
            entry = cast(_Waiting[Any], worker.entry)
            try:
                result, error = worker.pipe.recv()
            except (EOFError, OSError):
                self._refuse_closed()
                self._bury(worker)
                entry.deaths += 1
                if entry.deaths > 1:
                    entry.result, entry.done = on_crash(cast(Pair, entry.row)), True
            else:
                worker.entry = None
                if error is not None:
                    raise error
                entry.result, entry.done = result, True

    def _start(self, number: int) -> list[_Worker]:
        """So many more, which start at the same time."""
        new: list[_Worker] = []
        try:
            for _ in range(number):
                new.append(_Worker())
            for worker in new:
                _wait_for(worker)
            with self._lock:
                self._refuse_closed()
                self._started += new
        except BaseException as error:
            for worker in new:
                worker.end()
            if isinstance(error, OSError):
                raise _cannot_start(f"{type(error).__name__}: {error}", "allow more processes (ulimit -u)") from error
            raise
        return new

    def _bury(self, worker: _Worker) -> None:
        with self._lock:
            if worker in self._started:
                self._started.remove(worker)
        worker.end()

    def _refuse_closed(self) -> None:
        if self._closed:
            raise RuntimeError("the pool is closed")


def _wait_for(worker: _Worker) -> None:
    """Until it has begun; InpoError if it does not."""
    try:
        ready = worker.pipe.poll(_SECONDS_TO_START) and worker.pipe.recv()
    except (EOFError, OSError) as error:
        raise _cannot_start("its end before it had begun", "see the message above") from error
    if not ready:
        raise _cannot_start(f"no sign of life in {_SECONDS_TO_START:.0f} s", "see whether the machine is overloaded")


def _cannot_start(got: str, fix: str) -> InpoError:
    return InpoError(
        "The processes that decode images cannot start.",
        where="--decode-workers",
        got=got,
        fix=f"{fix}; --decode-workers 0 does without them",
    )


def serve(number: int) -> None:
    """In a worker: answer until the main process closes the pipe of this file number, which its death does too."""
    pipe = connection.Connection(number)
    pipe.send(True)
    while True:
        try:
            work, pair, *arguments = pipe.recv()
        except (EOFError, OSError):
            return
        answer: tuple[Any, Exception | None]
        try:
            answer = (work(pair, *arguments), None)
        except Exception as error:  # raised again where the result is asked for
            answer = (None, error)
        try:
            pipe.send(answer)
        except OSError:  # nobody is there to read it
            return
