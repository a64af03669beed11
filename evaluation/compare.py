"""Folders of images against a first one, paired by prompt and seed, under one or several scorers."""

import json
import string
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from inpo.common.errors import DataError, UsageError
from inpo.common.paths import short_names
from inpo.evaluation.image_folder import ImageEntry, ImageFolder
from inpo.evaluation.statistics import FEW_PROMPTS, PairedStatistics, compare_scores

SETTINGS_SHOWN = ("inference_steps", "guidance", "resolution", "max_tokens", "scheduler", "dtype", "transfer")
"""What of generate.json is told where it differs."""


@dataclass(frozen=True, kw_only=True)
class ScoredPairs:
    """What one scorer says of every pair."""

    scorer: str
    a: Float[np.ndarray, " pair"]
    b: Float[np.ndarray, " pair"]
    statistics: PairedStatistics


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One folder, B or a later letter, against folder A."""

    folder_a: ImageFolder
    folder_b: ImageFolder
    name_a: str
    name_b: str
    letter: str
    """Of the second folder in tables."""
    pairs: tuple[tuple[ImageEntry, ImageEntry], ...]
    scored: tuple[ScoredPairs, ...]
    notes: tuple[str, ...]
    """What a reader must know: images left out, settings that differ."""

    def to_json(self) -> dict[str, Any]:
        """Every number, with full precision."""
        return {
            "a": {"name": self.name_a, "folder": str(self.folder_a.path), "settings": self.folder_a.settings},
            "b": {"name": self.name_b, "folder": str(self.folder_b.path), "settings": self.folder_b.settings},
            "letter": self.letter,
            "num_pairs": len(self.pairs),
            "notes": list(self.notes),
            "scorers": {one.scorer: one.statistics.to_json() for one in self.scored},
        }


def in_words(comparison: Comparison) -> str:
    """How often the second folder is better, by every scorer, as a sentence."""
    told = []
    for scored in comparison.scored:
        s = scored.statistics
        alike = f" (alike on {s.ties})" if s.ties else ""
        told.append(f"on {s.wins} of {s.num_pairs} images{alike} by {scored.scorer}")
    return f"{comparison.name_b} is better than {comparison.name_a} {', '.join(told)}."


def to_markdown(comparisons: Sequence[Comparison]) -> str:
    """Sentences, a table with one row per scorer and folder against A, a verdict for each, and the notes."""
    several = len(comparisons) > 1
    other = "model" if several else "B"
    head = ["scorer", *(["model"] if several else []), "pairs", f"win rate of {other}"]
    head += ["mean A", f"mean {other}", f"mean of {other} - A"]
    head += ["median A", f"median {other}", f"median of {other} - A", "verdict"]
    names = ", ".join([f"A: {comparisons[0].name_a}", *(f"{one.letter}: {one.name_b}" for one in comparisons)])
    against = " Every model against A." if several else ""
    lines = [*map(in_words, comparisons), "", f"{names}.{against} Brackets: 95% intervals.", ""]
    lines += [row(head), row(["---"] * len(head))]
    for number, scored in enumerate(comparisons[0].scored):
        for comparison in comparisons:
            s = comparison.scored[number].statistics
            cells = [
                scored.scorer,
                *([comparison.letter] if several else []),
                str(s.num_pairs),
                interval_text(s.win_rate, s.win_rate_interval, digits=3),
                f"{s.mean_a:.4g}",
                f"{s.mean_b:.4g}",
                interval_text(s.mean_difference, s.mean_difference_interval, signed=True),
                f"{s.median_a:.4g}",
                f"{s.median_b:.4g}",
                interval_text(s.median_difference, s.median_difference_interval, signed=True),
                s.verdict.replace("B", comparison.letter, 1),
            ]
            lines.append(row(cells))
    notes = dict.fromkeys(note for comparison in comparisons for note in comparison.notes)
    lines += ["", *(f"- {note}" for note in notes)] if notes else []
    return "\n".join(lines) + "\n"


def compare_folders(folders: Sequence[ImageFolder], scorers: Sequence[str] = ()) -> tuple[Comparison, ...]:
    """Compare each folder behind the first with the first, on the images that all have, under `scorers`, or under every
    scorer that has scored every image of every folder.

    Raises DataError if no prompt and seed is that of an image in every folder, or scores are missing.
    """
    shared = shared_keys(*folders)
    left_out: list[str] = []
    if not scorers:
        begun = [each.scorer_names() for each in folders]
        whole = [[name for name in names if each.has_scores(name)] for each, names in zip(folders, begun, strict=True)]
        scorers = [name for name in whole[0] if all(name in each for each in whole)]
        both = [name for name in begun[0] if all(name in each for each in begun)]
        left_out = [f"Left out, not every image has its score: {name}." for name in both if name not in scorers]
        if not scorers:
            raise UsageError(
                "The folders have no scores in common.",
                where=" and ".join(str(each.path) for each in folders),
                expected="a scorer that has scored every image of every folder",
                got="; ".join(", ".join(each) or "none" for each in whole),
                fix="run `inpo evaluate score` on all, or give --scorer here to have it done",
            )
    scores = {
        name: [np.array([found[key] for key in shared]) for found in (each.scores(name) for each in folders)]
        for name in scorers
    }
    a, prompts = folders[0], [prompt for prompt, _ in shared]
    names = short_names([each.path for each in folders])
    return tuple(
        Comparison(
            folder_a=a,
            folder_b=b,
            name_a=names[0],
            name_b=names[place],
            letter=letters(len(folders))[place],
            pairs=tuple((a.by_key[key], b.by_key[key]) for key in shared),
            scored=tuple(
                ScoredPairs(
                    scorer=name, a=each[0], b=each[place], statistics=compare_scores(each[0], each[place], prompts)
                )
                for name, each in scores.items()
            ),
            notes=(*left_out, *_notes(a, b, letters(len(folders))[place], shared, len(folders))),
        )
        for place, b in enumerate(folders[1:], start=1)
    )


def shared_keys(*folders: ImageFolder) -> list[tuple[str, int]]:
    """(prompt, seed) of the images that all have, in the first one's order. Raises DataError if there is none."""
    shared = [key for key in folders[0].by_key if all(key in each.by_key for each in folders)]
    if not shared:
        raise DataError(
            "No prompt and seed is that of an image in every folder.",
            where=" and ".join(str(each.path) for each in folders),
            expected="images made for the same prompts with the same --seed",
            got="; ".join(f"{each.entries[0].prompt[:60]!r} with seed {each.entries[0].seed}" for each in folders),
            fix="make all with the same --prompts and --seed",
        )
    return shared


