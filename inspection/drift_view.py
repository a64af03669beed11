"""The drift on a terminal."""

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from inpo.inspection.drift import Drift
from inpo.inspection.summary_view import bar
from inpo.inspection.words import number


def show(drift: Drift, console: Console) -> None:
    """Print the change by timestep, then the recommendation."""
    console.print(
        f"{drift.num_sampled:,} of {drift.num_pairs:,} pairs inverted again by {drift.model}"
        + (" (the very weights that made the cache)" if drift.same_weights else ""),
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, caption="median relative RMS change", caption_justify="left")
    for name in ("timestep", "records", "x_t", "target", ""):
        table.add_column(name, justify="right" if name in ("records", "x_t", "target") else "left")
    most = max((each.target or 0.0 for each in drift.bins), default=0.0) or 1.0
    for each in drift.bins:
        table.add_row(
            f"{each.low}..{each.high - 1}",
            f"{each.num_records:,}",
            number(each.x_t),
            number(each.target),
            bar((each.target or 0.0) / most, 24, ascii_only=console.options.ascii_only),
        )
    console.print(table)
    if drift.num_not_finite:
        console.print(f"[bold red]{drift.num_not_finite} pairs came out NaN or infinite and are left out[/bold red]")
    if drift.unreadable:
        console.print(
            f"[bold red]shards that cannot be read, left out: {escape(', '.join(drift.unreadable))}[/bold red]",
            soft_wrap=True,
        )
    console.print(f"overall: x_t {number(drift.x_t)}, target {number(drift.target)}", highlight=False)
    console.print(drift.advice, markup=False, highlight=False, soft_wrap=True)
