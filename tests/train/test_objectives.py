"""Every objective against a transcription in numpy, float64, written from the equations alone."""

import itertools
import math
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from inpo.train.loop import Trainer
from inpo.train.losses import Lists
from inpo.train.objectives import OBJECTIVES, ObjectiveResult


def log_sigmoid(value: np.ndarray) -> np.ndarray:
    return -np.logaddexp(0.0, -value)


def sigmoid(value: np.ndarray) -> np.ndarray:
    return 1.0 / (1.0 + np.exp(-value))


def m_of(error: np.ndarray, reference: np.ndarray) -> np.ndarray:
    g = error - reference
    return g[:, 0] - g[:, 1]


def smpo(error: np.ndarray, reference: np.ndarray, label: np.ndarray, beta: float) -> np.ndarray:
    return -log_sigmoid(10 * (2 * label - 1) * (-(beta / 2) * m_of(error, reference)))


def kto(error: np.ndarray, reference: np.ndarray, label: np.ndarray, beta: float) -> np.ndarray:
    g = error - reference
    z0 = max(0.0, float((-g).mean()))
    win = 1 - sigmoid(beta * (-g[:, 0] - z0))
    lose = 1 - sigmoid(-beta * (-g[:, 1] - z0))
    return (win + lose) / 2


def mapo(error: np.ndarray, reference: np.ndarray, label: np.ndarray, beta: float) -> np.ndarray:
    def phi(value: np.ndarray) -> np.ndarray:
        return 0.5 * value / (np.exp(0.5 * value) - 1)

    return error[:, 0] - 0.1 * log_sigmoid(beta * (phi(error[:, 0]) - phi(error[:, 1])))


def inpo(error: np.ndarray, reference: np.ndarray, label: np.ndarray, beta: float) -> np.ndarray:
    return -log_sigmoid(-(beta / 2) * m_of(error, reference))


NUM_VALUES = 4 * 8 * 8


def bdpo(error: np.ndarray, reference: np.ndarray, label: np.ndarray, beta: float) -> np.ndarray:
    """The ratio of likelihoods in the open, with exp and log: the errors' sums must not be large here."""
    ratio_win, ratio_lose = np.exp(-NUM_VALUES * (error - reference)).T
    bounded = 0.9 * ratio_lose + 0.1
    return -log_sigmoid(beta / (2 * NUM_VALUES) * np.log(ratio_win / bounded))


def linear(error: np.ndarray, reference: np.ndarray, label: np.ndarray, beta: float) -> np.ndarray:
    """train/train_sd_dpo.py of github.com/Whynot0101/Linear-DPO, commit 663179c, lines 1158-1166."""
    model_diff = error[:, 0] - error[:, 1]
    ref_diff = reference[:, 0] - reference[:, 1]
    ratio = 0.2 * beta * (model_diff - ref_diff) + 0.5
    return np.clip(ratio, 1e-3, 1 - 1e-3) * model_diff


def dmpo(error: np.ndarray, reference: np.ndarray, label: np.ndarray, beta: float) -> np.ndarray:
    """train.py of github.com/AIDC-AI/Diffusion-SDPO, commit 84fb241, lines 1220-1234, with --dmpo_alpha 0.01."""
    p = sigmoid(-0.5 * beta * m_of(error, reference))
    q = 1 - 0.01
    log_p, log_1mp = log_sigmoid(-0.5 * beta * m_of(error, reference)), log_sigmoid(0.5 * beta * m_of(error, reference))
    return p * (log_p - np.log(q)) + (1 - p) * (log_1mp - np.log1p(-q))


def poly(error: np.ndarray, reference: np.ndarray, label: np.ndarray, beta: float) -> np.ndarray:
    return inpo(error, reference, label, beta) + 8 * (1 - sigmoid(-(beta / 2) * m_of(error, reference)))


def capo(error: np.ndarray, reference: np.ndarray, label: np.ndarray, beta: float) -> np.ndarray:
    return (-(beta / 2) * m_of(error, reference) - (label - (1 - label))) ** 2


