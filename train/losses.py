"""Losses as pure functions: errors of images in, one number per record out; the trainer takes the mean.

Notation (docs/equations.md): E = MSE(tau - eps(x_t, t, c)) per image; g = E_theta - E_ref, negative where the model
has become better than the reference; m = g_win - g_lose; u = -(beta / 2) * m, the DPO logit in the scaling of the
released codes. diffusers' script has no 1/2 there: its beta 2000 is 4000 here. l = -(beta / 2) g is an image's part of
it. `error` and `reference_error` are [batch, side] (side 0 is win) and `label` is [batch], P(win preferred): below 0.5
all but capo and smpo swap the sides. The losses of lists (`listwise`, `lair`) take [batch, place] and `Lists`.

`Strength.parameter` is a loss's own number beside beta; train/objectives.py has its default, meaning and source.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

MAPO_SLOPE = 0.5
LINEAR_SLOPE = 0.2

Pairwise = Float[Tensor, "batch side"]
PerRecord = Float[Tensor, " batch"]
Placed = Float[Tensor, "batch place"]


@dataclass(frozen=True, kw_only=True)
class Strength:
    """What stands in a loss beside errors and labels."""

    beta: float
    parameter: float = math.nan
    """The objective's own number."""
    num_values: int = 1
    """C * H * W: times it, E is the error's sum."""
    mean: Callable[[Tensor], Tensor] = torch.mean
    """Over images; the trainer's is over all processes."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Lists:
    """What is known of the images of each list."""

    above: Bool[Tensor, "batch place place"]
    """True: the first image is preferred to the second."""
    advantage: Float[Tensor, "batch place"]
    """Share of the image in the softmax of the list's scores, minus that of an even list; 0 without scores."""
    there: Bool[Tensor, "batch place"]
    """False: the list is shorter, and this place repeats another's image."""

    def map(self, function: Callable[[Tensor], Tensor]) -> "Lists":
        return Lists(**{each.name: function(getattr(self, each.name)) for each in fields(self)})


def inpo(error: Pairwise, reference_error: Pairwise, label: PerRecord, strength: Strength) -> PerRecord:
    """DDIM-InPO: -log sigmoid(u) with tau of Eq. 18 (arXiv 2503.18454, loss of its released code: w constant).

    Diffusion-DPO (arXiv 2311.12908, Eq. 14) is the same where x_t is x0 with noise and tau is that noise.
    """
    return -F.logsigmoid(logit(*oriented(error, reference_error, label), strength.beta))


def ipo(error: Pairwise, reference_error: Pairwise, label: PerRecord, strength: Strength) -> PerRecord:
    """IPO (arXiv 2310.12036, Eq. 17), as in the diffusers script: (-m - 1 / (2 beta))^2.

    Its gradient at the start is 1 / beta: at the script's 5000 it is a million times smaller than inpo's at 2000.
    """
    m = margin_of_errors(*oriented(error, reference_error, label))
    return (-m - 1 / (2 * strength.beta)) ** 2


def hinge(error: Pairwise, reference_error: Pairwise, label: PerRecord, strength: Strength) -> PerRecord:
    """Hinge loss (SLiC, arXiv 2305.10425), as in the diffusers script: relu(1 + beta * m)."""
    return F.relu(1 + strength.beta * margin_of_errors(*oriented(error, reference_error, label)))


def kto(error: Pairwise, reference_error: Pairwise, label: PerRecord, strength: Strength) -> PerRecord:
    """Diffusion-KTO (arXiv 2404.04465): per image 1 - sigmoid(y * beta * (-g - z0)), y = +1 win, -1 lose.

    A record's loss is the win's times the share of wins plus the lose's times the rest: in the mean what the released
    code has of drawing so many wins. z0 = max(0, mean of -g) in the same shares, detached; the trainer's mean is over
    the micro-batches of all processes, as there, and not over those that are accumulated: the loss depends on how a
    step is split.
    """
    error, reference_error = oriented(error, reference_error, label)
    better = reference_error - error
    share = better.new_tensor([strength.parameter, 1 - strength.parameter])
    z0 = strength.mean((better * share).sum(dim=1)).clamp(min=0).detach()
    sign = better.new_tensor([1.0, -1.0])
    return (share * (1 - torch.sigmoid(sign * strength.beta * (better - z0)))).sum(dim=1)


