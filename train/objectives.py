"""Objectives as pure functions: tensors in, a small result out.

Notation (docs/equations.md): E = MSE(tau - eps(x_t, t, c)) per image; g = E_theta - E_ref, negative where the model
has become better than the reference; m = g_win - g_lose; u = -(beta / 2) * m, the DPO logit in the scaling of the
released codes. diffusers' script has no 1/2 there: its beta 2000 is 4000 here. Every function takes `error` and
`reference_error` as [batch, side] (side 0 is win), `label` as [batch] (P(win preferred)) and `beta`, and returns one
number per record; the trainer takes the mean.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from inpo.common.choices import Space
from inpo.train.settings import ObjectiveName, TrainSettings

SMPO_GAMMA = 10.0
SMPO_TEMPERATURE = 0.28201571 - 0.11543526
"""Of the released labels, in raw PickScore cosines: the range that SmPO's preprocessing divides them by."""
MAPO_WEIGHT = 0.1
MAPO_SLOPE = 0.5
KTO_WIN_WEIGHT = 1.0
KTO_LOSE_WEIGHT = 1.0


class ObjectiveResult(NamedTuple):
    """One number per record. All but `loss` are detached and describe the sides in the order that the label prefers."""

    loss: Float[Tensor, " batch"]
    margin: Float[Tensor, " batch"]
    """u = -(beta / 2) * m: above 0 the model tells win from lose better than the reference does."""
    implicit_accuracy: Float[Tensor, " batch"]
    """1 where u > 0, 0 where u < 0, 0.5 at u = 0 exactly."""
    win_advantage: Float[Tensor, " batch"]
    """E_ref - E_theta of the preferred side: above 0 it is denoised better than by the reference."""
    lose_advantage: Float[Tensor, " batch"]


Pairwise = Float[Tensor, "batch side"]
PerRecord = Float[Tensor, " batch"]


def inpo(error: Pairwise, reference_error: Pairwise, label: PerRecord, beta: float) -> ObjectiveResult:
    """DDIM-InPO: -log sigmoid(u) with tau of Eq. 18 (arXiv 2503.18454, loss of its released code: w constant)."""
    error, reference_error = _oriented(error, reference_error, label)
    u = logit(error, reference_error, beta)
    return _result(-F.logsigmoid(u), error, reference_error, beta)


def dpo(error: Pairwise, reference_error: Pairwise, label: PerRecord, beta: float) -> ObjectiveResult:
    """Diffusion-DPO (arXiv 2311.12908, Eq. 14): inpo's loss where x_t is x0 with noise and tau is that noise."""
    return inpo(error, reference_error, label, beta)


def ipo(error: Pairwise, reference_error: Pairwise, label: PerRecord, beta: float) -> ObjectiveResult:
    """IPO (arXiv 2310.12036, Eq. 17), as in the diffusers script: (-m - 1 / (2 beta))^2.

    Its gradient at the start is 1 / beta: at the script's 5000 it is a million times smaller than inpo's at 2000.
    """
    error, reference_error = _oriented(error, reference_error, label)
    m = margin_of_errors(error, reference_error)
    return _result((-m - 1 / (2 * beta)) ** 2, error, reference_error, beta)


def hinge(error: Pairwise, reference_error: Pairwise, label: PerRecord, beta: float) -> ObjectiveResult:
    """Hinge loss (SLiC, arXiv 2305.10425), as in the diffusers script: relu(1 + beta * m)."""
    error, reference_error = _oriented(error, reference_error, label)
    m = margin_of_errors(error, reference_error)
    return _result(F.relu(1 + beta * m), error, reference_error, beta)


def kto(
    error: Pairwise,
    reference_error: Pairwise,
    label: PerRecord,
    beta: float,
    mean: Callable[[Tensor], Tensor] = torch.mean,
) -> ObjectiveResult:
    """Diffusion-KTO (arXiv 2404.04465): per image w_y * (1 - sigmoid(y * beta * (-g - z0))), y = +1 win, -1 lose.

    z0 = max(0, `mean` of -g), detached. The trainer's mean is over the micro-batches of all processes, as in the
    released code, and not over those that are accumulated: the loss depends on how a step is split. A record's loss
    is the mean of its two images'.
    """
    error, reference_error = _oriented(error, reference_error, label)
    g = error - reference_error
    z0 = mean(-g).clamp(min=0).detach()
    sign = g.new_tensor([1.0, -1.0])
    weight = g.new_tensor([KTO_WIN_WEIGHT, KTO_LOSE_WEIGHT])
    per_image = weight * (1 - torch.sigmoid(sign * beta * (-g - z0)))
    return _result(per_image.mean(dim=1), error, reference_error, beta)


def sft(error: Pairwise, reference_error: Pairwise, label: PerRecord, beta: float) -> ObjectiveResult:
    """Supervised fine-tuning on the preferred side: E_theta(win). beta scales the reported margin only."""
    error, reference_error = _oriented(error, reference_error, label)
    return _result(error[:, 0], error, reference_error, beta)


def smpo(error: Pairwise, reference_error: Pairwise, label: PerRecord, beta: float) -> ObjectiveResult:
    """SmPO: -log sigmoid(gamma * (2p - 1) * u), p the soft label, gamma = 10. The label orients, nothing is swapped.

    The strength hangs together with the labels' temperature: `SMPO_TEMPERATURE` is the released code's.
    """
    u = logit(error, reference_error, beta)
    loss = -F.logsigmoid(SMPO_GAMMA * (2 * label - 1) * u)
    return _result(loss, *_oriented(error, reference_error, label), beta)


