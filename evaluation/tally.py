"""What people answered in a blind study: B's share for each question with its interval, and how far people agree."""

import json
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from inpo.common.errors import DataError
from inpo.common.text import read_text
from inpo.evaluation.compare import interval_text, row
from inpo.evaluation.statistics import PairedStatistics, compare_scores
from inpo.evaluation.study import CHOICES, QUESTIONS

Answers = dict[tuple[str, str, str], str]
"""{(person, pair, question): choice}"""


@dataclass(frozen=True, kw_only=True)
class QuestionTally:
    """The answers to one question."""

    question: str
    num_people: int
    statistics: PairedStatistics
    """Of answers: B is 1 where it was chosen, -1 where A was, 0 where neither; the intervals count prompts."""
    agreement: float | None
    """Share of pairs of people who answered alike, mean over the pairs of images that two or more answered; None if
    there is no such pair."""
    kappa: float | None
    """Fleiss' kappa: the agreement beyond chance; None also if everybody always answered the same."""


@dataclass(frozen=True, kw_only=True)
class Tally:
    """The answers to a study."""

    name_a: str
    name_b: str
    num_people: int
    questions: tuple[QuestionTally, ...]
    """Those that have answers."""
    skipped: Mapping[str, int]
    """{why: how many answers do not count}"""

    def to_json(self) -> dict[str, Any]:
        """Every number, with full precision."""
        return {
            "a": self.name_a,
            "b": self.name_b,
            "num_people": self.num_people,
            "skipped": dict(self.skipped),
            "questions": {
                one.question: {
                    "people": one.num_people,
                    "answers": one.statistics.num_pairs,
                    "prompts": one.statistics.num_prompts,
                    **{
                        name: value
                        for name, value in one.statistics.to_json().items()
                        if name in ("wins", "ties", "losses", "p_value", "verdict")
                        or name.startswith(("win_rate", "prompt_"))
                    },
                    "agreement": one.agreement,
                    "kappa": one.kappa,
                }
                for one in self.questions
            },
        }

    def to_markdown(self) -> str:
        """A table with one row per question, and what does not count."""
        head = [
            "question",
            "people",
            "answers",
            "B",
            "no difference",
            "A",
            "share of B",
            "agreement",
            "kappa",
            "verdict",
        ]
        lines = [
            f"A: {self.name_a}, B: {self.name_b}. Brackets: 95% intervals. No difference counts half.",
            "",
            row(head),
            row(["---"] * len(head)),
        ]
        for one in self.questions:
            s = one.statistics
            counts = (one.num_people, s.num_pairs, s.wins, s.ties, s.losses)
            share = interval_text(s.win_rate, s.win_rate_interval, digits=3)
            agreed = ["-" if each is None else f"{each:.2f}" for each in (one.agreement, one.kappa)]
            lines.append(row([QUESTIONS[one.question][0], *map(str, counts), share, *agreed, s.verdict]))
        lines += (
            ["", *(f"- Not counted: {count} x {why}." for why, count in self.skipped.items())] if self.skipped else []
        )
        return "\n".join(lines) + "\n"


def count_answers(key: Mapping[str, Any], files: Sequence[Path]) -> Tally:
    """Count the answers in `files` to the study of `key` (evaluation/study.py: read_key).

    An answer that names no pair, question or choice of the study is left out and counted; so are answers of a person
    who answered one question in two ways. The same answer given again counts once.

    Raises DataError for a file that holds no answers, or those to another study, and if no answer is left.
    """
    skipped: Counter[str] = Counter()
    given: defaultdict[tuple[str, str, str], list[str]] = defaultdict(list)
    for file in files:
        person, rows = _read(file, key["study"])
        for one in rows:
            pair, question, choice = (one.get(name) if isinstance(one, dict) else None for name in _FIELDS)
            if not isinstance(pair, str) or pair not in key["pairs"]:
                skipped["a pair that this study does not have"] += 1
            elif not isinstance(question, str) or question not in QUESTIONS:
                skipped["a question that this study does not ask"] += 1
            elif not isinstance(choice, str) or choice not in CHOICES:
                skipped[f"a choice that is none of {', '.join(CHOICES)}"] += 1
            else:
                given[person, pair, question].append(choice)
    answers: Answers = {}
    for (person, pair, question), choices in given.items():
        if len(set(choices)) > 1:
            skipped["answered in two ways by one person"] += len(choices)
        else:
            answers[person, pair, question] = choices[0]
            if len(choices) > 1:
                skipped["the same answer of one person again"] += len(choices) - 1
    if not answers:
        why = "; ".join(f"{count} x {reason}" for reason, count in skipped.items())
        raise DataError(
            "There is no answer to count.",
            where=", ".join(str(file) for file in files),
            expected="answers as study.html saves them",
            got=why or "empty lists",
            fix="ask for files that were saved after some questions were answered",
        )
    asked = [one for one in QUESTIONS if any(question == one for _, _, question in answers)]
    return Tally(
        name_a=key["a"]["name"],
        name_b=key["b"]["name"],
        num_people=len({person for person, _, _ in answers}),
        questions=tuple(_question(one, answers, key["pairs"]) for one in asked),
        skipped=dict(skipped),
    )


