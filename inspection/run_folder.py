"""What a run left in its folder, read for showing: whatever can be read, and in words what is missing or cannot."""

import io
import json
import math
import tomllib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from inpo.common.durable import storage_errors
from inpo.common.errors import DataError, InpoError, UsageError, command
from inpo.common.pairs import ImageError, decode_image
from inpo.common.paths import short_names
from inpo.common.recipe import split_toml
from inpo.common.text import read_text

RECIPE, METRICS, SWEEP = "recipe.toml", "metrics.jsonl", "sweep.json"
MOST_STEPS, MOST_PROMPTS = 12, 16
"""Of a run's samples that are read: more are spread evenly, the first and the last among them."""


@dataclass(frozen=True, kw_only=True)
class SampleStrip:
    """The samples of one step, from left to right. `prompts`: empty if the file does not name them; then the strip is
    one image."""

    step: int
    prompts: tuple[str, ...]
    images: tuple[Image.Image, ...]


@dataclass(frozen=True, kw_only=True)
class FoundComparison:
    """What `inpo evaluate compare` wrote."""

    folder: Path
    document: dict[str, Any]
    picture: Image.Image | None


@dataclass(frozen=True, kw_only=True)
class RunFolder:
    """A run, as far as its folder tells."""

    path: Path
    name: str
    """The shortest that tells it from the page's other runs."""
    metrics: list[dict[str, Any]]
    """Lines with a step; a number that is none or not finite is None."""
    chosen: dict[str, Any]
    """{section.setting: value} of what is not a default; everything, if the recipe does not say what is."""
    defaults: dict[str, Any]
    samples: list[SampleStrip]
    num_strips: int
    """Steps that have samples, shown or not."""
    comparisons: list[FoundComparison]
    notes: list[str]
    """What is not there, or cannot be read."""

    @property
    def last_step(self) -> int:
        return self.metrics[-1]["step"] if self.metrics else 0


def read_runs(paths: Sequence[Path]) -> list[RunFolder]:
    """Read each run; a sweep's folder stands for its runs.

    Raises DataError for a folder that is not a run's, UsageError for one that is given twice.
    """
    with storage_errors("read the run", ", ".join(map(str, paths))):
        folders = [folder for path in paths for folder in _runs_of(path)]
    again = [folder for folder, count in Counter(each.resolve() for each in folders).items() if count > 1]
    if again:
        raise UsageError("A run is given twice.", where="RUN", got=again[0], fix="name each run once")
    return [_read_run(folder, name) for folder, name in zip(folders, short_names(folders), strict=True)]


def sweep_notes(path: Path) -> list[str]:
    """What a sweep's own table says beside its runs: which failed, which runs of its folder are not its own, and what
    scorers say of the samples."""
    try:
        rows = _rows(path)
    except (OSError, ValueError, RecursionError) as error:
        return [f"{SWEEP} cannot be read: {error}"]
    replaced = _left_by_another(path)
    notes = []
    for row in rows:
        if row.get("failed"):
            notes.append(f"{row.get('name')} failed: {row['failed']}")
            if row.get("name") in replaced:
                notes.append(f"{row['name']}/ holds an earlier run's numbers, which are not shown.")
        scores = row.get("scores")
        for scorer, told in scores.items() if isinstance(scores, dict) else ():
            rate = as_number(told.get("win_rate")) if isinstance(told, dict) else None
            if rate is not None:
                notes.append(
                    f"{row.get('name')}: {scorer} prefers its last samples to the reference's at {rate:.2f} of "
                    f"{told.get('num_prompts')} prompts"
                )
    listed = {row.get("name") for row in rows}
    others = [each.name for each in sorted(path.iterdir()) if rows and each.name not in listed and _is_run(each)]
    if others:
        notes.append(f"Not in {SWEEP}, and so of another sweep or of one that goes on: {', '.join(others)}.")
    return notes


def _rows(path: Path) -> list[dict[str, Any]]:
    """A sweep's table; [] if there is none. Raises ValueError for what is no table."""
    try:
        rows = json.loads((path / SWEEP).read_bytes())
    except FileNotFoundError:
        return []
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError("not a list of runs")
    return rows


def _left_by_another(path: Path) -> set[str]:
    """The names of the sweep's runs that failed before they wrote a number, with numbers in their folders."""
    try:
        failed = [row.get("name") for row in _rows(path) if row.get("failed") and not row.get("last")]
    except (OSError, ValueError, RecursionError):  # which is told on the page
        return set()
    return {name for name in failed if isinstance(name, str) and (path / name / METRICS).is_file()}