def mapo(error: Pairwise, reference_error: Pairwise, label: PerRecord, beta: float) -> ObjectiveResult:
    """MaPO (arXiv 2406.06424), no reference: E_win - 0.1 * log sigmoid(beta * (phi(E_win) - phi(E_lose))).

    phi(v) = 0.5 v / (exp(0.5 v) - 1), decreasing. The reported margin and advantages are against the reference.
    """
    error, reference_error = _oriented(error, reference_error, label)
    scaled = (MAPO_SLOPE * error).clamp(min=1e-12)
    phi = scaled / torch.expm1(scaled)
    ratio = -F.logsigmoid(beta * (phi[:, 0] - phi[:, 1]))
    return _result(error[:, 0] + MAPO_WEIGHT * ratio, error, reference_error, beta)


def inversion_dpo(error: Pairwise, reference_error: Pairwise, label: PerRecord, beta: float) -> ObjectiveResult:
    """A loss of our own, derived from Inversion-DPO's trajectory likelihood; it is not the released loss.

    -log sigmoid(-beta * w_t * [MSE(delta_prev - eps_theta) - MSE(delta_prev - eps_ref)]_{win - lose}), w_t = 1 / (2
    abar_t). Here both errors arrive as MSE(delta_prev - eps) / abar_t, which makes it inpo's formula. The released
    loss, from MSE(eps_theta - eps_ref), has no gradient at theta = ref; away from it the cosine of the two gradients
    was -0.10. Its logit is beta / (4 abar_t) times the difference, ours beta / (2 abar_t): beta 100 here has the scale
    of its 200 (it uses 2000).
    """
    return inpo(error, reference_error, label, beta)


def margin_of_errors(error: Pairwise, reference_error: Pairwise) -> PerRecord:
    """m = g_win - g_lose. The difference over sides is taken inside each model first: it cancels what both share."""
    return (error[:, 0] - error[:, 1]) - (reference_error[:, 0] - reference_error[:, 1])


def logit(error: Pairwise, reference_error: Pairwise, beta: float) -> PerRecord:
    """u = -(beta / 2) * m."""
    return -(beta / 2) * margin_of_errors(error, reference_error)


def _oriented(error: Pairwise, reference_error: Pairwise, label: PerRecord) -> tuple[Pairwise, Pairwise]:
    """The sides in the order that the label prefers: swapped where P(win preferred) is below 0.5."""
    swap = (label < 0.5)[:, None]
    return torch.where(swap, error.flip(1), error), torch.where(swap, reference_error.flip(1), reference_error)


def _result(loss: PerRecord, error: Pairwise, reference_error: Pairwise, beta: float) -> ObjectiveResult:
    error = error.detach()
    u = logit(error, reference_error, beta)
    advantage = reference_error - error
    return ObjectiveResult(loss, u, (torch.sign(u) + 1) / 2, advantage[:, 0], advantage[:, 1])


ObjectiveFunction = Callable[..., ObjectiveResult]
"""(error, reference_error, label, beta), and a mean where `needs_mean`."""


@dataclass(frozen=True, kw_only=True)
class Objective:
    """An objective and what it asks of a cache."""

    name: ObjectiveName
    function: ObjectiveFunction
    beta: float
    """Default beta, in the objective's own scaling."""
    beta_source: str
    """Whose default that is."""
    target: Literal["target", "delta_prev"] = "target"
    """What the prediction is compared with. delta_prev: both errors are divided by abar_t, and the reference's is
    computed from the stored eps_ref."""
    labels: Literal["hard", "soft"] = "hard"
    """hard: pairs with label 0.5 are dropped. soft: labels that are all 0 or 1 are refused."""
    noise_cache: bool = False
    """True: only on a cache with x_t = x0 plus noise."""
    needs_mean: bool = False
    """True: the function takes a mean over images as its fifth argument."""
    logistic: bool = False
    """True: the loss is -log sigmoid of a multiple of u, hence ln 2 at theta = reference."""

    @property
    def space(self) -> Space | None:
        """What the prediction is compared with is of; None: what the cache's targets are of. A delta is noise."""
        return None if self.target == "target" else "noise"

    @property
    def arrays(self) -> tuple[str, ...]:
        """The big arrays that a record needs."""
        return ("x_t", "target") if self.target == "target" else ("x_t", "delta_prev", "eps_ref")


OBJECTIVES: dict[ObjectiveName, Objective] = {
    objective.name: objective
    for objective in (
        Objective(name="inpo", function=inpo, beta=2000.0, beta_source="InPO, for SD1.5 (SDXL: 5000)", logistic=True),
        Objective(
            name="dpo",
            function=dpo,
            beta=2000.0,
            beta_source="ours: inpo's (released launchers: 5000)",
            noise_cache=True,
            logistic=True,
        ),
        Objective(name="ipo", function=ipo, beta=0.05, beta_source="ours (diffusers' example: 5000)"),
        Objective(name="hinge", function=hinge, beta=1000.0, beta_source="ours (diffusers' example: 5000)"),
        Objective(name="kto", function=kto, beta=1000.0, beta_source="Diffusion-KTO's script", needs_mean=True),
        Objective(name="sft", function=sft, beta=2000.0, beta_source="inpo's; scales the reported margin only"),
        Objective(
            name="smpo",
            function=smpo,
            beta=2000.0,
            beta_source="SmPO's launcher for SD1.5",
            labels="soft",
            logistic=True,
        ),
        Objective(name="mapo", function=mapo, beta=1000.0, beta_source="MaPO's code: the number of timesteps"),
        Objective(
            name="inversion_dpo",
            function=inversion_dpo,
            beta=100.0,
            beta_source="ours, as the loss is",
            target="delta_prev",
            logistic=True,
        ),
    )
}


def beta_of(settings: TrainSettings) -> float:
    """The run's beta: the one asked for, or the objective's own."""
    return OBJECTIVES[settings.objective].beta if settings.beta is None else settings.beta
