"""The numbers of finished runs: Markdown tables, one JSON document, the plots."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from benchmarks.evidence.conditions import SCORERS, Run

BINS = 5


def read_comparison(images: Path) -> dict[str, Any]:
    """Statistics by scorer of a folder of images against the base's."""
    return read_scorers(images.with_name(f"{images.name}-compare"))


def read_scorers(folder: Path) -> dict[str, Any]:
    """Statistics by scorer as `inpo evaluate compare --out` left them."""
    return json.loads((folder / "comparison.json").read_text())["scorers"]


def over_seeds(values: Sequence[float]) -> dict[str, Any]:
    """Mean over seeds with its 95% t-interval; the seeds' own values."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return {"mean": mean, "half": None, "seeds": list(values)}
    half = float(stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / math.sqrt(len(values)))
    return {"mean": mean, "half": half, "seeds": list(values)}


def against_base(runs: Sequence[Run], prompts: str) -> dict[str, Any]:
    """Per scorer the win rate over the base and the mean score."""
    found = [read_comparison(run.images(prompts)) for run in runs]
    return {
        name: {
            "win_rate": over_seeds([each[name]["win_rate"] for each in found]),
            "mean_score": over_seeds([each[name]["mean_b"] for each in found]),
        }
        for name in SCORERS
    }


def head_to_head(runs: Sequence[Run], folder: str) -> dict[str, Any]:
    """Per scorer the win rate over the other model with the same seed."""
    found = [read_scorers(run.folder / folder) for run in runs]
    return {name: over_seeds([each[name]["win_rate"] for each in found]) for name in SCORERS}


def accuracies(runs: Sequence[Run]) -> dict[str, list[float]]:
    """Implicit accuracy by timestep bin, in training (the last half) and on held-out pairs at the end; means of
    seeds.
    """
    training, held_out = np.zeros((len(runs), BINS)), np.zeros((len(runs), BINS))
    for row, run in enumerate(runs):
        lines = [json.loads(line) for line in (run.folder / "train" / "metrics.jsonl").read_text().splitlines()]
        lines = [line for line in lines if line["step"] <= run.steps]
        late = [line["by_timestep"] for line in lines if line["step"] > run.steps / 2 and "by_timestep" in line]
        weight = np.array([[part["records"] for part in line] for line in late], float)
        right = np.array([[part["implicit_accuracy"] for part in line] for line in late], float)
        training[row] = np.nansum(weight * right, 0) / weight.sum(0)
        last = [line for line in lines if "held_out_by_timestep" in line][-1]
        held_out[row] = [part["implicit_accuracy"] for part in last["held_out_by_timestep"]]
    return {"training": training.mean(0).tolist(), "held_out": held_out.mean(0).tolist()}


def interval(value: Mapping[str, Any], digits: int = 3) -> str:
    """`0.781 ± 0.012`, the half width of the 95% interval over seeds."""
    if value["half"] is None:
        return f"{value['mean']:.{digits}f}"
    return f"{value['mean']:.{digits}f} ± {value['half']:.{digits}f}"


def drift(root: Path) -> dict[str, Any] | None:
    """What `inpo inspect drift --json` printed, if it ran, with paths as seen from here."""
    log = root / "drift.log"
    if not log.exists():
        return None
    text = log.read_text().replace(f"{Path.cwd()}/", "")
    return json.loads(text[text.index("{") :])


def hours(root: Path) -> dict[str, float]:
    """Hours that the jobs took, each one thread but the making of pairs, by kind of job."""
    kinds = {
        "pairs": [root / "pairs.done"],
        "caches": sorted((root / "caches").glob("*/*.done")),
        "grid": sorted((root / "runs").glob("*/validation.done")),
        "other runs": [*(root / "base").glob("*/*.done"), *(root / "runs").glob("*/test.done")],
        "comparisons": [root / "drift.done", *(root / "runs").glob("*/test-against-*.done")],
    }
    return {
        kind: round(sum(float(mark.read_text()) for mark in marks if mark.exists()) / 3600, 3)
        for kind, marks in kinds.items()
    }


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def main_table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Methods against the base and against Diffusion-DPO, on test captions."""
    return table(
        [
            "method",
            "lr",
            "beta",
            "wins over base: oracle",
            "held-out",
            "wins over DPO: oracle",
            "held-out",
            "mean oracle",
            "mean held-out",
        ],
        [
            [
                name,
                f"{row['learning_rate']:g}",
                "-" if row["beta"] is None else f"{row['beta']:g}",
                *(interval(row["base"][scorer]["win_rate"]) for scorer in SCORERS),
                *(interval(row["dpo"][scorer]) if row["dpo"] else "-" for scorer in SCORERS),
                *(interval(row["base"][scorer]["mean_score"]) for scorer in SCORERS),
            ]
            for name, row in rows.items()
        ],
    )


