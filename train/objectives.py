"""The objectives by name: each one's loss (train/losses.py), its own numbers, and what it asks of a cache."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from inpo.common.choices import Space
from inpo.common.errors import UsageError
from inpo.train.losses import (
    Lists,
    Placed,
    Strength,
    bdpo,
    capo,
    dmpo,
    hinge,
    implicit_rewards,
    inpo,
    ipo,
    kto,
    lair,
    linear,
    listwise,
    logit,
    mapo,
    oriented,
    poly,
    sft,
    smpo,
)
from inpo.train.settings import ObjectiveName, TrainSettings


class ObjectiveResult(NamedTuple):
    """One number per record. All but `loss` are detached and describe the sides in the order that the label prefers;
    of a list, the mean over its preferences."""

    loss: Float[Tensor, " batch"]
    at_reference: Float[Tensor, " batch"]
    """What the loss would be at theta = reference."""
    margin: Float[Tensor, " batch"]
    """u = -(beta / 2) * m: above 0 the model tells win from lose better than the reference does."""
    implicit_accuracy: Float[Tensor, " batch"]
    """1 where u > 0, 0 where u < 0, 0.5 at u = 0 exactly, NaN where u is NaN."""
    win_advantage: Float[Tensor, " batch"]
    """E_ref - E_theta of the preferred side: above 0 it is denoised better than by the reference."""
    lose_advantage: Float[Tensor, " batch"]


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """An objective's own number beside beta."""

    name: str
    default: float
    source: str
    """Whose default that is."""
    low: float
    high: float
    """What it lies between."""


@dataclass(frozen=True, kw_only=True)
class Objective:
    """An objective and what it asks of a cache."""

    name: ObjectiveName
    loss: Callable[..., Float[Tensor, " batch"]]
    """(error, reference_error, label or lists, strength)."""
    beta: float
    """Default beta, in the objective's own scaling."""
    beta_source: str
    """Whose default that is."""
    parameter: Parameter | None = None
    target: Literal["target", "delta_prev"] = "target"
    """What the prediction is compared with. delta_prev: both errors are divided by abar_t, and the reference's is
    computed from the stored eps_ref."""
    labels: Literal["hard", "soft", "rates"] = "hard"
    """hard: labels of 0.5 are dropped. soft, rates: labels that are all 0 or 1 are refused; rates: those of a group
    with scores are made of its images' win rates."""
    lists: bool = False
    """True: a record is a group's images, not a pair."""
    scores: bool = False
    """True: every image needs a score."""
    pairwise: bool = True
    """False: the lose side has no gradient of its own that could be held against the win's."""
    noise_cache: bool = False
    """True: only on a cache with x_t = x0 plus noise."""
    reverses_dropped: bool = False
    """True: where the caption was dropped the label is reversed, so that some captions must have been."""

    @property
    def space(self) -> Space | None:
        """What the prediction is compared with is of; None: what the cache's targets are of. A delta is noise."""
        return None if self.target == "target" else "noise"

    @property
    def arrays(self) -> tuple[str, ...]:
        """The big arrays that a record needs."""
        return ("x_t", "target") if self.target == "target" else ("x_t", "delta_prev", "eps_ref")

    def function(
        self,
        error: Placed,
        reference_error: Placed,
        label: Float[Tensor, " batch"] | Lists,
        beta: float,
        mean: Callable[[Tensor], Tensor] = torch.mean,
        *,
        parameter: float | None = None,
        num_values: int = 1,
    ) -> ObjectiveResult:
        """The loss and what is reported beside it.

        Args:
            label: P(win preferred), or of a list objective what is known of each list.
            mean: over images, where the loss asks for one; the trainer's is over all processes.
            parameter: the objective's own number; None: its default.
            num_values: C * H * W.
        """
        if parameter is None and self.parameter is not None:
            parameter = self.parameter.default
        number = math.nan if parameter is None else parameter
        strength = Strength(beta=beta, parameter=number, num_values=num_values, mean=mean)
        loss = self.loss(error, reference_error, label, strength)
        detached = error.detach()
        with torch.no_grad():
            # Every mean of g is 0 there: no process has to ask the others.
            start = self.loss(reference_error, reference_error, label, replace(strength, mean=torch.mean))
            if isinstance(label, Lists):
                return ObjectiveResult(loss, start, *_of_lists(detached, reference_error, label, beta))
            return ObjectiveResult(loss, start, *_of_pairs(*oriented(detached, reference_error, label), beta))