def sft(error: Pairwise, reference_error: Pairwise, label: PerRecord, strength: Strength) -> PerRecord:
    """Supervised fine-tuning on the preferred side: E_theta(win). beta scales the reported margin only."""
    return oriented(error, reference_error, label)[0][:, 0]


def smpo(error: Pairwise, reference_error: Pairwise, label: PerRecord, strength: Strength) -> PerRecord:
    """SmPO: -log sigmoid(gamma * (2p - 1) * u), p the soft label. The label orients, nothing is swapped.

    The strength hangs together with the labels' temperature: `SMPO_TEMPERATURE` is the released code's.
    """
    u = logit(error, reference_error, strength.beta)
    return -F.logsigmoid(strength.parameter * (2 * label - 1) * u)


def mapo(error: Pairwise, reference_error: Pairwise, label: PerRecord, strength: Strength) -> PerRecord:
    """MaPO (arXiv 2406.06424), no reference: E_win - weight * log sigmoid(beta * (phi(E_win) - phi(E_lose))).

    phi(v) = 0.5 v / (exp(0.5 v) - 1), decreasing. The reported margin and advantages are against the reference.
    """
    error, _ = oriented(error, reference_error, label)
    scaled = (MAPO_SLOPE * error).clamp(min=1e-12)
    # Not over expm1(scaled): at 177 and above its square, in the gradient, is infinite in float32.
    phi = scaled * torch.exp(-scaled) / -torch.expm1(-scaled)
    return error[:, 0] - strength.parameter * F.logsigmoid(strength.beta * (phi[:, 0] - phi[:, 1]))


def poly(error: Pairwise, reference_error: Pairwise, label: PerRecord, strength: Strength) -> PerRecord:
    """Poly-DPO (ViPO, arXiv 2604.24953): -log p + alpha (1 - p), p = sigmoid(u). alpha 0 is inpo.

    Our reading: the released repository holds no code.
    """
    u = logit(*oriented(error, reference_error, label), strength.beta)
    return -F.logsigmoid(u) + strength.parameter * torch.sigmoid(-u)


def bdpo(error: Pairwise, reference_error: Pairwise, label: PerRecord, strength: Strength) -> PerRecord:
    """Bounded DPO for diffusion (Diff-SNPO, ICLR 2026, openreview CU5EHe1KUt); lambda 1 is inpo.

    -log sigmoid((beta / 2N) [d_win - log(lambda exp(d_lose) + 1 - lambda)]), d = -N g, N = C * H * W: the log ratio is
    of the summed error. A lose side that is far worse than the reference counts as log(1 - lambda) and no longer has a
    gradient, while the win keeps its own; with the mean error in d's place nothing would be bounded. Our reading: no
    released code could be read.
    """
    error, reference_error = oriented(error, reference_error, label)
    d = strength.num_values * (reference_error - error)
    share = d.new_tensor(strength.parameter, dtype=torch.float64)
    mixed = torch.logaddexp(d[:, 1] + share.log().to(d), torch.log1p(-share).to(d))
    return -F.logsigmoid(strength.beta / (2 * strength.num_values) * (d[:, 0] - mixed))


def linear(error: Pairwise, reference_error: Pairwise, label: PerRecord, strength: Strength) -> PerRecord:
    """Linear-DPO (arXiv 2605.21123), as in its released code with the reference frozen, as one of its scripts has it.

    w * (E_win - E_lose), w = clamp(0.2 beta m + 0.5, eta, 1 - eta) without a gradient: a straight line in the place of
    the sigmoid by which inpo weighs a record. The value says nothing: it has no constant at the reference.
    """
    error, reference_error = oriented(error, reference_error, label)
    eta = strength.parameter
    m = margin_of_errors(error, reference_error).detach()
    return (LINEAR_SLOPE * strength.beta * m + 0.5).clamp(eta, 1 - eta) * (error[:, 0] - error[:, 1])


def capo(error: Pairwise, reference_error: Pairwise, label: PerRecord, strength: Strength) -> PerRecord:
    """CaPO (arXiv 2502.02588): (u - (R_win - R_lose))^2, R an image's calibrated win rate.

    The difference arrives as 2p - 1: for two images it is that of their own label, for a group with scores
    train/lists.py makes it of the rates against all its images. Nothing is swapped. Our reading: no code was released.
    """
    return (logit(error, reference_error, strength.beta) - (2 * label - 1)) ** 2