_FIELDS = ("pair", "question", "choice")


def _read(file: Path, study: str) -> tuple[str, list[Any]]:
    """Person and answers of one file."""
    fix = "give the files that people saved from study.html"
    text = read_text(file, what="The answers cannot be read.", error=DataError, fix=fix)
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(
            "The answers are no JSON.",
            where=file,
            expected="a file saved from study.html",
            got=str(error)[:200],
            fix=fix,
        ) from None
    found = document if isinstance(document, dict) else {}
    named, person, rows = found.get("study"), found.get("person"), found.get("answers")
    if not isinstance(named, str) or not isinstance(person, str) or not isinstance(rows, list):
        raise DataError(
            "This file holds no answers.",
            where=file,
            expected="an object with study (text), person (text) and answers (list)",
            got=", ".join(map(str, found)) or type(document).__name__,
            fix=fix,
        )
    if named != study:
        raise DataError(
            "These are answers to another study.",
            where=file,
            expected=f"study {study}",
            got=f"study {named}",
            fix="give the --out of that study, or leave the file out",
        )
    return person, rows


def _question(question: str, answers: Answers, pairs: Mapping[str, Any]) -> QuestionTally:
    told = [(person, pair, choice) for (person, pair, asked), choice in sorted(answers.items()) if asked == question]
    outcome = np.array([_for_b(choice, pairs[pair]["left"]) for _, pair, choice in told])
    places = {pair: index for index, pair in enumerate(dict.fromkeys(pair for _, pair, _ in told))}
    counts = np.zeros((len(places), 3), dtype=np.int64)
    for (_, pair, _), value in zip(told, outcome, strict=True):
        counts[places[pair], int(value) + 1] += 1
    agreement, kappa = agreement_of(counts)
    return QuestionTally(
        question=question,
        num_people=len({person for person, _, _ in told}),
        statistics=compare_scores(np.zeros(len(told)), outcome, [pairs[pair]["prompt"] for _, pair, _ in told]),
        agreement=agreement,
        kappa=kappa,
    )


def _for_b(choice: str, left: str) -> float:
    """1 for B, -1 for A, 0 for neither."""
    if choice == "tie":
        return 0.0
    return 1.0 if (choice == "left") == (left == "b") else -1.0


def agreement_of(counts: Int[np.ndarray, "item category"]) -> tuple[float | None, float | None]:
    """(agreement, Fleiss' kappa) of how often each item was put into each category.

    Agreement is the share of pairs of answers to an item that are alike, mean over items. Items with one answer say
    nothing of agreement and are left out; those with more may have different numbers of them, as people leave questions
    out (Fleiss 1971 has equal numbers, for which this is his). statsmodels has it for equal numbers alone.
    """
    counts = counts[counts.sum(axis=1) > 1]
    if not len(counts):
        return None, None
    answers = counts.sum(axis=1)
    alike = (counts * (counts - 1)).sum(axis=1) / (answers * (answers - 1))
    agreement = float(alike.mean())
    chance = float(((counts.sum(axis=0) / answers.sum()) ** 2).sum())
    return agreement, None if chance == 1 else (agreement - chance) / (1 - chance)
