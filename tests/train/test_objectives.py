"""Every objective against a transcription in numpy, float64, written from the equations alone."""

import itertools
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from inpo.train.loop import Trainer
from inpo.train.objectives import OBJECTIVES


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
}
NAMES = sorted(OBJECTIVES)


def records(seed: int, batch: int = 6, spread: float = 1e-3) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    reference = random.uniform(0.05, 0.8, (batch, 2))
    return reference + spread * random.standard_normal((batch, 2)), reference


def tensors(*arrays: np.ndarray) -> list[Tensor]:
    return [torch.from_numpy(np.asarray(array)) for array in arrays]


def test_every_objective_has_a_transcription() -> None:
    assert set(TRANSCRIPTIONS) == set(OBJECTIVES)


@pytest.mark.parametrize("name", NAMES)
@given(seed=st.integers(0, 2**31), beta=st.floats(0.01, 5000))
@settings(max_examples=25, deadline=None)
def test_loss_equals_the_transcription(name: str, seed: int, beta: float) -> None:
    error, reference = records(seed)
    label = np.random.default_rng(seed).uniform(0.51, 1.0, len(error))
    result = OBJECTIVES[name].function(*tensors(error, reference, label), beta)
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
    leaf = torch.from_numpy(error).requires_grad_()
    OBJECTIVES[name].function(leaf, *tensors(reference, label), beta).loss.sum().backward()
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
@settings(max_examples=15, deadline=None)
def test_a_batch_may_be_split_anywhere(name: str, seed: int, cuts: set[int]) -> None:
    """Accumulation: the parts' gradients, weighted by their records, are the batch's. kto's z0 is a batch's mean."""
    error, reference = records(seed, batch=12)
    label = np.random.default_rng(seed).uniform(0.51, 1.0, 12)

    def gradient(edges: list[int]) -> Tensor:
        leaf, rest, p = tensors(error.copy(), reference, label)
        leaf.requires_grad_()
        for start, end in itertools.pairwise(edges):
            part = slice(start, end)
            result = OBJECTIVES[name].function(leaf[part], rest[part], p[part], OBJECTIVES[name].beta)
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
    ],
)
def test_value_at_the_reference(name: str, value: float) -> None:
    _, reference = records(0)
    objective = OBJECTIVES[name]
    label = np.full(len(reference), 0.7)
    result = objective.function(*tensors(reference, reference, label), objective.beta)
    np.testing.assert_allclose(result.loss.numpy(), value, rtol=1e-12)
    assert objective.logistic == (value == math.log(2))
    assert torch.equal(result.implicit_accuracy, torch.full_like(result.margin, 0.5))


@pytest.mark.parametrize("name", NAMES)
def test_descending_the_loss_prefers_the_win(name: str) -> None:
    error, reference = records(1, spread=0.0)
    leaf = torch.from_numpy(error).requires_grad_()
    label = torch.full((len(error),), 0.9, dtype=torch.float64)
    OBJECTIVES[name].function(leaf, torch.from_numpy(reference), label, OBJECTIVES[name].beta).loss.mean().backward()
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
    swapped = OBJECTIVES[name].function(*tensors(error, reference, low), 100.0)
    expected = OBJECTIVES[name].function(*tensors(error[:, ::-1].copy(), reference[:, ::-1].copy(), high), 100.0)
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


def _one_of_two(rank: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    error, reference = torch.load(f"{folder}/records.pt", weights_only=True)
    trainer = SimpleNamespace(accelerator=SimpleNamespace(reduce=_mean))
    mine = slice(4 * rank, 4 * rank + 4)
    mean = partial(Trainer._mean_over_processes, trainer)
    result = OBJECTIVES["kto"].function(error[mine], reference[mine], torch.ones(4), 1000.0, mean)
    torch.save(result.loss, f"{folder}/loss-{rank}.pt")
    torch.distributed.destroy_process_group()


def _mean(value: torch.Tensor, *, reduction: str) -> torch.Tensor:
    assert reduction == "mean"
    torch.distributed.all_reduce(value)
    return value / 2


def test_two_processes_have_one_z0(tmp_path: Path) -> None:
    """The losses of two processes are those of one with both their records; z0 is above 0, and differs by half."""
    random = torch.Generator().manual_seed(0)
    reference = torch.rand(8, 2, generator=random)
    error = reference - 0.002 * torch.rand(8, 2, generator=random)
    error[:4] -= 0.003
    torch.save((error, reference), tmp_path / "records.pt")
    torch.multiprocessing.spawn(_one_of_two, args=(str(tmp_path),), nprocs=2)
    both = torch.cat([torch.load(tmp_path / f"loss-{rank}.pt", weights_only=True) for rank in (0, 1)])
    kto = OBJECTIVES["kto"].function
    assert torch.allclose(both, kto(error, reference, torch.ones(8), 1000.0).loss, atol=1e-6)
    assert not torch.allclose(both[:4], kto(error[:4], reference[:4], torch.ones(4), 1000.0).loss, atol=1e-2)
