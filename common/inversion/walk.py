"""What one walk asks for, call by call: from the clean latents of images that walk together to their last record.

A walk knows levels and coefficients and no tensor, so that a batch can mix images that stand at different points and
compute them all at once (batch.py).
"""

from collections.abc import Generator

from inpo.common.cache.schema import InverterIdentity
from inpo.common.inversion.inverters import (
    INVERTERS,
    Call,
    Move,
    Use,
    iteration,
    midway,
    most_iterations,
    takes_half_steps,
)
from inpo.common.inversion.path import Path
from inpo.common.levels import Levels

Calls = Generator[Call, bool, None]
"""To be sent, after every Call, whether the iteration has settled: all that a walk must know of the numbers."""


def walk(path: Path, identity: InverterIdentity, levels: Levels, *, back: bool) -> Calls:
    """The calls along `path`, and `back` down the same points by deterministic DDIM, to measure the round trip.

    E_ref is always the loss's: the prediction under the training caption without guidance. Where that is also what
    inverts (guidance 1), or a part of it (any but 0), it costs no call; under the empty prompt one more per record.
    """
    guidance = identity.guidance

    def evaluate(call: Call) -> Generator[Call, bool, bool]:
        """One evaluation of the inverting model. Returns the answer to its last call."""
        if guidance in (0.0, 1.0):
            return (yield call._replace(empty=guidance == 0.0))
        yield call._replace(use=Use.HALF, record=-1)
        return (yield call._replace(move=Move.STAY, store=False, empty=True))

    def at(level: int) -> Call:
        a, s = levels.point(level)
        return Call(timestep=level, a=a, s=s)

    number, halves = 0, takes_half_steps(identity)
    behind: list[Call] = []
    if path.starts_clean:
        clean_end = Call(timestep=levels.clean, a=1.0, s=0.0, move=Move.START)
        yield from evaluate(clean_end)
        behind = [clean_end]
    for index, point in enumerate(path.points):
        here = at(point.level)
        if not point.noised:
            call = INVERTERS[identity.name](here, behind, levels.floor)
            if halves:
                yield from evaluate(midway(here, behind[-1], levels))
            for _ in range(most_iterations(identity)):
                settled = yield from evaluate(iteration(call, behind[-1]))
                call = here
                if settled:
                    break
        elif point.records or not path.points[index + 1].noised:
            call = here._replace(move=Move.START)
        else:
            continue  # an unkept noised point matters only if the inversion goes on from it
        # Noised points lie on no common trajectory: a second-order step must not extrapolate from one to the next.
        behind = [here] if point.noised else [*behind[-1:], here]
        if halves and not (point.noised or point.records):
            continue
        if not point.records:
            yield from evaluate(call)
        elif guidance == 0.0:
            yield from evaluate(call._replace(store=True))
            yield here._replace(use=Use.REFERENCE, record=number)
        else:
            yield from evaluate(call._replace(store=True, record=number))
        number += len(point.records)
    for point in reversed(path.points[:-1]) if back else ():
        yield from evaluate(at(point.level)._replace(move=Move.DDIM))
