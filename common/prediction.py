"""Whether a network's weights predict what its configuration says they do.

The scheduler's configuration names the prediction type, the weights do not, and a wrong name gives finite latents and a
worthless cache. Where the last label leaves almost pure noise, a trained network that predicts noise gives its input
back, and one that predicts v or the sample gives something like a picture. A flow is asked at both ends and in the
middle of its own path, which tells a wrong sign and a time that is reversed or on another scale.
"""

import math
import operator
from collections.abc import Callable, Sequence
from functools import cache
from itertools import pairwise, product
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from inpo.common.conditions import Condition
from inpo.common.denoiser import Denoiser
from inpo.common.errors import ModelError
from inpo.common.levels import Levels
from inpo.common.log import note

_ALIKE = 0.9
"""With eps = (x - a x0) / s and a = 0.07, as in Stable Diffusion, even latents twice as strong as the noise leave a
cosine of 0.99.
"""
_LARGEST_A = 0.1
"""At a larger a_T, v = (a x - x0) / s is itself like x, and nothing can be told."""


def check_prediction(
    likeness: float, levels: Levels, configured: str, *, where: str, scheduler_file: str, guessed_from: str | None
) -> None:
    """Compare `noise_likeness` with the configured prediction type; says nothing of schedules that keep more than a
    tenth of the image at the last label.

    Raises ModelError if the output is not finite, if it is the noise that went in although v or the sample is
    configured, or if it is not although noise is configured by `guessed_from`, a hub model that the file merely looks
    like. Where the user has named the configuration, the latter is a note: weights that are not trained look the same.
    """
    if math.isnan(likeness):
        raise ModelError(
            "The network gives numbers that are not finite.",
            where=where,
            expected="finite weights",
            got="NaN or infinity from standard normal latents, in float32",
            fix="download or convert the model again",
        )
    if levels.signal[-1] > _LARGEST_A:
        return
    got = f"a cosine of {likeness:.2f} between the two"
    if configured != "epsilon" and likeness > _ALIKE:
        if guessed_from is None:
            fix = f"set prediction_type to epsilon in {scheduler_file}, if that is what the model was trained for"
        else:
            got += f"; configured as {guessed_from}, which its weights look like"
            fix = (
                "--model-config DIR, a pipeline folder whose scheduler has prediction_type epsilon, "
                "as that of Stable Diffusion 2 base"
            )
        raise ModelError(
            f"The configuration says {configured}, and the weights predict noise.",
            where=where,
            expected="at the last timestep, an output unlike the noisy input",
            got=got,
            fix=fix,
        )
    if configured == "epsilon" and likeness <= _ALIKE:
        if guessed_from is not None:
            raise ModelError(
                "The configuration says epsilon, and the weights do not predict noise.",
                where=where,
                expected="at the last timestep, the noisy input given back",
                got=f"{got}; configured as {guessed_from}, which its weights look like",
                fix="--model-config DIR, a pipeline folder whose scheduler has the prediction_type that the "
                "model was trained for, "
                "probably v_prediction; if that is noise all the same, the configuration of the model named above",
            )
        _note(
            f"{where} is configured to predict noise, but does not give noise back at the last timestep (cosine "
            f"{likeness:.2f}): it is untrained, or prediction_type in {scheduler_file} is wrong"
        )


FLOW_PROBES = ("the noise at time 1", "minus the latent at the clean end", "the difference in the middle")
"""What a trained flow gives."""
_STEPS = 4
"""Of the path from noise to latents that the network knows: of others it may give anything."""
_TRAINED = (0.5, 0.4, 0.5)
"""From these cosines on the calls are right. The toy world's flow has 0.93, 0.77 and 0.82; with its time times 1000,
the likest of the wrong calls, 0.91, 0.20 and 0.76.
"""
_SHOWS = 0.3
"""Below it, either way, the noise has left no trace in the output: the weights are not trained."""
_SCALE = "time is told on another scale"
_SIGNS = (("", 1.0), ("the output has the other sign", -1.0))
_TIMES: tuple[tuple[str, Callable[[Tensor, Tensor, Tensor], Tensor]], ...] = (
    ("", lambda label, low, high: label),
    ("time runs the other way", lambda label, low, high: low + high - label),
    (_SCALE, lambda label, low, high: 1000 * label),
    (_SCALE, lambda label, low, high: label / 1000),
)


