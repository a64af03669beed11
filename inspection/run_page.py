"""`inpo inspect run`: one self-contained HTML page of one or several training runs, side by side."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from inpo.common.errors import command
from inpo.common.judge import Evaluation
from inpo.common.pages import data_uri
from inpo.inspection.pages import render
from inpo.inspection.plots import Figure, Series, curves
from inpo.inspection.run_folder import (
    FoundComparison,
    RunFolder,
    SampleStrip,
    as_number,
    read_comparison,
    read_runs,
    sweep_notes,
)
from inpo.inspection.run_signs import SIGNS, RunWarning, warnings_of
from inpo.inspection.words import number

_NUM_COLOURS = 8
_CELL, _PICTURE = 384, 1600
"""Most pixels of a side of a sample, and of a comparison's picture."""
_SHARED = (
    ("Loss", "loss", None),
    ("Held-out loss", "held_out_loss", None),
    ("Accuracy", "implicit_accuracy", 0.5),
    ("Held-out accuracy", "held_out_implicit_accuracy", 0.5),
    ("Margin", "margin", 0.0),
    ("Held-out margin", "held_out_margin", 0.0),
    ("Gradient norm", "gradient_norm", None),
    ("Learning rate", "learning_rate", None),
)
"""(title, metric, level of a dashed line) of the plots that hold all runs."""
_BY_TIMESTEP = (
    ("Accuracy by timestep", "implicit_accuracy", 0.5),
    ("Win advantage by timestep", "win_advantage", 0.0),
    ("Lose advantage by timestep", "lose_advantage", 0.0),
)
_CAPTIONS = {
    "loss": "Before any update: that of the reference.",
    "implicit_accuracy": "Share of records whose win is told from the lose better than by the reference.",
    "held_out_implicit_accuracy": "On prompts that are never trained on, with one standard error.",
    "gradient_norm": "Before clipping.",
}
_TABLE = (
    ("loss", "loss"),
    ("accuracy", "implicit_accuracy"),
    ("margin", "margin"),
    ("win advantage", "win_advantage"),
    ("lose advantage", "lose_advantage"),
    ("held-out loss", "held_out_loss"),
    ("held-out win advantage", "held_out_win_advantage"),
    ("held-out lose advantage", "held_out_lose_advantage"),
    ("gradient norm", "gradient_norm"),
    ("records a second", "pairs_per_second"),
    ("epoch", "epoch"),
)


@dataclass(frozen=True, kw_only=True)
class RunView:
    """A run's own part of the page."""

    name: str
    style: str
    path: Path
    facts: str
    warnings: list[RunWarning]
    figures: list[Figure]
    grid: list[tuple[int, list[str]]]
    """(step, pictures), the first step on top."""
    prompts: tuple[str, ...]
    grid_note: str
    comparisons: list[dict[str, Any]]
    notes: list[str]


def make_run_page(paths: Sequence[Path], compared: Sequence[Path] = ()) -> tuple[str, list[RunFolder]]:
    """(the page, the runs on it). What a run lacks is said on the page. `compared`: folders of `evaluate compare` to
    show besides. Raises what `read_runs` and `read_comparison` do.
    """
    shown = [_comparison(read_comparison(each)) for each in compared]
    runs, named = read_runs(paths), {each.resolve() for each in compared}
    views = [_view(run, f"s{place % _NUM_COLOURS}", named) for place, run in enumerate(runs)]
    names = dict.fromkeys(name for run in runs for name in run.chosen)
    page = render(
        "run.html",
        title=", ".join(view.name for view in views),
        views=views,
        signs=SIGNS,
        num_signs=len(SIGNS),
        table=_table(runs, views),
        shared=_shared_figures(runs),
        last=_last_samples(runs),
        compared=shown,
        notes=[note for path in paths for note in sweep_notes(path)],
        settings=[(name, _values(name, runs)) for name in names],
        defaults=[
            (name, _values(name, runs))
            for name in dict.fromkeys(name for run in runs for name in run.defaults)
            if name not in names
        ],
        command=command("inspect", "run", *paths),
    )
    return page, runs


