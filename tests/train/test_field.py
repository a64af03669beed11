"""The objectives of 2026: their limits, what they do when a side runs away, lists, and the guard of the win."""

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.objectives import table
from inpo.common.errors import UsageError
from inpo.train.lists import advantages, by_score, preferences, win_rates
from inpo.train.losses import Lists, preserve_win
from inpo.train.objectives import OBJECTIVES, parameter_of
from inpo.train.settings import TrainSettings

ROOT = Path(__file__).parents[2]
BETA = 2000.0
NUM_VALUES = 4 * 32 * 32


def pairs(seed: int = 0, batch: int = 8, spread: float = 1e-3) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    reference = 0.05 + 0.7 * torch.rand(batch, 2, generator=random, dtype=torch.float64)
    return reference + spread * torch.randn(batch, 2, generator=random, dtype=torch.float64), reference


def gradient(name: str, error: Tensor, reference: Tensor, label: float = 1.0, **options: float) -> Tensor:
    leaf = error.clone().requires_grad_()
    labels = torch.full((len(error),), label, dtype=torch.float64)
    beta = options.pop("beta", OBJECTIVES[name].beta)
    OBJECTIVES[name].function(leaf, reference, labels, beta, num_values=NUM_VALUES, **options).loss.sum().backward()
    assert leaf.grad is not None
    return leaf.grad


@pytest.mark.parametrize(("name", "parameter"), [("poly", 0.0), ("bdpo", 1.0), ("snpo", 1.0)])
def test_at_its_limit_it_is_inpo(name: str, parameter: float) -> None:
    error, reference = pairs()
    label = torch.ones(len(error), dtype=torch.float64)
    inpo = OBJECTIVES["inpo"].function(error, reference, label, BETA)
    limit = OBJECTIVES[name].function(error, reference, label, BETA, parameter=parameter, num_values=NUM_VALUES)
    assert torch.allclose(limit.loss, inpo.loss, rtol=1e-9, atol=0)
    ours = gradient(name, error, reference, beta=BETA, parameter=parameter)
    assert torch.allclose(ours, gradient("inpo", error, reference, beta=BETA), rtol=1e-9, atol=0)


def test_when_the_lose_side_runs_away_only_the_bounded_loss_goes_on_with_the_win() -> None:
    """0.01 of an error worse than the reference, at a latent of 4 x 32 x 32; by hand, from each derivative."""
    reference = torch.full((1, 2), 0.3, dtype=torch.float64)
    away = reference + torch.tensor([[0.0, 0.01]], dtype=torch.float64)
    sigmoid = 1 / (1 + math.exp(10))  # u = 10
    inpo = gradient("inpo", away, reference)
    assert inpo[0].tolist() == pytest.approx([1000 * sigmoid, -1000 * sigmoid])
    poly = gradient("poly", away, reference)
    assert poly[0].tolist() == pytest.approx([g * (1 + 8 * (1 - sigmoid)) for g in inpo[0].tolist()])
    # lambda exp(-0.01 * 4096) is nothing beside 1 - lambda: u is beta / 2N times -log 0.1.
    bounded = 1000 / (1 + math.exp(BETA / (2 * NUM_VALUES) * math.log(10)))
    assert gradient("bdpo", away, reference)[0].tolist() == pytest.approx([bounded, 0], abs=1e-9)
    assert bounded > 300
    # The clamp of linear's weight, and capo's square, which pulls back once the margin is too large.
    assert gradient("linear", away, reference)[0].tolist() == pytest.approx([0.3, -0.3])
    assert gradient("linear", away + 1, reference, beta=BETA)[0].tolist() == pytest.approx([1e-3, -1e-3])
    assert gradient("capo", away, reference, label=0.7)[0].tolist() == pytest.approx([-2000 * 9.6, 2000 * 9.6])
    # dmpo's divergence is smallest at p = 0.99, u = 4.6: beyond it, it pulls back too.
    p = 1 - sigmoid
    slope = p * (1 - p) * (10 - math.log(99))
    assert gradient("dmpo", away, reference)[0].tolist() == pytest.approx([-1000 * slope, 1000 * slope])