TRANSCRIPTIONS: dict[str, Callable[[np.ndarray, np.ndarray, np.ndarray, float], np.ndarray]] = {
    "inpo": inpo,
    "dpo": inpo,
    "ipo": lambda e, r, p, beta: (-m_of(e, r) - 1 / (2 * beta)) ** 2,
    "hinge": lambda e, r, p, beta: np.maximum(0.0, 1 + beta * m_of(e, r)),
    "kto": kto,
    "sft": lambda e, r, p, beta: e[:, 0],
    "smpo": smpo,
    "mapo": mapo,
    # With errors that carry 1 / abar_t, and w_t = 1 / (2 abar_t): -log sigmoid(-beta * w_t * [...]).
    "inversion_dpo": lambda e, r, p, beta: -log_sigmoid(-beta * 0.5 * m_of(e, r)),
    "poly": poly,
    "bdpo": bdpo,
    "snpo": bdpo,
    "linear": linear,
    "capo": capo,
    "dmpo": dmpo,
}
NAMES = sorted(TRANSCRIPTIONS)


def of(name: str, *arguments: Any) -> ObjectiveResult:
    return OBJECTIVES[name].function(*arguments, num_values=NUM_VALUES)


def records(seed: int, batch: int = 6, spread: float = 1e-3) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    reference = random.uniform(0.05, 0.8, (batch, 2))
    return reference + spread * random.standard_normal((batch, 2)), reference


def tensors(*arrays: np.ndarray) -> list[Tensor]:
    return [torch.from_numpy(np.asarray(array)) for array in arrays]


def test_every_objective_has_a_transcription() -> None:
    assert set(TRANSCRIPTIONS) == {name for name, objective in OBJECTIVES.items() if not objective.lists}


@pytest.mark.parametrize("name", NAMES)
@given(seed=st.integers(0, 2**31), beta=st.floats(0.01, 5000))
@settings(max_examples=25)
def test_loss_equals_the_transcription(name: str, seed: int, beta: float) -> None:
    error, reference = records(seed)
    label = np.random.default_rng(seed).uniform(0.51, 1.0, len(error))
    result = of(name, *tensors(error, reference, label), beta)
    np.testing.assert_allclose(
        result.loss.numpy(), TRANSCRIPTIONS[name](error, reference, label, beta), rtol=1e-9, atol=1e-12
    )


@pytest.mark.parametrize("name", NAMES)
def test_gradient_is_the_transcriptions(name: str) -> None:
    """Central differences of the float64 transcription; KTO's z0 is held where it is, as it is detached."""
    error, reference = records(3)
    label = np.full(len(error), 0.8)
    beta = min(OBJECTIVES[name].beta, 1000.0)
    if name == "kto":  # z0 = 0: no detached part in the numbers
        error = reference + np.abs(error - reference)
    if name == "linear":  # its weight is detached: held by a clamp here, and tested where it moves in the next test
        error = reference + np.array([[1.0, -1.0], [-1.0, 1.0]] * 3) * 0.1
    leaf = torch.from_numpy(error).requires_grad_()
    of(name, leaf, *tensors(reference, label), beta).loss.sum().backward()
    step = 1e-6
    expected = np.zeros_like(error)
    for index in np.ndindex(error.shape):
        up, down = error.copy(), error.copy()
        up[index] += step
        down[index] -= step
        transcription = TRANSCRIPTIONS[name]
        difference = transcription(up, reference, label, beta) - transcription(down, reference, label, beta)
        expected[index] = difference.sum() / (2 * step)
    assert leaf.grad is not None
    np.testing.assert_allclose(leaf.grad.numpy(), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "kto"])
