"""Continuous batching: many trajectories through one network, each at its own point.

A trajectory that ends makes room for the next one at once, so that early stopping never leaves the device idle and the
batch stays full until the last images of a shard.
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
    number: int
    images: range
    generator: Generator[Asked, Tensor, Records]
    asked: Asked | None
    """What the trajectory waits for; None: it has ended."""


def run_trajectories(
    start: Start,
    parts: Sequence[range],
    denoiser: Denoiser,
    *,
    caption: Condition,
    empty: Condition | None,
    images_per_batch: int,
) -> list[Records]:
    """Run `start(number)` for every part (rows of images), at most `images_per_batch` images at a time, one part at
    least; results in the parts' order.

    `caption` and `empty` have one row per image, on the denoiser's device.
    """
    results: list[Records | None] = [None] * len(parts)
    waiting = iter(range(len(parts)))
    running: list[_Running] = []
    while True:
        _admit(running, waiting, start, parts, images_per_batch)
        if not running:
            break
        requests = [(each.images, each.asked) for each in running if isinstance(each.asked, Request)]
        running = _advance(running, _evaluate(requests, denoiser, caption, empty), results)
    return [records for records in results if records is not None]


def _admit(running: list[_Running], waiting: Iterator[int], start: Start, parts: Sequence[range], limit: int) -> None:
    longest = max(map(len, parts), default=0)
    while not running or sum(len(each.images) for each in running) + longest <= limit:
        number = next(waiting, None)
        if number is None:
            return
        generator = start(number)
        running.append(_Running(number=number, images=parts[number], generator=generator, asked=next(generator)))


def _advance(running: list[_Running], outputs: list[Tensor], results: list[Records | None]) -> list[_Running]:
    """Give every trajectory its output and let it run to its next request. Returns those that have not ended."""
    answered = list(zip(running, outputs, strict=True))
    while answered:
        for each, answer in answered:
            try:
                each.asked = each.generator.send(answer)
            except StopIteration as done:
                results[each.number], each.asked = done.value, None
        asking = [(each, each.asked.value) for each, _ in answered if isinstance(each.asked, Question)]
        answers = torch.stack([value for _, value in asking]).cpu().unbind() if asking else ()
        answered = [(each, answer) for (each, _), answer in zip(asking, answers, strict=True)]
    return [each for each in running if each.asked is not None]


def _evaluate(
    requests: Sequence[tuple[range, Request]], denoiser: Denoiser, caption: Condition, empty: Condition | None
) -> list[Tensor]:
    """One network call for all requests."""
    x = torch.cat([request.x for _, request in requests])
    device = x.device
    timestep = _upload([request.timestep for images, request in requests for _ in images], device)
    rows = _upload([image for images, _ in requests for image in images], device)
    condition = caption.rows(rows)
    if any(request.empty for _, request in requests):
        assert empty is not None, "guidance other than 1 needs the empty prompt"
        is_empty = _upload([request.empty for images, request in requests for _ in images], device)
        condition = empty.rows(rows).where(is_empty, condition)
    return list(denoiser.predict(x, timestep, condition).split([len(images) for images, _ in requests]))


def _upload(values: Sequence[int], device: torch.device) -> Tensor:
    """Integers or truth values as a tensor, without waiting for what the device still has to do."""
    tensor = torch.tensor(values)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