def letters(count: int) -> list[str]:
    """A, B, C, ... Z, AA, AB, ..."""
    alphabet = string.ascii_uppercase
    return [(alphabet[place // 26 - 1] if place >= 26 else "") + alphabet[place % 26] for place in range(count)]


def _notes(
    a: ImageFolder, b: ImageFolder, letter: str, shared: Sequence[tuple[str, int]], num_folders: int
) -> list[str]:
    notes = []
    num_prompts = len({prompt for prompt, _ in shared})
    if num_prompts < FEW_PROMPTS:
        notes.append(
            f"With fewer than {FEW_PROMPTS} prompts, here {num_prompts}, the intervals of means are too narrow; the "
            "verdict is exact."
        )
    for label, folder in (("A", a), (letter, b)):
        if extra := len(folder.entries) - len(shared):
            which = f"only in {label}" if num_folders == 2 else f"of {label} that not every folder has"
            notes.append(f"Images {which}, not compared: {extra}.")
    of_a, of_b = a.settings, b.settings
    for name in SETTINGS_SHOWN if of_a and of_b else ():
        first, second = of_a.get(name), of_b.get(name)
        if first != second:
            notes.append(f"The settings differ: {name} is {first} in A and {second} in {letter}.")
    if a.path.resolve() == b.path.resolve():
        notes.append(f"A and {letter} are the same folder.")
    return notes


def row(cells: Sequence[str]) -> str:
    """A line of a Markdown table."""
    return "| " + " | ".join(cells) + " |"


def interval_text(
    value: float, interval: tuple[float, float] | None, *, digits: int | None = None, signed: bool = False
) -> str:
    """0.61 [0.52, 0.7]"""

    def text(number: float) -> str:
        shown = f"{number:.{digits}f}" if digits is not None else f"{number:.3g}"
        return f"+{shown}" if signed and number > 0 else shown

    return text(value) if interval is None else f"{text(value)} [{text(interval[0])}, {text(interval[1])}]"


def comparison_json(comparisons: Sequence[Comparison]) -> bytes:
    """The comparison of B with A, and as `others` those of C, D, ... with A."""
    first, *others = (one.to_json() for one in comparisons)
    document = first | ({"others": others} if others else {})
    return (json.dumps(document, indent=1, ensure_ascii=False) + "\n").encode()