@given(seed=st.integers(0, 2**31), cuts=st.sets(st.integers(1, 11)))
@settings(max_examples=15)
def test_a_batch_may_be_split_anywhere(name: str, seed: int, cuts: set[int]) -> None:
    """Accumulation: the parts' gradients, weighted by their records, are the batch's. kto's z0 is a batch's mean."""
    error, reference = records(seed, batch=12)
    label = np.random.default_rng(seed).uniform(0.51, 1.0, 12)

    def gradient(edges: list[int]) -> Tensor:
        leaf, rest, p = tensors(error.copy(), reference, label)
        leaf.requires_grad_()
        for start, end in itertools.pairwise(edges):
            part = slice(start, end)
            result = of(name, leaf[part], rest[part], p[part], OBJECTIVES[name].beta)
            (result.loss.mean() * (end - start) / 12).backward()
        assert leaf.grad is not None
        return leaf.grad

    np.testing.assert_allclose(gradient([0, *sorted(cuts), 12]), gradient([0, 12]), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("inpo", math.log(2)),
        ("dpo", math.log(2)),
        ("smpo", math.log(2)),
        ("inversion_dpo", math.log(2)),
        ("hinge", 1.0),
        ("ipo", 1 / (4 * 0.05**2)),
        ("kto", 0.5),
        ("poly", math.log(2) + 4),
        ("bdpo", math.log(2)),
        ("snpo", math.log(2)),
        ("capo", 0.4**2),
        ("dmpo", 0.5 * math.log(0.5 / 0.99) + 0.5 * math.log(0.5 / 0.01)),
    ],
)
def test_value_at_the_reference(name: str, value: float) -> None:
    error, reference = records(0)
    objective = OBJECTIVES[name]
    label = np.full(len(reference), 0.7)
    result = objective.function(*tensors(reference, reference, label), objective.beta)
    np.testing.assert_allclose(result.loss.numpy(), value, rtol=1e-12)
    away = objective.function(*tensors(error, reference, label), objective.beta)
    np.testing.assert_allclose(away.at_reference.numpy(), value, rtol=1e-12)
    assert torch.equal(result.implicit_accuracy, torch.full_like(result.margin, 0.5))


@pytest.mark.parametrize("name", NAMES)
def test_descending_the_loss_prefers_the_win(name: str) -> None:
    error, reference = records(1, spread=0.0)
    leaf = torch.from_numpy(error).requires_grad_()
    label = torch.full((len(error),), 0.9, dtype=torch.float64)
    of(name, leaf, torch.from_numpy(reference), label, OBJECTIVES[name].beta).loss.mean().backward()
    assert leaf.grad is not None
    assert bool((leaf.grad[:, 0] > 0).all())
    if name == "sft":
        assert bool((leaf.grad[:, 1] == 0).all())
    else:
        assert bool((leaf.grad[:, 1] < 0).all())


@pytest.mark.parametrize("name", [name for name in NAMES if OBJECTIVES[name].labels == "hard"])
def test_a_label_below_one_half_swaps_the_sides(name: str) -> None:
    error, reference = records(2)
    low, high = np.full(len(error), 0.2), np.ones(len(error))
    swapped = of(name, *tensors(error, reference, low), 100.0)
    expected = of(name, *tensors(error[:, ::-1].copy(), reference[:, ::-1].copy(), high), 100.0)
    for got, want in zip(swapped, expected, strict=True):
        assert torch.equal(got, want)


def test_a_soft_label_scales_and_turns_smpo() -> None:
    error, reference = records(4)
    for p in (0.1, 0.5, 0.9):
        label = np.full(len(error), p)
        result = OBJECTIVES["smpo"].function(*tensors(error, reference, label), 50.0)
        np.testing.assert_allclose(result.loss.numpy(), smpo(error, reference, label, 50.0), rtol=1e-10)


