"""`python -m benchmarks.objectives`: every objective's value and gradient at the reference and far from it, as a table
and a picture (docs/objectives.md). Closed forms on a CPU, nothing is measured.
"""

import argparse
from collections.abc import Mapping
from pathlib import Path

import matplotlib
import torch

from inpo.train.losses import Lists
from inpo.train.objectives import OBJECTIVES, Objective
from inpo.train.settings import ObjectiveName

NUM_VALUES = 4 * 64 * 64
"""A latent of SD1.5 at 512 px."""
REFERENCE = 0.1
RUN_AWAY = 0.01
LABEL = 0.7
"""P(win preferred) for objectives that read it as a number."""
POINTS: Mapping[str, tuple[float, float]] = {
    "at the reference": (0.0, 0.0),
    "lose runs away": (0.0, RUN_AWAY),
    "both run away": (RUN_AWAY, 2 * RUN_AWAY),
    "told wrong": (RUN_AWAY, 0.0),
}
"""How much worse than the reference's both errors are: win, lose."""


def value_and_gradient(objective: Objective, worse: tuple[float, float]) -> tuple[float, float, float]:
    """(loss, dL / dE_win, dL / dE_lose) of a pair whose reference errors are 0.1, at the objective's own beta."""
    reference = torch.full((1, 2), REFERENCE, dtype=torch.float64)
    error = (reference + torch.tensor([worse], dtype=torch.float64)).requires_grad_()
    label: torch.Tensor | Lists = torch.tensor([LABEL if objective.labels != "hard" else 1.0], dtype=torch.float64)
    if objective.lists:
        half = torch.tensor([[LABEL - 0.5, 0.5 - LABEL]], dtype=torch.float64)
        above = torch.tensor([[[False, True], [False, False]]])
        label = Lists(above=above, advantage=half, there=torch.ones(1, 2, dtype=torch.bool))
    loss = objective.function(error, reference, label, objective.beta, num_values=NUM_VALUES).loss.sum()
    (gradient,) = torch.autograd.grad(loss, error)
    win, lose = gradient[0].tolist()
    return float(loss.detach()), win, lose


def shown(value: float) -> str:
    """Three digits, or all before the point; what is nothing beside them is 0."""
    if abs(value) < 5e-5:
        return "0"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def row(name: ObjectiveName) -> str:
    """One line of the table."""
    cells = [f"`{name}`"]
    for number, worse in enumerate(POINTS.values()):
        loss, win, lose = value_and_gradient(OBJECTIVES[name], worse)
        cells += [shown(loss)] if number == 0 else []
        cells.append(f"{shown(win)}, {shown(lose)}")
    return f"| {' | '.join(cells)} |"


def table() -> str:
    """The whole table, in Markdown."""
    first, *rest = POINTS
    lines = [f"| `--objective` | loss {first} | {' | '.join((first, *rest))} |", "|---" * (2 + len(POINTS)) + "|"]
    return "\n".join([*lines, *map(row, OBJECTIVES)])


def plot(path: Path) -> None:
    """What each objective does to win and lose as the lose side runs away, as shares of its gradient at the start."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(12, 4.2), layout="constrained", sharey=True)
    worse = torch.linspace(-0.006, RUN_AWAY, 81, dtype=torch.float64).tolist()
    alike = {"dpo", "inversion_dpo", "snpo", "listwise", "sft"}
    names = [name for name in OBJECTIVES if name not in alike]
    for number, name in enumerate(names):
        at_start = value_and_gradient(OBJECTIVES[name], (0.0, 0.0))[1]
        values = [value_and_gradient(OBJECTIVES[name], (0.0, each)) for each in worse]
        style = ("-", "--", ":")[number // 5]
        panels[0].plot(worse, [each[1] / at_start for each in values], style, label=name)
        panels[1].plot(worse, [-each[2] / at_start for each in values], style, label=name)
    for panel, title in zip(panels, ("pull on the win", "push on the lose side"), strict=True):
        panel.set(xlabel="lose side worse than the reference by (error)", title=title, ylim=(-1, 2.2))
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("share of the pull on the win at the start")
    panels[1].legend(fontsize=8, ncols=2)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Objectives at the reference and far from it.")
    parser.add_argument("--out", type=Path, default=Path("docs/images/objectives.png"))
    chosen = parser.parse_args(arguments)
    print(table())
    plot(chosen.out)


if __name__ == "__main__":
    main()
