"""The verification on a terminal."""

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from inpo.common.space import human_bytes
from inpo.inspection.checks import CHECKS
from inpo.inspection.verify import Verification


def show(verification: Verification, console: Console) -> None:
    """Print one line per check, then one per finding."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("check")
    table.add_column("what holds")
    table.add_column("checked", justify="right")
    table.add_column("result")
    for name, (meaning, unit) in CHECKS.items():
        bad = {finding.shard for finding in verification.findings if finding.check == name}
        count = verification.num_checked.get(name)
        if bad:
            result = f"[bold red]{len(bad)} bad shard{'s' if len(bad) > 1 else ''}[/bold red]"
        elif count is None:
            result = "[dim]not checked[/dim]"
        else:
            result = "[green]ok[/green]"
        table.add_row(name, meaning, "-" if count is None else f"{count:,} {unit}", result)
    console.print(table)
    found = {finding.check for finding in verification.findings}
    for name in CHECKS:
        if name not in verification.num_checked and verification.num_pairs and name not in found:
            unread = "what it needs could not be read" if verification.not_checked else "what it needs is damaged"
            why = verification.impossible.get(name, unread)
            console.print(f"[dim]not checked: {name}, {why}[/dim]", highlight=False, soft_wrap=True)
    change = verification.reinverted
    if change:
        console.print(
            f"largest relative change on re-inversion: x_t {change['x_t']:.2g}, target {change['target']:.2g}; "
            f"of the reference error at the stored points: {change['reference_error']:.2g}",
            highlight=False,
            soft_wrap=True,
        )
    for finding in verification.findings:
        console.print(f"[bold red]{escape(finding.shard)}[/bold red]  {finding.check}: ", end="", highlight=False)
        console.print(finding.detail, markup=False, highlight=False, soft_wrap=True)
    for shard, error in sorted(verification.not_checked.items()):
        console.print(f"[bold]{escape(shard)}[/bold]  not checked: ", end="", highlight=False)
        console.print(f"{error.what} In: {error.where}", markup=False, highlight=False, soft_wrap=True)
    for note in verification.notes:
        console.print(note, style="dim", markup=False, highlight=False, soft_wrap=True)
    if not verification.num_shards and not verification.num_texts:
        console.print("nothing is committed yet: there was nothing to read", highlight=False)
        return
    if not verification.num_shards:
        console.print("no pair is committed yet: there are texts alone", highlight=False)
    counted = (("bad", verification.bad_shards), ("not checked", sorted(verification.not_checked)))
    verdicts = [f"{len(names)} {what}: {', '.join(names)}" for what, names in counted if names]
    console.print(
        f"{verification.num_shards:,} shards, {verification.num_pairs:,} pairs, {verification.num_texts:,} text "
        f"shards, {human_bytes(verification.bytes_read)} read: {'; '.join(verdicts) or 'all sound'}",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