def _view(run: RunFolder, style: str, named: Collection[Path]) -> RunView:
    """`named`: comparisons that the page shows already."""
    steps = run.chosen.get("train.steps", run.defaults.get("train.steps"))
    facts = [f"step {run.last_step:,}" + (f" of {steps:,}" if isinstance(steps, int) else "")]
    facts.append(str(run.chosen.get("train.objective", run.defaults.get("train.objective", ""))))
    # A run that goes on beyond its first end has the result of that end.
    written = " and ".join(f"{name}/" for name in ("pipeline", "lora") if (run.path / name).is_dir())
    facts.append(f"its result: {written}" if written else "not finished: neither pipeline/ nor lora/ is there")
    prompts, grid = _grid(run.samples)
    return RunView(
        name=run.name,
        style=style,
        path=run.path,
        facts=" · ".join(fact for fact in facts if fact),
        warnings=warnings_of(run.metrics),
        figures=_own_figures(run),
        grid=grid,
        prompts=prompts,
        grid_note=_grid_note(run, prompts),
        comparisons=[_comparison(each) for each in run.comparisons if each.folder.resolve() not in named],
        notes=run.notes,
    )


def _grid(samples: Sequence[SampleStrip]) -> tuple[tuple[str, ...], list[tuple[int, list[str]]]]:
    """(prompts, rows): a column for each prompt that any step has; a step without it has an empty cell."""
    prompts = tuple(dict.fromkeys(prompt for strip in samples for prompt in strip.prompts or ("",)))
    rows = []
    for strip in samples:
        here = dict(zip(strip.prompts or ("",), strip.images, strict=True))
        rows.append((strip.step, [_cell(here.get(prompt)) for prompt in prompts]))
    return prompts, rows


def _cell(image: Image.Image | None) -> str:
    if image is None:
        return ""
    shown = image.copy()
    shown.thumbnail((_CELL, _CELL), Image.Resampling.LANCZOS)
    return data_uri(shown)


def _grid_note(run: RunFolder, prompts: Sequence[str]) -> str:
    notes = []
    if len(run.samples) < run.num_strips:
        notes.append(f"{len(run.samples)} of {run.num_strips} steps are shown, evenly spread.")
    if "" in prompts and any(not strip.prompts for strip in run.samples):
        notes.append("These files do not name their prompts, so that a step's images stand in one strip.")
    if run.samples and run.samples[0].step > 0:
        notes.append("There is no sample of step 0, from before training.")
    return " ".join(notes)


def _own_figures(run: RunFolder) -> list[Figure]:
    """Both advantages, and what there is by timestep."""
    found = [
        _figure(title, [_series(run, metric, name, name) for name, metric in metrics], "advantage", 0.0)
        for title, metrics in (
            ("Advantages", (("win", "win_advantage"), ("lose", "lose_advantage"))),
            ("Held-out advantages", (("win", "held_out_win_advantage"), ("lose", "held_out_lose_advantage"))),
        )
    ]
    bins = sorted({part["timesteps"] for line in run.metrics for part in line.get("by_timestep", [])})
    for title, metric, level in _BY_TIMESTEP:
        series = [
            Series(
                name=f"{low:.0f} to {high - 1:.0f}",
                style=f"t{place * 5 // max(len(bins), 1)}",
                points=[
                    (float(line["step"]), part.get(metric))
                    for line in run.metrics
                    for part in line.get("by_timestep", [])
                    if part["timesteps"] == (low, high)
                ],
            )
            for place, (low, high) in enumerate(bins)
        ]
        found.append(_figure(title, series, title.lower().removesuffix(" by timestep"), level))
    return [each for each in found if each is not None]


def _shared_figures(runs: Sequence[RunFolder]) -> list[Figure]:
    found = []
    for title, metric, level in _SHARED:
        series = [_series(run, metric, run.name, f"s{place % _NUM_COLOURS}") for place, run in enumerate(runs)]
        found.append(_figure(title, series, title.lower(), level, _CAPTIONS.get(metric, "")))
    return [each for each in found if each is not None]


def _series(run: RunFolder, metric: str, name: str, style: str) -> Series:
    if metric == "held_out_implicit_accuracy":
        found = [each for line in run.metrics if (each := Evaluation.of(line)) is not None]
        points = [(float(each.step), each.accuracy) for each in found]
        return Series(name=name, style=style, points=points, half_widths=[each.standard_error for each in found])
    # The line before any update has no gradient.
    lines = [line for line in run.metrics if line["step"] > 0 or metric != "gradient_norm"]
    return Series(
        name=name, style=style, points=[(float(line["step"]), line[metric]) for line in lines if metric in line]
    )


