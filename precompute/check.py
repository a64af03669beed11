"""Read and decode every pair of a source, without a model, and count what is there."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

from common.pairs.images import ImageError, decode_image
from common.pairs.pair import InputShard, Pair, Skipped, SkipReason
from common.pairs.walk import Walk


@dataclass(kw_only=True)
class CheckReport:
    """What one pass over a source found."""

    location: str
    kind: str
    num_input_shards: int = 0
    num_rows: int = 0
    num_pairs: int = 0
    """Rows that give a pair whose two images decode."""
    num_soft_labels: int = 0
    """Pairs with a label below 1."""
    num_empty_prompts: int = 0
    smallest_side: int | None = None
    """Shortest image side among the pairs, in pixels: enlarging starts below the training resolution."""
    largest_side: int | None = None
    skipped: dict[SkipReason, int] = field(default_factory=dict)
    unreadable: dict[str, str] = field(default_factory=dict)
    """Error text by input shard name."""


def check_source(
    walk: Walk,
    shards: list[tuple[InputShard, int]],
    *,
    on_row: Callable[[str, Pair | Skipped], None] = lambda name, item: None,
    num_threads: int | None = None,
) -> CheckReport:
    """Read and decode the rows of these shards, which `walk` has counted. `on_row` gets every row in order.

    An image that does not decode turns its pair into a Skipped. Memory: a few pairs for each thread, and the ids.
    """
    report = CheckReport(location=walk.source.location, kind=walk.source.kind)
    report.num_input_shards = len(shards) + len(walk.unreadable)
    for name, item, sides in _decoded(walk.rows(shards), num_threads or os.cpu_count() or 1):
        report.num_rows += 1
        if isinstance(item, Skipped):
            report.skipped[item.reason] = report.skipped.get(item.reason, 0) + 1
        else:
            report.num_pairs += 1
            report.num_soft_labels += item.label < 1.0
            report.num_empty_prompts += not item.prompt
            report.smallest_side = min(sides + ([report.smallest_side] if report.smallest_side else []))
            report.largest_side = max(sides + ([report.largest_side] if report.largest_side else []))
        on_row(name, item)
    report.unreadable = {name: str(error) for name, error in walk.unreadable.items()}
    return report


_Decoded = tuple[str, Pair | Skipped, list[int]]


def _decoded(rows: Iterable[tuple[str, Pair | Skipped]], num_threads: int) -> Iterator[_Decoded]:
    """Rows in order, decoded by threads (Pillow's decoders release the lock), a bounded number ahead."""
    waiting: deque[Future[_Decoded]] = deque()
    with ThreadPoolExecutor(num_threads) as pool:
        for name, item in rows:
            waiting.append(pool.submit(_decode, name, item))
            if len(waiting) > 2 * num_threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _decode(name: str, item: Pair | Skipped) -> _Decoded:
    if isinstance(item, Skipped):
        return name, item, []
    sides: list[int] = []
    for side, data in (("win", item.win), ("lose", item.lose)):
        try:
            sides.extend(decode_image(data).size)
        except ImageError as error:
            detail = f"{side}: {error.detail}"
            return name, Skipped(pair_id=item.pair_id, reason=error.reason, detail=detail, row=item.row), []
    return name, item, sides