def test_a_share_of_wins_is_what_drawing_so_many_gives() -> None:
    """Of 5 images 4 are wins: the mean over them is the weighted record's. z0 is above 0."""
    error, reference = pairs(3, batch=1)
    error = reference - error.abs() * 1e-2
    label = torch.ones(1, dtype=torch.float64)
    weighted = OBJECTIVES["kto"].function(error, reference, label, 1000.0, parameter=0.8).loss
    better = (reference - error)[0].tolist()
    drawn = [better[0]] * 4 + [better[1]]
    z0 = max(0.0, sum(drawn) / 5)
    losses = [1 - 1 / (1 + math.exp(-sign * 1000 * (g - z0))) for sign, g in zip([1] * 4 + [-1], drawn, strict=True)]
    assert float(weighted) == pytest.approx(sum(losses) / 5, rel=1e-9)


# --- lists ---


def as_lists(*entries: tuple[np.ndarray, np.ndarray]) -> Lists:
    place = max(len(advantage) for _, advantage in entries)
    above, weight, there = (
        torch.zeros(len(entries), place, place, dtype=torch.bool),
        torch.zeros(len(entries), place, dtype=torch.float64),
        torch.zeros(len(entries), place, dtype=torch.bool),
    )
    for row, (preferred, advantage) in enumerate(entries):
        size = len(advantage)
        above[row, :size, :size] = torch.from_numpy(preferred)
        weight[row, :size], there[row, :size] = torch.from_numpy(advantage), True
    return Lists(above=above, advantage=weight, there=there)


def test_a_list_of_two_is_inpo_and_a_shorter_list_beside_it_changes_nothing() -> None:
    error, reference = pairs(batch=1)
    longer = as_lists(
        (by_score(np.array([2.0, 1.0])), advantages(np.array([2.0, 1.0]))),
        (by_score(np.arange(4.0)), advantages(np.arange(4.0))),
    )
    filled = [torch.cat([each, each[:, :1], each[:, :1]], dim=1) for each in (error, reference)]
    other = [torch.rand(1, 4, dtype=torch.float64) for _ in range(2)]
    leaf = torch.cat([filled[0], other[0]]).requires_grad_()
    result = OBJECTIVES["listwise"].function(leaf, torch.cat([filled[1], other[1]]), longer, BETA)
    pair = OBJECTIVES["inpo"].function(error, reference, torch.ones(1, dtype=torch.float64), BETA)
    for ours, theirs in zip(result, pair, strict=True):
        assert torch.allclose(ours[:1], theirs, rtol=1e-9)
    result.loss[0].backward()
    assert leaf.grad is not None
    assert torch.allclose(leaf.grad[0, :2], gradient("inpo", error, reference)[0], rtol=1e-9)
    assert not leaf.grad[0, 2:].any()


def test_listwise_is_plackett_and_luces_probability_of_the_ranking() -> None:
    """The likelihoods of all rankings of four images sum to 1, and each is the product of its choices."""
    random = np.random.default_rng(0)
    reference = random.uniform(0.1, 0.9, 4)
    error = reference + 1e-3 * random.standard_normal(4)
    worth = np.exp(-(BETA / 2) * (error - reference))
    total = 0.0
    for ranking in itertools.permutations(range(4)):
        score = np.empty(4)
        score[list(ranking)] = np.arange(4, 0, -1)
        lists = as_lists((by_score(score), advantages(score)))
        numbers = (torch.from_numpy(each)[None] for each in (error, reference))
        loss = float(OBJECTIVES["listwise"].function(*numbers, lists, BETA).loss)
        chosen = [worth[ranking[place]] / worth[list(ranking[place:])].sum() for place in range(4)]
        assert loss == pytest.approx(-math.log(np.prod(chosen)), rel=1e-9)
        total += math.exp(-loss)
    assert total == pytest.approx(1, rel=1e-9)