def dmpo(error: Pairwise, reference_error: Pairwise, label: PerRecord, strength: Strength) -> PerRecord:
    """DMPO (arXiv 2507.07510), as in the code of Diffusion-SDPO: the reverse KL of Bernoulli distributions.

    p log(p / q) + (1 - p) log((1 - p) / (1 - q)) with p = sigmoid(u), q = 1 - alpha.
    """
    u = logit(*oriented(error, reference_error, label), strength.beta)
    p, alpha = torch.sigmoid(u), strength.parameter
    return p * (F.logsigmoid(u) - math.log1p(-alpha)) + (1 - p) * (F.logsigmoid(-u) - math.log(alpha))


def listwise(error: Placed, reference_error: Placed, lists: Lists, strength: Strength) -> PerRecord:
    """Diffusion-LPO (arXiv 2510.01540): Plackett and Luce's model of a ranking; of two images it is inpo.

    The sum over images of -log softmax(l) among the image and all that stand below it. Images of which nothing says
    who is preferred (equal ranks, pairs that do not meet) do not compete. Our reading: no code was released.
    """
    reward = implicit_rewards(error, reference_error, strength.beta)
    competing = lists.above | torch.eye(reward.shape[1], dtype=torch.bool, device=reward.device)
    total = reward[:, None, :].masked_fill(~competing, -math.inf).logsumexp(dim=2)
    return ((total - reward) * lists.above.any(dim=2)).sum(dim=1)


def lair(error: Placed, reference_error: Placed, lists: Lists, strength: Strength) -> PerRecord:
    """LAIR (arXiv 2605.26491): -sum of advantage * l, plus lambda times the mean of l^2 over the list's images.

    The advantage is the centred softmax of the scores. The smallest value is at l = m * advantage / (2 lambda), m
    images. Our reading: the form follows from that optimum and from the abstract.
    """
    reward = implicit_rewards(error, reference_error, strength.beta)
    penalty = (reward.square() * lists.there).sum(dim=1) / lists.there.sum(dim=1)
    return strength.parameter * penalty - (lists.advantage * reward).sum(dim=1)


def preserve_win(error: Pairwise, product: PerRecord, label: PerRecord, mu: float) -> Pairwise:
    """The same errors, with the lose side's gradient scaled so that the win's error cannot rise to first order.

    Diffusion-SDPO (arXiv 2511.03317) and its code, which has one factor per micro-batch where this has one per record:
    min(1, (1 - mu) E_win / product), with `product` the mean product of the sides' residuals, and 1 where that is not
    above 0. The gradients are compared in the network's output.
    """
    swapped = label < 0.5
    win_error = torch.where(swapped, error[:, 1], error[:, 0]).detach()
    factor = torch.where(product > 0, (1 - mu) * win_error / product, 1.0).clamp(0, 1)
    both = torch.stack([torch.where(swapped, factor, 1.0), torch.where(swapped, 1.0, factor)], dim=1)
    return error.detach() + both * (error - error.detach())


def margin_of_errors(error: Pairwise, reference_error: Pairwise) -> PerRecord:
    """m = g_win - g_lose. The difference over sides is taken inside each model first: it cancels what both share."""
    return (error[:, 0] - error[:, 1]) - (reference_error[:, 0] - reference_error[:, 1])


def logit(error: Pairwise, reference_error: Pairwise, beta: float) -> PerRecord:
    """u = -(beta / 2) * m."""
    return -(beta / 2) * margin_of_errors(error, reference_error)


def implicit_rewards(error: Placed, reference_error: Placed, beta: float) -> Placed:
    """l = -(beta / 2) * g."""
    return (beta / 2) * (reference_error - error)


def oriented(error: Pairwise, reference_error: Pairwise, label: PerRecord) -> tuple[Pairwise, Pairwise]:
    """The sides in the order that the label prefers: swapped where P(win preferred) is below 0.5."""
    swap = (label < 0.5)[:, None]
    return torch.where(swap, error.flip(1), error), torch.where(swap, reference_error.flip(1), reference_error)
