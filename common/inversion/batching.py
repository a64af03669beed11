"""Continuous batching: many pairs' trajectories through one network, each at its own point.

A trajectory that ends makes room for the next pair at once, so that early stopping never leaves the device idle and
the batch stays full until the last pairs of a shard.
"""

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from inpo.common.conditions import Condition
from inpo.common.denoiser import Denoiser
from inpo.common.inversion.inverters import Asked, Question, Request
from inpo.common.inversion.trajectory import Records

Start = Callable[[int], Generator[Asked, Tensor, Records]]


@dataclass(kw_only=True)
class _Running:
    pair: int
    generator: Generator[Asked, Tensor, Records]
    asked: Asked | None
    """What the trajectory waits for; None: it has ended."""


def run_trajectories(
    start: Start,
    num_pairs: int,
    denoiser: Denoiser,
    *,
    caption: Condition,
    empty: Condition | None,
    pairs_per_batch: int,
) -> list[Records]:
    """Run `start(pair)` for every pair, at most `pairs_per_batch` at a time; results in the pairs' order.

    `caption` and `empty` have one row per image (pair * side), on the denoiser's device.
    """
    results: list[Records | None] = [None] * num_pairs
    waiting = iter(range(num_pairs))
    running: list[_Running] = []
    while True:
        _admit(running, waiting, start, pairs_per_batch)
        if not running:
            break
        requests = [(each.pair, each.asked) for each in running if isinstance(each.asked, Request)]
        running = _advance(running, _evaluate(requests, denoiser, caption, empty), results)
    return [records for records in results if records is not None]


def _admit(running: list[_Running], waiting: Iterator[int], start: Start, limit: int) -> None:
    while len(running) < limit:
        pair = next(waiting, None)
        if pair is None:
            return
        generator = start(pair)
        running.append(_Running(pair=pair, generator=generator, asked=next(generator)))


def _advance(running: list[_Running], outputs: list[Tensor], results: list[Records | None]) -> list[_Running]:
    """Give every trajectory its output and let it run to its next request. Returns those that have not ended."""
    answered = list(zip(running, outputs, strict=True))
    while answered:
        for each, answer in answered:
            try:
                each.asked = each.generator.send(answer)
            except StopIteration as done:
                results[each.pair], each.asked = done.value, None
        asking = [(each, each.asked.value) for each, _ in answered if isinstance(each.asked, Question)]
        answers = torch.stack([value for _, value in asking]).cpu().unbind() if asking else ()
        answered = [(each, answer) for (each, _), answer in zip(asking, answers, strict=True)]
    return [each for each in running if each.asked is not None]


def _evaluate(
    requests: Sequence[tuple[int, Request]], denoiser: Denoiser, caption: Condition, empty: Condition | None
) -> list[Tensor]:
    """One network call for all requests: win and lose of every pair in one batch."""
    x = torch.cat([request.x for _, request in requests])
    device = x.device
    timestep = _upload([request.timestep for _, request in requests for _ in range(2)], device)
    rows = _upload([2 * pair + side for pair, _ in requests for side in range(2)], device)
    condition = caption.rows(rows)
    if any(request.empty for _, request in requests):
        assert empty is not None, "guidance other than 1 needs the empty prompt"
        is_empty = _upload([request.empty for _, request in requests for _ in range(2)], device)
        condition = empty.rows(rows).where(is_empty, condition)
    return list(denoiser.predict(x, timestep, condition).split(2))


def _upload(values: Sequence[int], device: torch.device) -> Tensor:
    """Integers or truth values as a tensor, without waiting for what the device still has to do."""
    tensor = torch.tensor(values)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