def test_the_gradients_of_lists_are_those_of_the_papers_formulas_by_hand() -> None:
    """Of the best, the second and so on in turn: the softmax among those left, minus 1 for the one that is taken; and
    twice the penalty's share minus the advantage."""
    random, score = np.random.default_rng(1), np.array([0.3, 2.0, -1.0, 0.9])
    reference = random.uniform(0.1, 0.9, 4)
    error = reference + 1e-3 * random.standard_normal(4)
    reward, left = -(BETA / 2) * (error - reference), list(np.argsort(-score))
    ranked = np.zeros(4)
    while left:
        worth = np.exp(reward[left])
        ranked[left] += worth / worth.sum()
        ranked[left.pop(0)] -= 1
    advantage = np.exp(score) / np.exp(score).sum() - 1 / 4
    value = 0.7 * np.mean(reward**2) - (advantage * reward).sum()
    expected = {"listwise": ranked, "lair": 2 * 0.7 * reward / 4 - advantage}
    lists = as_lists((by_score(score), advantages(score)))
    for name, by_reward in expected.items():
        leaf = torch.from_numpy(error)[None].requires_grad_()
        own = {"parameter": 0.7} if name == "lair" else {}
        loss = OBJECTIVES[name].function(leaf, torch.from_numpy(reference)[None], lists, BETA, **own).loss
        loss.sum().backward()
        assert leaf.grad is not None
        np.testing.assert_allclose(leaf.grad[0], -(BETA / 2) * by_reward, rtol=1e-9)
        assert name == "listwise" or loss.item() == pytest.approx(value, rel=1e-9)


def test_equal_ranks_do_not_compete() -> None:
    """A over B and C, which are equal: one choice among three. Nothing but equal ranks: nothing to learn."""
    worth = torch.tensor([[0.0, 1e-3, -1e-3]], dtype=torch.float64)
    reference = torch.full((1, 3), 0.5, dtype=torch.float64)
    lists = as_lists((by_score(np.array([2.0, 1.0, 1.0])), np.zeros(3)))
    loss = OBJECTIVES["listwise"].function(reference - worth, reference, lists, BETA).loss
    assert float(loss) == pytest.approx(math.log(1 + math.e + 1 / math.e))
    even = as_lists((by_score(np.ones(3)), advantages(np.ones(3))))
    result = OBJECTIVES["listwise"].function(reference - worth, reference, even, BETA)
    assert [float(each) for each in result[:4]] == [0, 0, 0, 0.5]
    # lair: equal scores leave the penalty alone, lambda times the mean of l^2.
    penalty = OBJECTIVES["lair"].function(reference - worth, reference, even, BETA).loss
    assert float(penalty) == pytest.approx(0.5 * (0 + 1 + 1) / 3)


def test_lair_is_smallest_where_the_closed_form_says() -> None:
    score = np.array([1.5, -0.3, 0.2])
    lists = as_lists((by_score(score), advantages(score)))
    reference = torch.full((1, 3), 0.5, dtype=torch.float64)
    best = 3 * lists.advantage / (2 * 0.7)
    leaf = (reference - best * 2 / BETA).requires_grad_()
    OBJECTIVES["lair"].function(leaf, reference, lists, BETA, parameter=0.7).loss.backward()
    assert leaf.grad is not None
    assert float(leaf.grad.abs().max()) < 1e-9
    share = np.exp(score) / np.exp(score).sum()
    np.testing.assert_allclose(lists.advantage[0], share - 1 / 3, rtol=1e-12)


def test_preferences_follow_the_pairs_and_leave_out_circles() -> None:
    chain = preferences(4, np.array([[0, 1], [2, 1], [2, 3]]), np.array([1.0, 0.2, 0.9]))
    expected = {(0, 1), (1, 2), (0, 2), (2, 3), (0, 3), (1, 3)}  # the second pair is turned
    assert set(zip(*np.nonzero(chain), strict=True)) == expected
    circle = preferences(4, np.array([[0, 1], [1, 2], [2, 0], [0, 3]]), np.ones(4))
    assert set(zip(*np.nonzero(circle), strict=True)) == {(0, 3), (1, 3), (2, 3)}
    assert not preferences(2, np.array([[0, 1]]), np.array([0.5])).any()


def test_win_rates_of_two_are_their_label_and_of_more_a_mean() -> None:
    win, lose = win_rates(np.array([0.7, -0.1]))
    assert win - lose == pytest.approx(2 / (1 + math.exp(-0.8)) - 1)
    rates = win_rates(np.array([3.0, 1.0, 0.5]))
    assert rates[1] == pytest.approx((1 / (1 + math.exp(2)) + 1 / (1 + math.exp(-0.5))) / 2)


