"""The benchmark of inverters: its rivals against closed forms, and its own path against the product's."""

import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from torch import Tensor

from benchmarks.inversion import METHODS, Method, World, draw, exact_way
from benchmarks.inversion_tables import write_between
from benchmarks.rivals import RIVALS, Ode, Rival, Step, fireflow, rf_solver, uni_inv, walk, x0_extrapolated
from inpo.common.cache.schema import InverterIdentity
from inpo.common.conditions import Condition
from inpo.common.denoiser import Denoiser
from inpo.common.inversion import Group, build_path, invert
from tests.mixture import flow_mixture, mixture_eps, mixture_velocity, noise_mixture

SPACES = {
    "noise": (lambda: noise_mixture(np.linspace(0.01, 2.0, 20_000)), mixture_eps, 2.0),
    "velocity": (lambda: flow_mixture(20_000), mixture_velocity, 0.8),
}
"""A network told of levels so fine that their rounding does not matter, the closed form, and how far."""
X0 = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(3)).half()


def caption(images: int) -> Condition:
    return Condition(embedding=torch.zeros(images, 1, 1))


def world(denoiser: Denoiser, pairs: int = 2) -> World:
    x0 = torch.randn(2 * pairs, 1, 4, 4, generator=torch.Generator().manual_seed(1)).half()
    return World(
        denoiser=denoiser, x0=x0, pair_ids=[f"pair-{number}" for number in range(pairs)], caption=caption(2 * pairs)
    )


def halved(errors: list[float]) -> np.ndarray:
    """Order of accuracy, from errors at steps each half as long as the one before."""
    return np.log2(np.array(errors[:-1]) / errors[1:])


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize(("move", "order"), [(uni_inv, 1), (fireflow, 2), (rf_solver, 2)])
def test_the_order_of_every_rival(space: str, move: Callable[[Step], tuple[Tensor, Tensor]], order: int) -> None:
    build, slope, end = SPACES[space]
    ode = Ode.of(build(), X0, caption(2))
    end = float(ode.tau[ode.nearest(np.array(end))])
    start = X0.double().numpy().ravel()
    true = solve_ivp(lambda tau, y: slope(y, tau), (1e-9, end), start, rtol=1e-9, atol=1e-9).y[:, -1]
    errors = []
    for steps in (16, 32, 64):
        grid = np.linspace(0, end, steps + 1)[1:, None].repeat(2, axis=1)
        y = walk(ode, move, grid)[0][-1]
        errors.append(float(np.abs(y.double().numpy().ravel() - true).max()))
    assert np.abs(halved(errors) - order).max() < 0.3, errors


@pytest.mark.parametrize(("move", "has_logarithm"), [(uni_inv, False), (x0_extrapolated, True)])
def test_it_comes_to_the_exact_inverse_of_ddim_in_second_order(
    move: Callable[[Step], tuple[Tensor, Tensor]], has_logarithm: bool
) -> None:
    """A step down from y_i with f(y_i, tau_i) ends where the step up began. The change of x0 is divided by tau_i, so
    that the step from i has an error of h^2 / i: h^2 log(1 / h) in all."""
    build, slope, end = SPACES["noise"]
    errors = []
    for steps in (16, 32, 64):
        tau = np.linspace(0, end, steps + 1)
        y = X0.double().numpy()
        for before, here in itertools.pairwise(tau):
            reached = y
            for _ in range(60):
                reached = y + (here - before) * slope(reached, here)
            y = reached
        got = walk(Ode.of(build(), X0, caption(2)), move, tau[1:, None].repeat(2, axis=1))[0][-1]
        apart = float(np.abs(got.double().numpy() - y).max())
        errors.append(apart / np.log(steps) if has_logarithm else apart)
    assert np.abs(halved(errors) - 2).max() < 0.3, errors


def ddim(step: Step) -> tuple[Tensor, Tensor]:
    y = step.euler(step.slope)
    return y, step.ode.slope(y, step.right)


@pytest.mark.parametrize("refine", [0, 3])
@pytest.mark.parametrize("denoiser", [noise_mixture(np.linspace(0.01, 8.0, 1000)), flow_mixture(1000)])
def test_a_rival_walks_the_path_that_the_product_walks(denoiser: Denoiser, refine: int) -> None:
    here, settings = world(denoiser), {"inverter": "ddim", "refine_start": refine}
    euler = Rival(move=ddim, calls_per_step=1, begins=1, evaluates=True)
    ours = here.visit(Method(settings=settings), 6, here.pair_ids)
    same = here.visit(Method(settings=settings, rival=euler), 6, here.pair_ids)
    assert (ours.timestep == same.timestep).all()
    assert ours.network_calls == same.network_calls == 7 + refine
    # A stored point is float16, and its rounding goes on with the path.
    torch.testing.assert_close(same.target, ours.target, rtol=0, atol=4e-3)
    torch.testing.assert_close(same.end, ours.end, rtol=0, atol=4e-3)