def _figure(
    title: str, series: Sequence[Series], y_label: str, level: float | None, caption: str = ""
) -> Figure | None:
    plot = curves(series, x_label="step", y_label=y_label, mark=level)
    return None if plot is None else Figure(title=title, plot=plot, caption=caption)


def _table(runs: Sequence[RunFolder], views: Sequence[RunView]) -> list[tuple[str, list[str]]]:
    """Rows of the last numbers, a column for each run."""
    last = [_last_values(run) for run in runs]
    evaluations = [[each for line in run.metrics if (each := Evaluation.of(line)) is not None] for run in runs]
    rows = [("step", [f"{run.last_step:,}" for run in runs])]
    rows += [(title, [number(each.get(metric)) for each in last]) for title, metric in _TABLE]
    rows.append(
        (
            "held-out accuracy",
            [f"{each[-1].accuracy:.3f} ± {each[-1].standard_error:.3f}" if each else "-" for each in evaluations],
        )
    )
    rows.append(("warnings", [str(len(view.warnings)) for view in views]))
    return [row for row in rows if any(value != "-" for value in row[1])]


def _last_values(run: RunFolder) -> dict[str, float]:
    """The last number of each metric."""
    return {name: value for line in run.metrics for name, value in line.items() if isinstance(value, float)}


def _last_samples(runs: Sequence[RunFolder]) -> list[tuple[str, list[str]]]:
    """(prompt, pictures): the first run's first sample, and each run's last one, for prompts that several runs have."""
    if len(runs) < 2 or not runs[0].samples:
        return []
    strips = [runs[0].samples[0], *(run.samples[-1] if run.samples else None for run in runs)]
    found = [{} if strip is None else dict(zip(strip.prompts, strip.images, strict=False)) for strip in strips]
    shared = [prompt for prompt in found[0] if sum(prompt in each for each in found[1:]) > 1]
    return [(prompt, [_cell(each.get(prompt)) for each in found]) for prompt in shared]


def _values(name: str, runs: Sequence[RunFolder]) -> list[str]:
    found = []
    for run in runs:
        value = run.chosen.get(name, run.defaults.get(name))
        found.append("-" if value is None else ", ".join(map(str, value)) if isinstance(value, list) else str(value))
    return found


def _comparison(found: FoundComparison) -> dict[str, Any]:
    """The table of a comparison: whatever of it is as `evaluate compare` writes it, of B and of the folders behind."""
    others = found.document.get("others")
    documents = [
        found.document,
        *(each for each in (others if isinstance(others, list) else []) if isinstance(each, dict)),
    ]
    letters = [str(each.get("letter") or "?") for each in documents]
    names = [("A", _side_name(found.document, "a"))]
    names += [(letter, _side_name(each, "b")) for letter, each in zip(letters, documents, strict=True)]
    notes = [note for each in documents if isinstance(each.get("notes"), list) for note in map(str, each["notes"])]
    picture = None
    if found.picture is not None:
        picture = found.picture.copy()
        picture.thumbnail((_PICTURE, _PICTURE), Image.Resampling.LANCZOS)
    return {
        "folder": found.folder,
        "names": ", ".join(f"{letter}: {name}" for letter, name in names),
        "rows": [row for letter, each in zip(letters, documents, strict=True) for row in _scorer_rows(letter, each)],
        "notes": list(dict.fromkeys(notes)),
        "picture": "" if picture is None else data_uri(picture),
    }


def _side_name(document: dict[str, Any], side: str) -> str:
    told = document.get(side)
    return str(told.get("name", "?")) if isinstance(told, dict) else "?"


def _scorer_rows(letter: str, document: dict[str, Any]) -> list[list[str]]:
    """Scorer, model, and what the scorer says of it against A."""
    scorers, rows = document.get("scorers"), []
    for name, told in scorers.items() if isinstance(scorers, dict) else ():
        if isinstance(told, dict):
            interval = told.get("win_rate_interval")
            ends = interval if isinstance(interval, list) and len(interval) == 2 else [None, None]
            rows.append(
                [
                    str(name),
                    letter,
                    _word(told.get("num_pairs")),
                    _word(told.get("win_rate")),
                    f"{_word(ends[0])} to {_word(ends[1])}",
                    _word(told.get("mean_a")),
                    _word(told.get("mean_b")),
                    str(told.get("verdict") or "-").replace("B", letter, 1),
                ]
            )
    return rows


def _word(value: Any) -> str:
    return number(as_number(value))
