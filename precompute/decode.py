"""Images decoded and resized in worker processes.

The interpreter lock of the main process stays with the thread that feeds the device, and a decoder that crashes takes
down a worker, not the run. This module and what it imports leave torch out, so that a worker starts fast and stays small.
"""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, cast

from common.errors import DataError, InpoError
from common.pairs.images import ImageError, PreparedImage, decode_image, prepare_image
from common.pairs.pair import Pair, Skipped

_AHEAD_PER_WORKER = 4
_METHOD = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"

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


def prepare_pair(pair: Pair, flip: bool, *, resolution: int) -> PreparedPair | Skipped:
    """Both sides of a pair, cropped and flipped alike; or, if either is no good image, the reason."""
    sides: list[PreparedImage] = []
    for side, data in (("win", pair.win), ("lose", pair.lose)):
        try:
            sides.append(prepare_image(decode_image(data), resolution=resolution, crop="center", flip=flip))
        except ImageError as error:
            return _skipped(pair, side, error)
    return PreparedPair(
        pair_id=pair.pair_id, prompt=pair.prompt, label=pair.label, row=pair.row, win=sides[0], lose=sides[1]
    )


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


@dataclass(kw_only=True)
class _Waiting(Generic[Result]):
    """A row whose result has not been asked for; rows without a pair need no worker."""

    row: Pair | Skipped
    future: Future[Result | Skipped] | None


class DecodePool:
    """`workers` processes, started when the first row comes; with 0 the calling thread does the work itself.

    `map` is called by one thread; `close` may come from another.
    """

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self._executor: ProcessPoolExecutor | None = None
        self._closed = False

    def map(
        self,
        work: Callable[..., Result | Skipped],
        rows: Iterable[Pair | Skipped],
        arguments: Callable[[Pair], tuple[Any, ...]] = lambda pair: (),
    ) -> Iterator[tuple[Pair | Skipped, Result | Skipped]]:
        """(row, work(pair, *arguments(pair))) for every row, in order, a bounded number ahead; a Skipped row is its own result.

        `work` is a function of a module. Raises DataError naming the pair over whose images a worker died twice, and InpoError
        if no worker can start.
        """
        if not self.workers:
            for row in rows:
                yield row, row if isinstance(row, Skipped) else work(row, *arguments(row))
            return
        waiting: deque[_Waiting[Result]] = deque()

        def first() -> tuple[Pair | Skipped, Result | Skipped]:
            head = waiting[0]
            while head.future is not None:
                try:
                    result = head.future.result()
                except BrokenProcessPool:
                    self._rescue(waiting, work, arguments)
                else:
                    waiting.popleft()
                    return head.row, result
            return waiting.popleft().row, cast(Skipped, head.row)

        for row in rows:
            future = None if isinstance(row, Skipped) else self._submit(work, row, arguments(row))
            waiting.append(_Waiting(row=row, future=future))
            if len(waiting) > _AHEAD_PER_WORKER * self.workers:
                yield first()
        while waiting:
            yield first()

    def close(self) -> None:
        """Let the workers end; work that has not begun is dropped, and a `map` under way fails."""
        self._closed = True
        self._dismiss()

    def _dismiss(self) -> None:
        executor, self._executor = self._executor, None
        if executor is not None:
            executor.shutdown(wait=False, cancel_futures=True)

    def _started(self) -> ProcessPoolExecutor:
        if self._closed:
            raise RuntimeError("the pool is closed")
        executor = self._executor
        if executor is None:
            context = multiprocessing.get_context(_METHOD)
            if _METHOD == "forkserver":
                context.set_forkserver_preload([__name__])
            executor = self._executor = ProcessPoolExecutor(self.workers, mp_context=context, initializer=_begin)
            try:
                executor.submit(os.getpid).result()
            except BrokenProcessPool as error:
                self._dismiss()
                raise InpoError(
                    "The processes that decode images cannot start.", where="--decode-workers", got=str(error),
                    fix="see the message above; a script that calls this needs `if __name__ == '__main__':`, or take "
                    "--decode-workers 0 to decode in the main process",
                ) from error
        return executor

    def _submit(self, work: Callable[..., Result], pair: Pair, arguments: tuple[Any, ...]) -> Future[Result]:
        try:
            return self._started().submit(work, pair, *arguments)
        except BrokenProcessPool as error:  # a worker died, and nobody has asked for its result yet
            failed: Future[Result] = Future()
            failed.set_exception(error)
            return failed

    def _rescue(
        self,
        waiting: Iterable[_Waiting[Result]],
        work: Callable[..., Result | Skipped],
        arguments: Callable[[Pair], tuple[Any, ...]],
    ) -> None:
        """A worker has died, and with it the pool: repeat what was waiting, one at a time, so that a culprit is known."""
        self._dismiss()
        for each in waiting:
            if isinstance(each.row, Skipped) or each.future is None or _succeeded(each.future):
                continue
            each.future = self._submit(work, each.row, arguments(each.row))
            if isinstance(each.future.exception(), BrokenProcessPool):
                self._dismiss()
                raise DataError(
                    "A process that decodes images died twice over the same pair.", where=f"pair {each.row.pair_id}",
                    expected="images, or bytes that are refused", got="the end of the process",
                    fix="if the machine ran out of memory, take fewer --decode-workers; if not, the images crash the "
                    "decoder: remove the pair from the source",
                )


def _succeeded(future: Future[Any]) -> bool:
    return future.done() and not isinstance(future.exception(), BrokenProcessPool)


def _begin() -> None:
    """In a worker: Ctrl-C is the main process's affair, and so is when to end, unless it was killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
