"""What a run's numbers warn of: the table of docs/training.md, "Beta and learning rate", as rules."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from inpo.common.judge import Evaluation, Judge


@dataclass(frozen=True)
class Figures:
    """A run's lines of metrics, as the rules look at them. "Now" is the mean of the last third of the lines."""

    metrics: Sequence[dict[str, Any]]

    @cached_property
    def trained(self) -> list[dict[str, Any]]:
        """The lines after the one before any update."""
        return [line for line in self.metrics if line["step"] > 0]

    @cached_property
    def judge(self) -> Judge:
        return Judge(evaluations=[found for line in self.metrics if (found := Evaluation.of(line)) is not None])

    @property
    def start_loss(self) -> float | None:
        """Before any update."""
        first = self.metrics[0] if self.metrics else {}
        return first.get("loss") if first.get("step") == 0 else None

    def now(self, name: str) -> float | None:
        """Mean of the last third of the lines that have this number, or of the last one; None if none has."""
        return _mean(self._values(name), last=True)

    def early(self, name: str) -> float | None:
        """Mean of their first third."""
        return _mean(self._values(name), last=False)

    def _values(self, name: str) -> list[float]:
        return [value for line in self.trained if (value := line.get(name)) is not None]


def _mean(values: Sequence[float], *, last: bool) -> float | None:
    count = max(1, len(values) // 3)
    part = values[-count:] if last else values[:count]
    return sum(part) / len(part) if part else None


@dataclass(frozen=True, kw_only=True)
class Sign:
    """A row of the table, and when it is seen."""

    see: str
    likely: str
    advice: str
    seen: Callable[[Figures], str | None]
    """The numbers in words, or None."""


def _still(run: Figures) -> str | None:
    loss, margin = run.now("loss"), run.now("margin")
    if loss is None or margin is None or run.start_loss is None:
        return None
    if abs(margin) > 0.02 or abs(loss - run.start_loss) > 0.02 * abs(run.start_loss):
        return None
    return f"loss {loss:.4f}, before any update {run.start_loss:.4f}; margin {margin:.2g}"


def _memorising(run: Figures) -> str | None:
    held_out, accuracy = run.judge.evaluations, run.now("implicit_accuracy")
    if not held_out:
        return None
    best, last = run.judge.best, held_out[-1]
    if run.judge.turned:
        return f"held-out accuracy {best.accuracy:.3f} at step {best.step}, {last.accuracy:.3f} at step {last.step}"
    error = last.standard_error
    behind = accuracy is not None and accuracy - last.accuracy > max(0.1, 3 * error)
    if not behind or last.accuracy > 0.5 + error:
        return None
    return f"accuracy {accuracy:.3f}, of held-out prompts {last.accuracy:.3f} ± {error:.3f}"


def _both_fall(run: Figures) -> str | None:
    prefix = "held_out_" if run.now("held_out_win_advantage") is not None else ""
    win, lose = run.now(f"{prefix}win_advantage"), run.now(f"{prefix}lose_advantage")
    margin = run.now(f"{prefix}margin")
    if win is None or lose is None or margin is None or margin <= 0.02 or not lose < win < 0:
        return None
    return f"{'held out: ' if prefix else ''}win advantage {win:.3g}, lose advantage {lose:.3g}, margin {margin:.3g}"


def _saturated(run: Figures) -> str | None:
    loss, margin = run.now("loss"), run.now("margin")
    if loss is None or margin is None or run.start_loss is None:
        return None
    return f"margin {margin:.3g}, loss {loss:.2g}" if margin > 5 and loss < 0.1 * abs(run.start_loss) else None


def _norm_grows(run: Figures) -> str | None:
    early, now = run.early("gradient_norm"), run.now("gradient_norm")
    if early is None or now is None or len(run.trained) < 6 or not now > 3 * early:
        return None
    return f"gradient norm {early:.3g} in the first third, {now:.3g} in the last"


def _overflows(run: Figures) -> str | None:
    last = run.trained[-1] if run.trained else {}
    skipped = last.get("skipped_updates")
    return f"{skipped:.0f} of {last['step']} steps" if skipped and skipped > 0.05 * last["step"] else None


def _not_finite(run: Figures) -> str | None:
    names = ("loss", "margin", "held_out_loss", "held_out_margin")
    found = [line["step"] for line in run.metrics if any(line.get(name, 0.0) is None for name in names)]
    return f"at step {found[0]}" + (f" and {len(found) - 1} more lines" if found[1:] else "") if found else None


def _few_held_out(run: Figures) -> str | None:
    if not run.judge.evaluations:
        return None
    last = run.judge.evaluations[-1]
    return (
        f"{last.num_records} records: {last.accuracy:.3f} ± {last.standard_error:.3f}"
        if last.num_records < 64
        else None
    )


SIGNS = (
    Sign(
        see="loss stays where it began (`inpo`: 0.693), margin at 0",
        likely="steps too small to matter yet (warm-up!)",
        advice="more steps, a higher rate",
        seen=_still,
    ),
    Sign(
        see="accuracy rises, held-out accuracy does not (a note says when it has turned; `--overfitting stop` ends the "
        "run)",
        likely="memorising: few pairs, many epochs",
        advice="fewer steps; more pairs (more timesteps of the same pairs are no substitute)",
        seen=_memorising,
    ),
    Sign(
        see="both advantages fall, lose faster than win",
        likely="the model gets worse, the lose side first: margin without quality",
        advice="higher beta, lower rate",
        seen=_both_fall,
    ),
    Sign(
        see="margin far above 5, loss near 0",
        likely="saturated: those records no longer teach",
        advice="higher beta holds the model nearer to the reference",
        seen=_saturated,
    ),
    Sign(see="images break, gradient norm grows", likely="rate too high", advice="a third of it", seen=_norm_grows),
    Sign(
        see="`skipped_updates` grows",
        likely="gradients overflow float16",
        advice="lower beta, or a bfloat16 cache",
        seen=_overflows,
    ),
    Sign(
        see="loss or margin is null",
        likely="a loss that is not finite: what is trained is broken",
        advice="lower rate or beta, or a float32 cache",
        seen=_not_finite,
    ),
    Sign(
        see="held-out figures are of fewer than 64 records",
        likely="chance moves the accuracy by 0.06 and more",
        advice="a larger `--held-out`",
        seen=_few_held_out,
    ),
)


@dataclass(frozen=True, kw_only=True)
class RunWarning:
    """A sign that a run shows, with its numbers."""

    sign: Sign
    numbers: str


def warnings_of(metrics: Sequence[dict[str, Any]]) -> list[RunWarning]:
    """The signs that a run shows, in the table's order."""
    figures = Figures(metrics)
    found = [(sign, sign.seen(figures)) for sign in SIGNS]
    return [RunWarning(sign=sign, numbers=numbers) for sign, numbers in found if numbers is not None]