def _runs_of(path: Path) -> Iterator[Path]:
    """The run's folder, or those of a sweep. Raises DataError if it is neither."""
    if (path / SWEEP).is_file():
        below, replaced = [each for each in sorted(path.iterdir()) if _is_run(each)], _left_by_another(path)
        if shown := [each for each in below if each.name not in replaced]:
            yield from shown
            return
        if below:
            raise DataError(
                "Every run of this sweep failed before its first numbers.",
                where=path / SWEEP,
                got=f"numbers of earlier runs in {', '.join(each.name for each in below)}",
                fix=f"sweep.md says why; `{command('inspect', 'run', *below)}` shows those runs",
            )
    if not _is_run(path):
        there = sorted(entry.name for entry in path.iterdir())[:8] if path.is_dir() else []
        runs = [name for name in there if _is_run(path / name)]
        fix = "name the --output of `inpo train`"
        if (path / "manifest.json").is_file():
            fix = f"it is a cache: `{command('inspect', 'report', path)}` shows it"
        elif runs:
            fix = f"`{command('inspect', 'run', *(path / name for name in runs))}`"
        raise DataError(
            "This is not the folder of a run.",
            where=path,
            expected=f"{RECIPE} and {METRICS}, as `inpo train --output` leaves them",
            got=(", ".join(there) or "an empty folder") if path.is_dir() else "no folder",
            fix=fix,
        )
    yield path


def _is_run(path: Path) -> bool:
    # A cache and a folder of images have neither.
    return (path / METRICS).is_file() or ((path / RECIPE).is_file() and not (path / "manifest.json").is_file())


def _read_run(path: Path, name: str) -> RunFolder:
    notes: list[str] = []
    chosen, defaults = _settings(path / RECIPE, notes)
    prompts = chosen.get("train.sample_prompts", [])
    samples, num_strips = _samples(path / "samples", prompts if isinstance(prompts, list) else [], notes)
    return RunFolder(
        path=path,
        name=name,
        metrics=_metrics(path / METRICS, notes),
        chosen=chosen,
        defaults=defaults,
        samples=samples,
        num_strips=num_strips,
        comparisons=_comparisons(path, notes),
        notes=notes,
    )


def _metrics(file: Path, notes: list[str]) -> list[dict[str, Any]]:
    try:
        lines = file.read_bytes().decode("utf-8", "replace").splitlines()
    except OSError as error:
        notes.append(f"{METRICS}: {error.strerror}. There are no curves: the run has not come to its first step.")
        return []
    found = [_line(line) for line in lines if line.strip()]
    rows = sorted((row for row in found if row is not None), key=lambda row: row["step"])
    if len(rows) < len(found):
        notes.append(f"{METRICS}: {len(found) - len(rows)} of {len(found)} lines cannot be read, and are left out.")
    if not rows:
        notes.append(f"{METRICS}: no line can be read. There are no curves.")
    return rows


def _line(text: str) -> dict[str, Any] | None:
    """A line of metrics; None for one that a killed run left half written."""
    try:
        row = json.loads(text)
    except (ValueError, RecursionError):
        return None
    step = as_number(row.get("step")) if isinstance(row, dict) else None
    if step is None or not 0 <= step < 1e15:
        return None
    clean: dict[str, Any] = {}
    for name, value in row.items():
        if not name.endswith("by_timestep"):
            found = as_number(value)
            is_share = found is None or 0 <= found <= 1 or not name.endswith("accuracy")
            clean[name] = found if is_share else None
        elif isinstance(value, list):
            clean[name] = [part for each in value if (part := _bin(each)) is not None]
    return clean | {"step": int(step)}


def _bin(value: Any) -> dict[str, Any] | None:
    """The metrics of a range of timesteps."""
    if not isinstance(value, dict) or not isinstance(value.get("timesteps"), list):
        return None
    ends = [as_number(end) for end in value["timesteps"]]
    records = as_number(value.get("records"))
    if len(ends) != 2 or None in ends or records is None or records < 1:
        return None
    numbers = {name: as_number(each) for name, each in value.items() if name != "timesteps"}
    return numbers | {"timesteps": (ends[0], ends[1]), "records": int(records)}


