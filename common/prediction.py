"""Whether a network's weights predict what its configuration says they do.

The scheduler's configuration names the prediction type, the weights do not, and a wrong name gives finite latents and a
worthless cache. Where the last label leaves almost pure noise, a trained network that predicts noise gives its input
back, and one that predicts v or the sample gives something like a picture. A flow is asked at both ends and in the
middle, which tells a wrong sign and a time that is reversed or on another scale.
"""

import math
from collections.abc import Sequence
from functools import cache

import torch
from torch.nn.functional import cosine_similarity, interpolate

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


FLOW_PROBES = ("the last timestep", "the clean end", "the middle")
"""Where a flow is asked."""
_AGAINST = -0.4
"""At or below this cosine a flow's output is the opposite of what it should be."""
_LIKE = 0.4
"""From here on a flow's output shows that it is trained."""


def check_flow(likeness: Sequence[float], *, where: str) -> None:
    """Judge the cosines of `flow_likeness`, one for each of FLOW_PROBES.

    Raises ModelError if an output is not finite or against what a trained flow gives. Outputs that show nothing are
    noted: weights that are not trained give such.
    """
    told = ", ".join(f"{cosine:.2f} at {probe}" for probe, cosine in zip(FLOW_PROBES, likeness, strict=True))
    if not all(map(math.isfinite, likeness)):
        raise ModelError(
            "The network gives numbers that are not finite.",
            where=where,
            expected="finite weights",
            got="NaN or infinity from standard normal latents, in float32",
            fix="download or convert the model again",
        )
    if min(likeness) <= _AGAINST:
        raise ModelError(
            "The weights do not predict noise - x0 at the times that they are told.",
            where=where,
            expected="a network whose output is near the noise at time 1, and near minus the latent at time 0",
            got=f"cosines {told}",
            fix="the output has another sign, or time runs the other way or on another scale: not a model of the "
            "family that its pipeline names",
        )
    if min(likeness) < _LIKE:
        _note(f"{where} does not give noise - x0 (cosines {told}): it is untrained, or another model's weights")


@torch.no_grad()
def flow_likeness(denoiser: Denoiser, blank: Condition, shape: tuple[int, int, int]) -> list[float]:
    """Cosines between a flow's output and what a trained one gives, in one call: for noise at the last timestep the
    noise, for smooth latents at the clean end minus these, for their mixture in the middle the difference.

    A wrong sign and a reversed time together look right at both ends; the middle tells them. `blank` has two rows for
    each.
    """
    random, levels = torch.Generator().manual_seed(0), denoiser.levels
    noise = torch.randn(2, *shape, generator=random)
    smooth = interpolate(torch.randn(2, shape[0], 2, 2, generator=random), shape[1:], mode="bilinear")
    smooth = smooth / smooth.square().mean().sqrt()
    middle = int((levels.noise - 0.5).abs().argmin())
    a, s = levels.point(middle)
    points = ((levels.num_train_timesteps - 1, noise), (levels.clean, smooth), (middle, a * smooth + s * noise))
    output = denoiser.predict(
        torch.cat([x for _, x in points]), torch.tensor([number for number, _ in points for _ in range(2)]), blank
    )
    return [
        float(cosine_similarity(got.flatten(), expected.flatten(), dim=0))
        for got, expected in zip(output.split(2), (noise, -smooth, noise - smooth), strict=True)
    ]


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
    return float(cosine_similarity(output.flatten(), x.flatten(), dim=0))