def variation_table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """InPO's variations against the base and against noise at every point, all with one setting, on test captions."""
    return table(
        [
            "variation",
            "seeds",
            "wins over base: oracle",
            "held-out",
            "wins over only noise: oracle",
            "held-out",
            "mean oracle",
            "mean held-out",
        ],
        [
            [
                name,
                str(len(row["base"][SCORERS[0]]["win_rate"]["seeds"])),
                *(interval(row["base"][scorer]["win_rate"]) for scorer in SCORERS),
                *(interval(row["noise"][scorer]) if row["noise"] else "-" for scorer in SCORERS),
                *(interval(row["base"][scorer]["mean_score"]) for scorer in SCORERS),
            ]
            for name, row in rows.items()
        ],
    )


def accuracy_table(rows: Mapping[str, Mapping[str, list[float]]]) -> str:
    """Training and held-out accuracy by fifths of the timesteps."""
    return table(
        ["method", "pairs", *(f"t {200 * part} to {200 * part + 199}" for part in range(BINS))],
        [
            [name, kind, *(f"{value:.2f}" for value in row[key])]
            for name, row in rows.items()
            for key, kind in (("training", "in training"), ("held_out", "held out"))
        ],
    )


def grid_table(choices: Mapping[str, Mapping[str, Any]]) -> str:
    """Every cell of the grid on validation captions, the chosen one bold."""
    rows = []
    for name, choice in choices.items():
        for cell in choice["grid"]:
            best = (cell["learning_rate"], cell["beta"]) == (choice["learning_rate"], choice["beta"])
            numbers = [f"{cell[scorer]:.3f}" for scorer in SCORERS]
            beta = "-" if cell["beta"] is None else f"{cell['beta']:g}"
            row = [
                name,
                f"{cell['learning_rate']:g}",
                beta,
                f"{cell['improvement']:+.3f}",
                f"{cell['sureness']:.1f}",
                *numbers,
            ]
            rows.append([f"**{each}**" if best else each for each in row])
    return table(
        [
            "method",
            "lr",
            "beta",
            "mean improvement, oracle",
            "over its standard error",
            "wins over base: oracle",
            "held-out",
        ],
        rows,
    )


def draw_wins(rows: Mapping[str, Mapping[str, Any]], path: Path, *, title: str) -> None:
    """Win rates over the base with their intervals, both scorers, one line per method."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 0.42 * len(rows) + 1.2), layout="constrained")
    places = np.arange(len(rows))[::-1]
    for scorer, shift, colour in zip(SCORERS, (0.13, -0.13), ("#2a5db0", "#d9822b"), strict=True):
        values = [row["base"][scorer]["win_rate"] for row in rows.values()]
        axes.errorbar(
            [value["mean"] for value in values],
            places + shift,
            xerr=[value["half"] or 0.0 for value in values],
            fmt="o",
            color=colour,
            capsize=3,
            markersize=5,
            linewidth=1.5,
            label=scorer.removeprefix("toyworld-"),
        )
    axes.axvline(0.5, color="0.6", linewidth=1)
    axes.set_yticks(places, list(rows))
    axes.set_xlabel("share of captions on which it beats the base")
    axes.set_title(title, loc="left", fontsize=10)
    figure.legend(frameon=False, loc="outside upper right", ncols=2, fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=140, facecolor="white")
    pyplot.close(figure)
