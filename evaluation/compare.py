"""Two folders of images against each other, paired by prompt and seed, under one or several scorers."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from inpo.common.errors import DataError, UsageError
from inpo.evaluation.image_folder import ImageEntry, ImageFolder
from inpo.evaluation.statistics import PairedStatistics, compare_scores


@dataclass(frozen=True, kw_only=True)
class ScoredPairs:
    """What one scorer says of every pair."""

    scorer: str
    a: Float[np.ndarray, " pair"]
    b: Float[np.ndarray, " pair"]
    statistics: PairedStatistics


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Folder B against folder A."""

    folder_a: ImageFolder
    folder_b: ImageFolder
    name_a: str
    name_b: str
    pairs: tuple[tuple[ImageEntry, ImageEntry], ...]
    scored: tuple[ScoredPairs, ...]
    notes: tuple[str, ...]
    """What a reader must know: images left out, settings that differ."""

    def to_json(self) -> dict[str, Any]:
        """Every number, with full precision."""
        return {
            "a": {"name": self.name_a, "folder": str(self.folder_a.path), "settings": self.folder_a.settings},
            "b": {"name": self.name_b, "folder": str(self.folder_b.path), "settings": self.folder_b.settings},
            "num_pairs": len(self.pairs),
            "notes": list(self.notes),
            "scorers": {
                one.scorer: {**asdict(one.statistics), "verdict": one.statistics.verdict} for one in self.scored
            },
        }

    def to_markdown(self) -> str:
        """A table with one row per scorer, a verdict for each, and the notes."""
        head = ["scorer", "pairs", "win rate of B", "mean A", "mean B", "mean of B - A"]
        head += ["median A", "median B", "median of B - A", "verdict"]
        lines = [
            f"A: {self.name_a}, B: {self.name_b}. Brackets: 95% intervals.",
            "",
            _row(head),
            _row(["---"] * len(head)),
        ]
        for one in self.scored:
            s = one.statistics
            win_rate = _number(s.win_rate, _widest(s.win_rate_wilson, s.win_rate_bootstrap), digits=3)
            lines.append(
                _row(
                    [
                        one.scorer,
                        str(s.num_pairs),
                        win_rate,
                        f"{s.mean_a:.4g}",
                        f"{s.mean_b:.4g}",
                        _number(s.mean_difference, s.mean_difference_interval, signed=True),
                        f"{s.median_a:.4g}",
                        f"{s.median_b:.4g}",
                        _number(s.median_difference, s.median_difference_interval, signed=True),
                        s.verdict,
                    ]
                )
            )
        lines += ["", *(f"- {note}" for note in self.notes)] if self.notes else []
        return "\n".join(lines) + "\n"


def compare_folders(a: ImageFolder, b: ImageFolder, scorers: Sequence[str] = ()) -> Comparison:
    """Compare `b` with `a` under `scorers`, or under every scorer that both folders have scores of.

    Raises DataError if no image of one has the prompt and seed of an image of the other, or scores are missing.
    """
    shared = shared_keys(a, b)
    if not scorers:
        scorers = [name for name in a.scorer_names() if name in b.scorer_names()]
        if not scorers:
            raise UsageError(
                "The folders have no scores in common.",
                where=f"{a.path} and {b.path}",
                got=f"{', '.join(a.scorer_names()) or 'none'}; {', '.join(b.scorer_names()) or 'none'}",
                fix="run `inpo evaluate score` on both, or give --scorer here to have it done",
            )
    scored = []
    for name in scorers:
        scores_a, scores_b = a.scores(name), b.scores(name)
        values_a, values_b = (np.array([scores[key] for key in shared]) for scores in (scores_a, scores_b))
        statistics = compare_scores(values_a, values_b, [prompt for prompt, _ in shared])
        scored.append(ScoredPairs(scorer=name, a=values_a, b=values_b, statistics=statistics))
    name_a, name_b = _names(a, b)
    return Comparison(
        folder_a=a,
        folder_b=b,
        name_a=name_a,
        name_b=name_b,
        pairs=tuple((a.by_key[key], b.by_key[key]) for key in shared),
        scored=tuple(scored),
        notes=tuple(_notes(a, b, len(shared))),
    )


def shared_keys(a: ImageFolder, b: ImageFolder) -> list[tuple[str, int]]:
    """(prompt, seed) of the images that both have, in A's order. Raises DataError if there is none."""
    shared = [key for key in a.by_key if key in b.by_key]
    if not shared:
        raise DataError(
            "No image of one folder has the prompt and seed of an image of the other.",
            where=f"{a.path} and {b.path}",
            expected="images made for the same prompts with the same --seed",
            got=_example(a, b),
            fix="make both with the same --prompts and --seed",
        )
    return shared


def _names(a: ImageFolder, b: ImageFolder) -> tuple[str, str]:
    """The folders' own names, with as many parents as it takes to tell them apart."""
    first, second = a.path.resolve().parts, b.path.resolve().parts
    for length in range(1, max(len(first), len(second)) + 1):
        if first[-length:] != second[-length:]:
            return "/".join(first[-length:]), "/".join(second[-length:])
    return a.path.name, b.path.name


def _notes(a: ImageFolder, b: ImageFolder, num_shared: int) -> list[str]:
    notes = []
    for label, folder in (("A", a), ("B", b)):
        if extra := len(folder.entries) - num_shared:
            notes.append(f"Images only in {label}, not compared: {extra}.")
    for name in ("inference_steps", "guidance", "scheduler", "dtype"):
        first, second = a.settings.get(name), b.settings.get(name)
        if first != second and a.settings and b.settings:
            notes.append(f"The settings differ: {name} is {first} in A and {second} in B.")
    if a.path.resolve() == b.path.resolve():
        notes.append("A and B are the same folder.")
    return notes


def _example(a: ImageFolder, b: ImageFolder) -> str:
    firsts = (folder.entries[0] for folder in (a, b))
    return "; ".join(f"{entry.prompt[:60]!r} with seed {entry.seed}" for entry in firsts)


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _widest(*intervals: tuple[float, float] | None) -> tuple[float, float]:
    present = [one for one in intervals if one is not None]
    return min(one[0] for one in present), max(one[1] for one in present)


def _number(
    value: float, interval: tuple[float, float] | None, *, digits: int | None = None, signed: bool = False
) -> str:
    def text(number: float) -> str:
        shown = f"{number:.{digits}f}" if digits is not None else f"{number:.3g}"
        return f"+{shown}" if signed and number > 0 else shown

    return text(value) if interval is None else f"{text(value)} [{text(interval[0])}, {text(interval[1])}]"


def comparison_json(comparison: Comparison) -> bytes:
    return (json.dumps(comparison.to_json(), indent=1, ensure_ascii=False) + "\n").encode()
