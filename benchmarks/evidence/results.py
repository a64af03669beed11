"""The numbers of finished runs: Markdown tables, one JSON document, the plots."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from benchmarks.evidence.cell import Cell
from benchmarks.evidence.conditions import ANSWER, DPO, INPO, INPO_AB2, SCORERS, Run


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
    """Per scorer the win rate over the base and the mean difference of scores."""
    found = [read_comparison(run.images(prompts)) for run in runs]
    return {
        name: {
            "win_rate": over_seeds([each[name]["win_rate"] for each in found]),
            "gain": over_seeds([each[name]["mean_difference"] for each in found]),
        }
        for name in SCORERS
    }


def head_to_head(runs: Sequence[Run], folder: str) -> dict[str, Any]:
    """Per scorer the win rate over the other model with the same seed."""
    found = [read_scorers(run.folder / folder) for run in runs]
    return {name: over_seeds([each[name]["win_rate"] for each in found]) for name in SCORERS}


def interval(value: Mapping[str, Any], *, signed: bool = False) -> str:
    """`0.781 ± 0.012`, the half width of the 95% interval over seeds."""
    mean = f"{value['mean']:{'+' if signed else ''}.3f}"
    return mean if value["half"] is None else f"{mean} ± {value['half']:.3f}"


def hours(root: Path) -> dict[str, float]:
    """Hours that the jobs took, each one thread but the making of pairs, by kind of job."""
    kinds = {
        "pairs": root.glob("pairs/*.done"),
        "caches": root.glob("caches/*/*/*.done"),
        "grid": root.glob("runs/*/*/validation.done"),
        "tested runs": [*root.glob("base/*/*.done"), *root.glob("runs/*/*/test.done")],
        "comparisons": root.glob("runs/*/*/test-against-*.done"),
    }
    return {kind: round(sum(float(mark.read_text()) for mark in marks) / 3600, 3) for kind, marks in kinds.items()}


def row(runs: Sequence[Run], against: str) -> dict[str, Any]:
    """A row of a table: the setting, against the base, and against DPO where that was compared."""
    compared = all((run.folder / against / "comparison.json").exists() for run in runs)
    return {
        "learning_rate": runs[0].learning_rate,
        "strength": runs[0].strength,
        "steps": runs[0].steps,
        "seeds": [run.seed for run in runs],
        "base": against_base(runs, "test"),
        "dpo": head_to_head(runs, against) if compared else None,
    }


def is_alike(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    """Whether two rows have one setting."""
    return all(a[name] == b[name] for name in ("learning_rate", "strength", "steps"))


def merged(known: Mapping[str, Any], made: Mapping[str, Any]) -> dict[str, Any]:
    """A row of every seed of two rows of one setting; where both have a seed, as it was made."""
    values = _by_seed(known) | _by_seed(made)
    seeds = sorted({*known["seeds"], *made["seeds"]})

    def over(*names: str) -> dict[str, Any]:
        return over_seeds([values[*names, str(seed)] for seed in seeds])

    return {
        **made,
        "seeds": seeds,
        "base": {name: {kind: over(kind, name) for kind in each} for name, each in made["base"].items()},
        "dpo": {name: over("dpo", name) for name in made["dpo"]} if made["dpo"] and known["dpo"] else None,
    }


def difference(known: Mapping[str, Mapping[str, Any]], made: Mapping[str, Mapping[str, Any]]) -> str:
    """How far rows are from the document's of the same setting, seed by seed."""
    alike = {name: row for name, row in made.items() if name in known and is_alike(known[name], row)}
    apart = []
    for name, row in alike.items():
        here, there = _by_seed(row), _by_seed(known[name])
        apart += [abs(here[each] - there[each]) for each in here.keys() & there.keys()]
    told = f"{len(apart)} figures of the same seeds differ by {max(apart):g} at most" if apart else "no seed is in both"
    return f"{len(alike)} of {len(made)} rows are in the document; {told}."