def _of_pairs(error: Placed, reference_error: Placed, beta: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Margin, implicit accuracy and both advantages, the sides in the order that the label prefers."""
    u, advantage = logit(error, reference_error, beta), reference_error - error
    return u, _told_right(u), advantage[:, 0], advantage[:, 1]


def _of_lists(error: Placed, reference_error: Placed, lists: Lists, beta: float) -> tuple[Tensor, ...]:
    """The same over every two images of which one is preferred. A list without such has margin 0 and accuracy 0.5."""
    above, count = lists.above, lists.above.sum(dim=(1, 2))
    reward, advantage = implicit_rewards(error, reference_error, beta), reference_error - error
    u = reward[:, :, None] - reward[:, None, :]

    def over(values: Tensor) -> Tensor:
        return torch.where(above, values, 0.0).sum(dim=(1, 2)) / count.clamp(min=1)

    accuracy = torch.where(count > 0, over(_told_right(u)), 0.5)
    return over(u), accuracy, over(advantage[:, :, None]), over(advantage[:, None, :])


def _told_right(u: Tensor) -> Tensor:
    """The implicit accuracy of each u; NaN of NaN, whose sign torch calls 0."""
    return torch.where(u.isnan(), u, (torch.sign(u) + 1) / 2)


_BOUND = Parameter(
    name="lambda", default=0.9, source="Diff-SNPO's paper, as read by others; ours as to the scale", low=1e-6, high=1.0
)
_ALPHA = "its paper, for Pick-a-Pic (0 on clean pairs, below 0 on too easy ones)"

OBJECTIVES: dict[ObjectiveName, Objective] = {
    objective.name: objective
    for objective in (
        Objective(name="inpo", loss=inpo, beta=2000.0, beta_source="InPO, for SD1.5 (SDXL: 5000)"),
        Objective(
            name="dpo", loss=inpo, beta=2000.0, beta_source="ours: inpo's (released launchers: 5000)", noise_cache=True
        ),
        Objective(name="ipo", loss=ipo, beta=0.05, beta_source="ours (diffusers' example: 5000)"),
        Objective(name="hinge", loss=hinge, beta=1000.0, beta_source="ours (diffusers' example: 5000)"),
        Objective(
            name="kto",
            loss=kto,
            beta=1000.0,
            beta_source="Diffusion-KTO's script",
            parameter=Parameter(
                name="share of wins", default=0.5, source="its script (its launcher: 0.8)", low=0.0, high=1.0
            ),
            pairwise=False,
        ),
        Objective(
            name="sft", loss=sft, beta=2000.0, beta_source="inpo's; scales the reported margin only", pairwise=False
        ),
        Objective(
            name="smpo",
            loss=smpo,
            beta=2000.0,
            beta_source="SmPO's launcher for SD1.5",
            parameter=Parameter(name="gamma", default=10.0, source="its code", low=0.0, high=1e6),
            labels="soft",
        ),
        Objective(
            name="mapo",
            loss=mapo,
            beta=1000.0,
            beta_source="MaPO's code: the number of timesteps",
            parameter=Parameter(name="weight", default=0.1, source="its code", low=0.0, high=1e6),
        ),
        # A loss of our own, derived from Inversion-DPO's trajectory likelihood; it is not the released one. With w_t
        # = 1 / (2 abar_t): -log sigmoid(-beta w_t [MSE(delta_prev - eps_theta) - MSE(delta_prev - eps_ref)]_{win -
        # lose}). Both errors arrive as MSE(delta_prev - eps) / abar_t, which makes it inpo's formula. The released
        # loss, from MSE(eps_theta - eps_ref), has no gradient at theta = ref; away from it the cosine of the two
        # gradients was -0.10. Its logit is beta / (4 abar_t) times the difference, ours beta / (2 abar_t): beta 100
        # here has the scale of its 200 (it uses 2000).
        Objective(name="inversion_dpo", loss=inpo, beta=100.0, beta_source="ours, as the loss is", target="delta_prev"),
        Objective(
            name="poly",
            loss=poly,
            beta=2000.0,
            beta_source="ours: inpo's",
            parameter=Parameter(name="alpha", default=8.0, source=_ALPHA, low=-1.0, high=1e3),
        ),
        Objective(name="bdpo", loss=bdpo, beta=2000.0, beta_source="ours: inpo's", parameter=_BOUND),
        Objective(
            name="snpo", loss=bdpo, beta=2000.0, beta_source="ours: inpo's", parameter=_BOUND, reverses_dropped=True
        ),
        Objective(
            name="linear",
            loss=linear,
            beta=100.0,
            beta_source="Linear-DPO's script for SD1.5 (SDXL: 500)",
            parameter=Parameter(name="eta", default=1e-3, source="its script for SD1.5 (SDXL: 0)", low=0.0, high=0.5),
        ),
        Objective(name="capo", loss=capo, beta=2000.0, beta_source="ours: inpo's", labels="rates"),
        Objective(
            name="dmpo",
            loss=dmpo,
            beta=2000.0,
            beta_source="Diffusion-SDPO's script for SD1.5 (SDXL: 6000)",
            parameter=Parameter(name="alpha", default=0.01, source="the same script", low=1e-6, high=0.5),
        ),
        Objective(name="listwise", loss=listwise, beta=2000.0, beta_source="ours: inpo's", lists=True, pairwise=False),
        Objective(
            name="lair",
            loss=lair,
            beta=2000.0,
            beta_source="ours: inpo's",
            parameter=Parameter(name="lambda", default=0.5, source="ours", low=0.0, high=1e6),
            lists=True,
            scores=True,
            pairwise=False,
        ),
    )
}


def beta_of(settings: TrainSettings) -> float:
    """The run's beta: the one asked for, or the objective's own."""
    return OBJECTIVES[settings.objective].beta if settings.beta is None else settings.beta


def parameter_of(settings: TrainSettings) -> float | None:
    """The objective's own number: the one asked for, or its default; None if it has none.

    Raises UsageError for one that the objective does not have, or that lies outside its range.
    """
    known, asked = OBJECTIVES[settings.objective].parameter, settings.parameter
    if asked is None:
        return None if known is None else known.default
    if known is None or not known.low <= asked <= known.high:
        having = ", ".join(each.name for each in OBJECTIVES.values() if each.parameter)
        raise UsageError(
            f"Objective {settings.objective} has no number of its own beside beta."
            if known is None
            else f"The {known.name} of objective {settings.objective} lies outside its range.",
            where="--parameter",
            expected=f"none; these have one: {having}" if known is None else f"{known.low:g} to {known.high:g}",
            got=f"{asked:g}",
            fix="leave it out, or choose another --objective" if known is None else f"the default is {known.default:g}",
        )
    return asked


def strength_of(settings: TrainSettings) -> str:
    """Beta, the objective's own number, and what else changes the loss, in words."""
    words, known = [f"beta {beta_of(settings):g}"], OBJECTIVES[settings.objective].parameter
    if known is not None:
        words.append(f"{known.name} {parameter_of(settings):g}")
    if settings.sdpo is not None:
        words.append(f"sdpo mu {settings.sdpo:g}")
    if settings.swap_labels:
        words.append("labels swapped")
    return ", ".join(words)