def check_flow(
    denoiser: Denoiser, blank: Callable[[int], Condition], shape: tuple[int, int, int], *, where: str
) -> None:
    """Whether a flow's network, called as its family does, gives what a trained one gives: `flow_likeness`.

    Raises ModelError if an output is not finite; or if it is not so, and would be with the other sign, the time
    reversed or on another scale; or if at time 1, where there is nothing but noise, the noise comes back negated.
    Anything else is noted: weights that are not trained are like that. `blank` gives a condition of so many rows.
    """
    likeness = flow_likeness(denoiser, blank, shape)
    told = ", ".join(f"{cosine:.2f} of {probe}" for probe, cosine in zip(FLOW_PROBES, likeness, strict=False))
    if not all(map(math.isfinite, likeness)):
        raise ModelError(
            "The network gives numbers that are not finite.",
            where=where,
            expected="finite weights",
            got="NaN or infinity from standard normal latents, in float32",
            fix="download or convert the model again",
        )
    if _is_trained(likeness):
        return
    mistake = _mistake(denoiser, blank, shape) if abs(likeness[0]) >= _SHOWS else None
    if mistake is not None or likeness[0] <= -_SHOWS:
        raise ModelError(
            "The weights do not predict noise - x0 at the times that they are told.",
            where=where,
            expected=f"a network that gives {', '.join(FLOW_PROBES)}",
            got=f"cosines of {told}",
            fix=f"{mistake or 'the output has another sign, or time runs the other way or on another scale'}: not a "
            "model of the family that its pipeline names",
        )
    _note(f"{where} does not give noise - x0 (cosines of {told}): it is untrained, or another model's weights")


def _is_trained(likeness: Sequence[float]) -> bool:
    return len(likeness) == len(_TRAINED) and all(map(operator.ge, likeness, _TRAINED))


def _mistake(denoiser: Denoiser, blank: Callable[[int], Condition], shape: tuple[int, int, int]) -> str | None:
    """How the network would have to be called to be a trained one, in words; None: in no way that is known."""
    labels = denoiser.levels.walked[2]
    low, high = labels.min().float(), labels.max().float()
    for (sign_words, sign), (time_words, time) in product(_SIGNS, _TIMES):

        def call(
            network: nn.Module, x: Tensor, label: Tensor, told: Condition, sign: float = sign, time: Any = time
        ) -> Tensor:
            return sign * denoiser.call(network, x, time(label, low, high), told)

        other = Denoiser(
            denoiser.network, denoiser.levels, call, denoiser.prediction, network_dtype=denoiser.network_dtype
        )
        if (sign_words or time_words) and _is_trained(flow_likeness(other, blank, shape)):
            return " and ".join(filter(None, (sign_words, time_words)))
    return None


@torch.no_grad()
def flow_likeness(denoiser: Denoiser, blank: Callable[[int], Condition], shape: tuple[int, int, int]) -> list[float]:
    """Cosines between a flow's output and what a trained one gives: for noise at time 1 the noise, for latents at the
    clean end minus these, for their mixture with fresh noise in the middle the difference.

    The latents are the network's own, in a few steps from the noise: a trained network knows them, and what it gives
    for others is anybody's guess (the toy world's gives random smooth ones back with the wrong sign). Where the noise
    leaves no trace in the output there are no latents, and its cosine is the only one.
    """
    random, levels = torch.Generator().manual_seed(0), denoiser.levels
    noise, fresh = torch.randn(2, 2, *shape, generator=random)
    two = blank(2)

    def at(x: Tensor, number: int) -> Tensor:
        return denoiser.predict(x, torch.tensor([number, number]), two)

    numbers = [levels.noisy]
    numbers += [int((levels.noise - step / _STEPS).abs().argmin()) for step in range(_STEPS - 1, 0, -1)]
    times = [levels.point(number)[1] for number in (*numbers, levels.clean)]
    x = noise
    found: list[float] = []
    for number, (here, there) in zip(numbers, pairwise(times), strict=True):
        output = at(x, number)
        if not found:
            found.append(_cosine(output, noise))
            if not abs(found[0]) >= _SHOWS:
                return found
        x = x + (there - here) * output
    middle = int((levels.noise - 0.5).abs().argmin())
    a, s = levels.point(middle)
    return [*found, _cosine(at(x, levels.clean), -x), _cosine(at(a * x + s * fresh, middle), fresh - x)]


def _cosine(one: Tensor, other: Tensor) -> float:
    return float(cosine_similarity(one.flatten(), other.flatten(), dim=0))


@cache
def _note(text: str) -> None:
    """Once in a run, however often the network is loaded."""
    note(text)


@torch.no_grad()
def noise_likeness(denoiser: Denoiser, blank: Condition, shape: tuple[int, int, int]) -> float:
    """The cosine between standard normal latents of this shape and the network's own output for them at the last label,
    under a `blank` condition of one row per latent.
    """
    x = torch.randn(len(next(iter(blank.values()))), *shape, generator=torch.Generator().manual_seed(0))
    last = torch.full((len(x),), denoiser.levels.num_train_timesteps - 1)
    output = denoiser.predict(x, last, blank)
    return _cosine(output, x)