def _by_seed(row: Mapping[str, Any]) -> dict[tuple[str, ...], float]:
    """{(what, scorer, seed): a figure of a row}."""
    values = {(kind, name): each[kind] for name, each in row["base"].items() for kind in each}
    values |= {("dpo", name): each for name, each in (row["dpo"] or {}).items()}
    return {
        (*names, str(seed)): value
        for names, each in values.items()
        for seed, value in zip(row["seeds"], each["seeds"], strict=True)
    }


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def rows_table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Against the base and against DPO, on test captions; of rows over several kinds of pairs these too."""
    head = ["rate", "beta x E_ref", "seeds", "wins over base: oracle", "held-out", "wins over DPO: oracle", "held-out"]
    kinds = ["pairs", "turned"] if any(" | " in name for name in rows) else []
    return table(
        ["", *kinds, *head, "gain: oracle", "held-out"],
        [
            [
                *_parts(name),
                f"{each['learning_rate']:g}",
                "-" if each["strength"] is None else f"{each['strength']:g}",
                str(len(each["seeds"])),
                *(interval(each["base"][scorer]["win_rate"]) for scorer in SCORERS),
                *(interval(each["dpo"][scorer]) if each["dpo"] else "-" for scorer in SCORERS),
                *(interval(each["base"][scorer]["gain"]) for scorer in SCORERS),
            ]
            for name, each in rows.items()
        ],
    )


def _parts(name: str) -> list[str]:
    """Of a row: the method, and where there are several the kind of pairs and the share of turned labels."""
    method, *kind = name.split(" | ")
    return [method, *(kind and [kind[0], f"{kind[1]}%"])]


def answer_table(rows: Mapping[str, Mapping[str, Any]], errors: Mapping[str, float]) -> str:
    """DPO's gains by kind of pairs and share of turned labels, and how far the other methods' are from others'.

    E_ref is that of drawn noise over the own pairs'; `errors` are mean reference errors by cache.
    """
    methods = {name.split(" | ")[0] for name in rows}
    followed = [each for each in ANSWER if each is not DPO and each.name in methods]
    against = {each.name: (INPO if each is INPO_AB2 else DPO).name for each in followed}
    short = [f"{name.removeprefix('InPO, ')} less {other}" for name, other in against.items()]
    lines = []
    for name, dpo in rows.items():
        method, pairs, turned = name.split(" | ")
        if method != DPO.name:
            continue
        kind = f"{pairs} | {turned}"
        distance = f"{errors[f'{pairs}/noise'] / errors['own/noise']:.2f}"
        both_rows = [(rows.get(f"{a} | {kind}"), rows.get(f"{b} | {kind}")) for a, b in against.items()]
        less = [difference_of_gains(a, b) if a and b else "-" for a, b in both_rows]
        lines.append([pairs, distance, f"{turned}%", gains(dpo), *less])
    return table(["pairs", "E_ref", "turned labels", "DPO", *short], lines)


def gains(row: Mapping[str, Any]) -> str:
    """Over the base by both scorers, `+0.239 ± 0.083 / +0.431 ± 0.368`."""
    return both(*(row["base"][scorer]["gain"]["seeds"] for scorer in SCORERS))


def difference_of_gains(row: Mapping[str, Any], less: Mapping[str, Any]) -> str:
    """Of two rows, by both scorers, over the seeds that both have."""
    seeds = [each for each in row["seeds"] if each in less["seeds"]]
    here, there = _by_seed(row), _by_seed(less)
    apart = [[here[name] - there[name] for name in (("gain", each, str(seed)) for seed in seeds)] for each in SCORERS]
    return both(*apart)


def both(oracle: Sequence[float], held_out: Sequence[float]) -> str:
    """Two means with their intervals and their signs."""
    return " / ".join(interval(over_seeds(values), signed=True) for values in (oracle, held_out))


def grid_table(grids: Mapping[str, Sequence[Cell]]) -> str:
    """Every cell of the grids on validation captions; the first of each is the chosen one."""
    head = ["", "rate", "beta x E_ref", "seeds", "gain, oracle", "over its standard error"]
    return table(
        [*head, "wins over base: oracle", "held-out"],
        [
            [
                f"**{name}**" if number == 0 else name,
                f"{cell.learning_rate:g}",
                "-" if cell.strength is None else f"{cell.strength:g}",
                str(cell.seeds),
                f"{cell.improvement:+.3f}",
                f"{cell.sureness:.1f}",
                *(f"{rate:.3f}" for rate in cell.win_rates),
            ]
            for name, cells in grids.items()
            for number, cell in enumerate(cells)
        ],
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
