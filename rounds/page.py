"""What came of the rounds so far, as Markdown and as a page that asks no network for anything."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from inpo.common.pages import render
from inpo.evaluation.compare import Comparison, to_markdown
from inpo.rounds.figures import SampleFigures

Interval = tuple[float, float]
_AGAINST = ("Against the first model", "Against the round before")


@dataclass(frozen=True, kw_only=True)
class RoundRow:
    """A finished round: a line of rounds.jsonl. Scores are of held-out images, against the first model's."""

    number: int
    begins_with: str
    reference: str
    figures: SampleFigures
    mean: Mapping[str, float]
    """{scorer: mean}."""
    difference: Mapping[str, float]
    """Mean of the difference from the first model's image of the same prompt and noise."""
    interval: Mapping[str, Interval | None]
    """95%, of that."""
    win_rate: Mapping[str, float]
    seconds: Mapping[str, float | None]
    """{stage: of all processes that worked at it; None where one of them was killed}."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, line: Mapping[str, Any]) -> "RoundRow":
        """Raises ValidationError, which is a ValueError, for what is no such line."""
        return TypeAdapter(cls).validate_python(line)


def warnings(rows: Sequence[RoundRow], scorers: Sequence[str]) -> list[str]:
    """What speaks for a model that has learnt its ranker and not what the ranker is for. `scorers`: the ranker
    first."""
    last, (ranker, *watchers) = rows[-1], scorers
    found = [
        f"{ranker}, which ranks, rises and {name}, which never does, falls: the model may be learning the score alone"
        for name in watchers
        if last.difference[ranker] > 0 > last.difference[name]
    ]
    before, now = rows[0].figures.diversity, last.figures.diversity
    if len(rows) > 1 and now < 0.8 * before:
        found.append(f"the images of a prompt differ by {now:.3g} now, and by {before:.3g} in the first round")
    return found


def table(rows: Sequence[RoundRow], compared: Sequence[Comparison], scorers: Sequence[str]) -> str:
    """Markdown: a row for each round, then the last one against the first model and against the one before."""
    head, lines = _cells(rows, scorers)
    text = ["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *lines)]
    text += ["", *(f"- {line}" for line in [*_notes(scorers), *warnings(rows, scorers)])]
    for title, each in zip(_AGAINST, compared, strict=True):
        text += ["", f"{title}.", "", to_markdown([each]).rstrip()]
    return "\n".join(text) + "\n"


def page(rows: Sequence[RoundRow], compared: Sequence[Comparison], scorers: Sequence[str]) -> str:
    """The same as one file."""
    head, lines = _cells(rows, scorers)
    last = rows[-1]
    return render(
        Path(__file__).parent / "assets",
        "rounds.html",
        title=f"{last.number} round{'s' if last.number > 1 else ''}",
        last=last,
        head=head,
        lines=lines,
        alarms=warnings(rows, scorers),
        notes=_notes(scorers),
        compared=[(title, to_markdown([each])) for title, each in zip(_AGAINST, compared, strict=True)],
    )


def _cells(rows: Sequence[RoundRow], scorers: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    head = ["round", "pairs", "ties", "score of samples", "advantage norm", "diversity"]
    head += [f"{what} {name}" for name in scorers for what in ("wins by", "difference by")]
    head += ["seconds"]
    lines = []
    for row in rows:
        of = row.figures
        cells = [str(row.number), str(of.num_pairs), str(of.num_ties), f"{of.score:.4g}"]
        cells += [f"{of.advantage_norm:.3g}", f"{of.diversity:.3g}"]
        for name in scorers:
            cells += [f"{row.win_rate[name]:.3f}", _difference(row, name)]
        spent = {stage: "unknown" if each is None else f"{each:.0f}" for stage, each in row.seconds.items()}
        lines.append([*cells, ", ".join(f"{stage} {each}" for stage, each in spent.items())])
    return head, lines


def _difference(row: RoundRow, name: str) -> str:
    interval = row.interval[name]
    ends = "" if interval is None else f" [{interval[0]:+.3g}, {interval[1]:+.3g}]"
    return f"{row.difference[name]:+.3g}{ends}"


def _notes(scorers: Sequence[str]) -> list[str]:
    return [
        f"{scorers[0]} ranks the samples; {', '.join(scorers[1:])} never does. Wins and differences are of held-out "
        "prompts against the first model; brackets are 95% intervals over prompts, of one run.",
        "Advantage norm: root mean square of score minus its group's mean. Diversity: root mean square difference of "
        "x0 between images of a prompt, in units of the spread of all; both of images that stand in a pair.",
    ]