@pytest.mark.parametrize("denoiser", [noise_mixture(np.linspace(0.01, 8.0, 1000)), flow_mixture(1000)])
def test_the_products_fireflow_is_the_papers_between_records(denoiser: Denoiser) -> None:
    """One record, at the last of eight points: what leads there is the loop that was written from the released code."""
    identity = InverterIdentity(name="fireflow", grid_points=8, timestep_range=(875, 1000))
    x0 = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(5)).half()
    group, settings = Group(id="some", num_images=2), {"seed": 0, "timesteps_per_pair": 1}
    made = invert(denoiser, x0, [group], identity=identity, caption=caption(2), images_per_batch=2, **settings)
    path = build_path(identity, denoiser.levels, group_id="some", **settings)
    ode = Ode(denoiser=denoiser, x0=x0.float(), caption=caption(2))
    points = np.array([point.level for point in path.points])
    y = walk(ode, fireflow, ode.tau[points][:, None].repeat(2, axis=1))[0][-1]
    assert made.timestep.tolist() == [[points[-1]]]
    # x_t is the nearest float16 to what half a unit of its target leaves.
    torch.testing.assert_close(made.x_t[:, 0].float(), ode.scale[points[-1]] * y, rtol=2e-3, atol=2e-3)
    euler = walk(ode, lambda step: (step.euler(step.slope), step.slope), ode.tau[points][:, None].repeat(2, axis=1))
    assert float((made.x_t[:, 0].float() - ode.scale[points[-1]] * euler[0][-1]).abs().max()) > 0.02


@pytest.mark.parametrize("name", METHODS)
def test_a_method_spends_the_calls_that_it_is_given(name: str) -> None:
    here, method, calls = world(noise_mixture(np.linspace(0.01, 2.0, 1000)), pairs=1), METHODS[name], 14
    steps = method.grid_points(calls)
    spent = here.visit(method, steps, here.pair_ids).network_calls
    assert calls - 1 <= spent <= calls
    more = here.visit(method, steps + 1, here.pair_ids).network_calls
    assert more > calls
    if name in RIVALS and not RIVALS[name].evaluates:
        assert method.with_records(spent, steps) == spent + steps


@pytest.mark.parametrize("denoiser", [noise_mixture(np.linspace(0.01, 8.0, 400)), flow_mixture(400)])
def test_the_exact_ode_finds_targets_and_the_noise_of_drawn_images(denoiser: Denoiser) -> None:
    here = world(denoiser, pairs=1)
    slope = mixture_eps if denoiser.levels.space == "noise" else mixture_velocity
    targets, _ = exact_way(here)
    start = here.x0.double().numpy().ravel()
    for timestep in (3, 201, 399):
        tau = float(here.tau(np.array([timestep]))[0])
        y = solve_ivp(lambda at, y: slope(y, at), (1e-9, tau), start, rtol=1e-9, atol=1e-9).y[:, -1]
        np.testing.assert_allclose(targets[timestep].numpy().ravel(), (y - start) / tau, atol=0.02)
    known = draw(here)
    correlation, distance = known.likeness(known.back)
    assert correlation > 0.999
    assert distance < 0.05
    for steps in (3, 10):
        assert known.world.visit(METHODS["ddim"], steps, known.pair_ids(steps)).timestep[:, -1].tolist() == [399]
    crude = known.likeness(known.world.visit(METHODS["ddim"], 3, known.pair_ids(3)).end)
    assert crude[1] > 2 * distance


def test_tables_replace_what_is_between_their_marks_alone(tmp_path: Path) -> None:
    document = tmp_path / "page.md"
    document.write_text("above\n<!-- tables of base: how -->\nold\n<!-- end of base -->\nbelow\n")
    write_between(document, "base", "new | one")
    expected = "above\n<!-- tables of base: how -->\nnew | one\n<!-- end of base -->\nbelow\n"
    assert document.read_text() == expected
    with pytest.raises(SystemExit, match="no marks of flow"):
        write_between(document, "flow", "new")
    assert document.read_text() == expected