# --- the guard of the win ---


def released_factor(pred_eps: Tensor, true_eps: Tensor, mu: float) -> Tensor:
    """get_adaptive_lose_l_scale of train.py, github.com/AIDC-AI/Diffusion-SDPO, commit 84fb241, lines 85-124."""
    pred_w, pred_l = pred_eps.detach().requires_grad_(True).chunk(2, dim=0)
    true_w, true_l = true_eps.detach().chunk(2, dim=0)
    g_w = torch.autograd.grad(((pred_w - true_w) ** 2).mean(), pred_w)[0]
    g_l = torch.autograd.grad(((pred_l - true_l) ** 2).mean(), pred_l)[0]
    num, den = g_w.flatten().pow(2).sum(), (g_l.flatten() * g_w.flatten()).sum()
    cap = ((1.0 - mu) * num) / (den + 1e-9)
    return torch.where(den > 0, cap, torch.tensor(1.0, dtype=torch.float64)).clamp(min=0.0, max=1.0)


@pytest.mark.parametrize("label", [1.0, 0.2])
def test_the_guard_scales_the_lose_sides_gradient_as_released(label: float) -> None:
    random = torch.Generator().manual_seed(1)
    tau = torch.randn(6, 2, 3, 4, 4, generator=random, dtype=torch.float64)
    win_residual, other = torch.randn(2, 6, 3, 4, 4, generator=random, dtype=torch.float64)
    size = torch.tensor([0.1, 0.2, 1.0, 3.0, -1.0, 0.3], dtype=torch.float64)[:, None, None, None]
    both = [win_residual, size * (win_residual + other)]
    residual = torch.stack(both if label > 0.5 else both[::-1], dim=1)
    predicted = tau - residual
    leaf = residual.square().mean(dim=(2, 3, 4)).requires_grad_()
    product = (residual[:, 0] * residual[:, 1]).mean(dim=(1, 2, 3))
    labels = torch.full((6,), label, dtype=torch.float64)
    guarded = preserve_win(leaf, product, labels, 0.6)
    assert torch.equal(guarded, leaf)
    guarded.sum().backward()
    assert leaf.grad is not None
    win, lose = (0, 1) if label > 0.5 else (1, 0)
    factors = torch.stack(
        [released_factor(predicted[row, [win, lose]], tau[row, [win, lose]], 0.6) for row in range(6)]
    )
    assert torch.allclose(leaf.grad[:, lose], factors, rtol=1e-6)
    assert torch.equal(leaf.grad[:, win], torch.ones(6, dtype=torch.float64))
    assert 0 < int((factors < 1).sum()) < 6, "both cases are met"


def test_sides_that_disagree_are_left_alone() -> None:
    leaf = torch.tensor([[0.5, 0.7]], requires_grad=True)
    preserve_win(leaf, torch.tensor([-0.1]), torch.ones(1), 0.9).sum().backward()
    assert leaf.grad is not None
    assert leaf.grad.tolist() == [[1, 1]]


# --- the number beside beta ---


def test_a_number_that_the_objective_does_not_have_is_refused() -> None:
    with pytest.raises(UsageError, match="no number of its own"):
        parameter_of(TrainSettings(objective="inpo", parameter=1.0))
    with pytest.raises(UsageError, match="outside its range"):
        parameter_of(TrainSettings(objective="bdpo", parameter=1.5))
    assert parameter_of(TrainSettings(objective="bdpo", parameter=0.5)) == 0.5
    assert parameter_of(TrainSettings(objective="poly")) == 8.0
    assert parameter_of(TrainSettings(objective="inpo")) is None


# --- the document ---


def test_the_documents_table_is_what_the_functions_give() -> None:
    text = (ROOT / "docs/objectives.md").read_text()
    assert table() in text
    rows = {
        line.split("`")[1]: line.split("|")
        for line in text.split("## At the")[0].splitlines()
        if line.startswith("| `")
    }
    rows.pop("--objective")
    assert set(rows) == set(OBJECTIVES)
    for name, objective in OBJECTIVES.items():
        told = rows[name][3].strip()
        assert (told == "") == (objective.parameter is None), name
        if objective.parameter is not None:
            assert float(told.split("=")[1].split(",")[0]) == objective.parameter.default