def test_what_is_reported_beside_the_loss() -> None:
    reference = np.array([[0.5, 0.5], [0.5, 0.5], [0.5, 0.5]])
    error = np.array([[0.4, 0.7], [0.6, 0.5], [0.5, 0.5]])
    result = OBJECTIVES["inpo"].function(*tensors(error, reference, np.ones(3)), 10.0)
    np.testing.assert_allclose(result.margin, [1.5, -0.5, 0.0], atol=1e-12)
    np.testing.assert_allclose(result.implicit_accuracy, [1.0, 0.0, 0.5])
    np.testing.assert_allclose(result.win_advantage, [0.1, -0.1, 0.0], atol=1e-12)
    np.testing.assert_allclose(result.lose_advantage, [-0.2, 0.0, 0.0], atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_an_error_of_any_size_has_the_gradient_of_the_transcription(name: str) -> None:
    """In float32, as training has it, against central differences of the transcription in float64."""
    beta = OBJECTIVES[name].beta
    for large in (178.0, 1e4):
        for sides in ([large, 0.1], [0.1, large], [large, large + 1]):
            error = torch.tensor([sides], requires_grad=True)
            loss = of(name, error, torch.full((1, 2), 0.1), torch.ones(1), beta).loss
            loss.sum().backward()
            assert loss.isfinite().all()
            assert error.grad is not None
            np.testing.assert_allclose(error.grad[0], slope(name, sides, beta), rtol=1e-3, atol=1e-6)


def slope(name: str, sides: list[float], beta: float) -> np.ndarray:
    """Where exp overflows here, a phi or a sigmoid is 0, as it should be. The likelihoods of bdpo are in logs."""
    step = 1e-5
    function = bdpo_in_logs if TRANSCRIPTIONS[name] is bdpo else TRANSCRIPTIONS[name]
    with np.errstate(over="ignore"):
        up, down = (
            function(np.array([sides]) + sign * step * np.eye(2), np.full((2, 2), 0.1), np.ones(2), beta)
            for sign in (1, -1)
        )
    return (up - down) / (2 * step)


def bdpo_in_logs(error: np.ndarray, reference: np.ndarray, label: np.ndarray, beta: float) -> np.ndarray:
    win, lose = -NUM_VALUES * (error - reference).T
    return -log_sigmoid(beta / (2 * NUM_VALUES) * (win - np.logaddexp(np.log(0.9) + lose, np.log(0.1))))


@pytest.mark.parametrize("name", ["inpo", "listwise"])
def test_an_error_that_is_not_a_number_has_no_accuracy(name: str) -> None:
    """And is not that of a record whose sides are alike."""
    error = torch.tensor([[math.nan, 0.5], [0.5, 0.5]])
    above = torch.tensor([[False, True], [False, False]]).expand(2, 2, 2)
    lists = Lists(above=above, advantage=torch.zeros(2, 2), there=torch.ones(2, 2, dtype=torch.bool))
    told = lists if OBJECTIVES[name].lists else torch.ones(2)
    result = OBJECTIVES[name].function(error, torch.full((2, 2), 0.5), told, 10.0)
    np.testing.assert_equal(result.implicit_accuracy.numpy(), [math.nan, 0.5])


def test_two_processes_have_one_z0() -> None:
    """The losses of two processes are those of one with both their records; z0 is above 0, and differs by half."""
    random = torch.Generator().manual_seed(0)
    reference = torch.rand(8, 2, generator=random, dtype=torch.float64)
    error = reference - 0.002 * torch.rand(8, 2, generator=random, dtype=torch.float64)
    error[:4] -= 0.003
    halves = [slice(0, 4), slice(4, 8)]
    means = [(reference - error)[half].mean() for half in halves]
    kto = OBJECTIVES["kto"].function

    def losses(half: slice, mean: Callable[[Tensor], Tensor]) -> Tensor:
        return kto(error[half], reference[half], torch.ones(4), 1000.0, mean).loss

    def reduce(value: Tensor, *, reduction: str) -> Tensor:
        """What accelerate gives every process, from what both hand in."""
        assert reduction == "mean"
        assert any(torch.allclose(value, mean) for mean in means)
        return torch.stack(means).mean()

    trainer = SimpleNamespace(accelerator=SimpleNamespace(reduce=reduce))
    mean = partial(Trainer._mean_over_processes, trainer)
    both = torch.cat([losses(half, mean) for half in halves])
    assert torch.allclose(both, kto(error, reference, torch.ones(8), 1000.0).loss, rtol=1e-9)
    for half in halves:
        assert not torch.allclose(losses(half, mean), losses(half, torch.mean), atol=1e-2)
