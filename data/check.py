"""Read and decode every pair of a source, without a model, and count what is there."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from inpo.common.pairs.decode import DecodePool, measure_pair
from inpo.common.pairs.pair import InputShard, Pair, Skipped, SkipReason
from inpo.common.pairs.walk import Reasons, Walk, count_not_read
from inpo.common.printable import shown


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
    not_read: dict[str, int] = field(default_factory=dict)
    """Files, members, columns and fields that no pair is made of, and how often they are there."""
    unreadable: dict[str, str] = field(default_factory=dict)
    """Error text by input shard name."""
    no_pair: list[str] = field(default_factory=list)
    """Where there is no pair: the most frequent reasons, an example of each, and the fields that were found."""


def check_source(
    walk: Walk,
    shards: list[tuple[InputShard, int]],
    *,
    on_row: Callable[[str, Pair | Skipped], None] = lambda name, item: None,
    workers: int = 0,
) -> CheckReport:
    """Read and decode the rows of these shards, which `walk` has counted. `on_row` gets every row in order.

    An image that does not decode turns its pair into a Skipped. Memory: a few pairs for each worker process, and the
    ids.
    """
    report = CheckReport(location=shown(walk.source.location), kind=walk.source.kind)
    report.num_input_shards = len(shards) + len(walk.unreadable)
    report.not_read = count_not_read(walk.source, [shard for shard, _ in shards])
    pool, reasons = DecodePool(workers), Reasons()
    try:
        for name, item, sides in _decoded(walk.rows(shards), pool):
            report.num_rows += 1
            if isinstance(item, Skipped):
                report.skipped[item.reason] = report.skipped.get(item.reason, 0) + 1
                reasons.add(item.reason, item.pair_id, item.detail)
            else:
                report.num_pairs += 1
                report.num_soft_labels += item.label < 1.0
                report.num_empty_prompts += not item.prompt
                report.smallest_side = min(sides + ([report.smallest_side] if report.smallest_side else []))
                report.largest_side = max(sides + ([report.largest_side] if report.largest_side else []))
            on_row(name, item)
    finally:
        pool.close()
    if not report.num_pairs:
        report.no_pair = reasons.lines(shard for shard, _ in shards)
    report.unreadable = {name: str(error) for name, error in walk.unreadable.items()}
    return report


def _decoded(
    rows: Iterable[tuple[str, Pair | Skipped]], pool: DecodePool
) -> Iterator[tuple[str, Pair | Skipped, list[int]]]:
    """Rows in order, with the sizes of their images; a pair with a bad image has become a Skipped."""
    names: deque[str] = deque()

    def items() -> Iterator[Pair | Skipped]:
        for name, item in rows:
            names.append(name)
            yield item

    for item, found in pool.map(measure_pair, items(), on_crash=_crashed):
        if isinstance(found, Skipped):
            yield names.popleft(), found, []
        else:
            yield names.popleft(), item, found


def _crashed(pair: Pair) -> Skipped:
    return Skipped(
        pair_id=pair.pair_id,
        reason="unreadable",
        detail="two processes died over its images, one after the other",
        row=pair.row,
    )