def as_number(value: Any) -> float | None:
    """A number of a document; None for what is none, or not finite."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:  # an integer beyond what a float holds
        return None


def _settings(file: Path, notes: list[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    try:
        text = read_text(file, what="The configuration cannot be read.", error=DataError)
        try:
            chosen, defaults = split_toml(text)
        except tomllib.TOMLDecodeError:  # no file of train's own: a setting may take several lines
            chosen, defaults = tomllib.loads(text), {}
    except (InpoError, tomllib.TOMLDecodeError, RecursionError) as error:
        got = error.got if isinstance(error, InpoError) else error
        notes.append(f"{RECIPE}: {got}. The configuration is not known.")
        return {}, {}
    if not any(defaults.values()):
        notes.append(f"{RECIPE} does not say what is a default: all settings are shown.")
    return _flat(chosen), _flat(defaults)


def _flat(sections: dict[str, Any]) -> dict[str, Any]:
    return {
        f"{section}.{name}": value
        for section, values in sections.items()
        if isinstance(values, dict)
        for name, value in values.items()
    }


def _samples(folder: Path, prompts: list[Any], notes: list[str]) -> tuple[list[SampleStrip], int]:
    files = {}
    for file in folder.glob("step-*.png"):
        step = file.stem.removeprefix("step-")
        if step.isascii() and step.isdigit():
            files[int(step)] = file
    if not files:
        notes.append("No samples: `inpo train --sample-every N` draws them, from step 0 on.")
        return [], 0
    steps = sorted(files)
    places = np.unique(np.linspace(0, len(steps) - 1, min(len(steps), MOST_STEPS)).round().astype(int))
    strips = []
    for step in (steps[place] for place in places.tolist()):
        try:
            strips.append(_strip(files[step], step, prompts))
        except (OSError, ImageError) as error:
            notes.append(f"samples/{files[step].name} cannot be read: {error}")
    return strips, len(steps)


def _strip(file: Path, step: int, prompts: list[Any]) -> SampleStrip:
    data = file.read_bytes()
    image = decode_image(data)
    try:
        with Image.open(io.BytesIO(data)) as header:
            named = json.loads(header.info["prompts"])
    except Exception:  # none are named, or decoders failed on hostile bytes, which they do with any exception
        named = prompts
    if not named or not isinstance(named, list) or image.width % len(named):
        return SampleStrip(step=step, prompts=(), images=(image,))
    width = image.width // len(named)
    shown = [str(prompt) for prompt in named][:MOST_PROMPTS]
    # A prompt that is asked for twice has two columns.
    again = [shown[:place].count(prompt) for place, prompt in enumerate(shown)]
    shown = [f"{prompt} ({count + 1})" if count else prompt for prompt, count in zip(shown, again, strict=True)]
    cells = [image.crop((width * place, 0, width * (place + 1), image.height)) for place in range(len(shown))]
    return SampleStrip(step=step, prompts=tuple(shown), images=tuple(cells))


def _comparisons(run: Path, notes: list[str]) -> list[FoundComparison]:
    """In the run's folder, or beside it and of images that this run's result made."""
    run = run.resolve()
    inside = [run / "comparison.json", *sorted(run.glob("*/comparison.json"))]
    beside = sorted(run.parent.glob("*/comparison.json"))
    found = []
    for file in dict.fromkeys([*inside, *beside]):
        try:
            if file in inside and file.is_file():
                found.append(read_comparison(file.parent))
            elif file in beside and _names(json.loads(file.read_bytes()), run):
                found.append(read_comparison(file.parent))
        except (InpoError, OSError, ValueError, RuntimeError) as error:  # a loop of links is a RuntimeError
            if file in inside:
                notes.append(f"{file} cannot be read: {error.what if isinstance(error, InpoError) else error}")
    return found


def _names(value: Any, run: Path) -> bool:
    """Whether images of a comparison were made by what this run wrote."""
    if isinstance(value, list):
        return any(_names(each, run) for each in value)
    if not isinstance(value, dict):
        return False
    names = value.get("names")
    made = [names.get("model"), names.get("lora")] if isinstance(names, dict) else []
    return any(isinstance(each, str) and Path(each).resolve().is_relative_to(run) for each in made) or any(
        _names(each, run) for each in value.values()
    )


def read_comparison(folder: Path) -> FoundComparison:
    """What `inpo evaluate compare --out` wrote. Raises DataError if it is not that."""
    file = folder / "comparison.json"
    fix = "name the --out of `inpo evaluate compare`"
    text = read_text(file, what="There is no comparison here.", error=DataError, fix=fix)
    try:
        document = json.loads(text)
        if not isinstance(document, dict):
            raise ValueError(f"{type(document).__name__}, not an object")
    except (ValueError, RecursionError) as error:
        raise DataError("The comparison cannot be read.", where=file, got=str(error), fix=fix) from None
    try:
        picture = decode_image(file.with_suffix(".png").read_bytes())
    except (OSError, ImageError):
        picture = None
    return FoundComparison(folder=folder, document=document, picture=picture)
