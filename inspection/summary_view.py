"""The summary on a terminal."""

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from inpo.common.errors import command
from inpo.common.space import human_bytes
from inpo.inspection.summary import Summary
from inpo.inspection.words import number

_SETTINGS = (
    "profile",
    "extra",
    "resolution",
    "latent_shape",
    "family",
    "group",
    "max_tokens",
    "timesteps_per_pair",
    "seed",
    "network_dtype",
    "vae_dtype",
    "vae_latent",
    "crop",
    "flip",
    "measure_inversion",
)


def show(summary: Summary, console: Console) -> None:
    """Print `summary`: the state first, then settings, bytes and statistics, and what is wrong last."""
    console.print(f"[bold]{escape(summary.location)}[/bold]", soft_wrap=True, highlight=False)
    console.print(_state(summary))
    _section(console, "settings and identity", _identity(summary))
    if summary.skipped or summary.counts:
        _section(console, "skipped pairs" if summary.skipped else "kept pairs of note", _skipped(summary))
    if summary.array_bytes:
        _section(console, "bytes by array", _bytes(summary, ascii_only=console.options.ascii_only))
    if summary.num_pairs:
        timesteps = _timesteps(summary, ascii_only=console.options.ascii_only)
        _section(console, "timesteps and mean reference error", timesteps)
        _section(console, "errors", _statistics(summary))
    console.print()
    _advice(summary, console)


def _section(console: Console, title: str, table: Table) -> None:
    console.print()
    console.print(f"[bold]{title}[/bold]", highlight=False)
    console.print(table)


def _table(*, headers: bool = False) -> Table:
    return Table(
        box=box.SIMPLE_HEAD if headers else None,
        show_header=headers,
        show_edge=False,
        pad_edge=False,
        padding=(0, 2, 0, 0),
    )


def _state(summary: Summary) -> Table:
    table = _table()
    empty = f", {summary.num_empty_shards:,} without a surviving pair" if summary.num_empty_shards else ""
    table.add_row("committed", f"{summary.num_shards:,} shards{empty}")
    table.add_row("pairs", f"{summary.num_pairs:,} ({summary.num_records:,} records, {summary.num_prompts:,} prompts)")
    table.add_row("images", f"{summary.num_images:,} in {summary.num_groups:,} groups")
    table.add_row("texts", f"{summary.num_texts:,} text shards, {human_bytes(summary.text_bytes)}")
    table.add_row("bytes", human_bytes(summary.total_bytes))
    if summary.last_commit:
        table.add_row("written", f"{summary.first_commit} to {summary.last_commit}")
    if summary.num_pending:
        table.add_row("being written", f"{summary.num_pending:,} attempts, {human_bytes(summary.pending_bytes)}")
    table.add_row("orphaned", f"{summary.num_orphaned:,} attempts, {human_bytes(summary.orphaned_bytes)}")
    if summary.num_quarantined:
        table.add_row("quarantined", f"{summary.num_quarantined:,} commits set aside")
    if summary.label_sets:
        table.add_row("label sets", escape(", ".join(summary.label_sets)))
    return table


def _identity(summary: Summary) -> Table:
    table = _table()
    identity = summary.identity
    inverter = {"name": identity["inverter.name"]} | {
        name.removeprefix("inverter."): value for name, value in identity.items() if name.startswith("inverter.")
    }
    for name, value in inverter.items():
        if value is not None:
            shown = "[{}, {})".format(*value) if name == "timestep_range" else _value(value)
            table.add_row("inverter" if name == "name" else f"  {name}", escape(shown))
    for name in _SETTINGS:
        if identity[name] is not None:
            table.add_row(name, escape(_value(identity[name])))
    for name, value in identity.items():
        if name.startswith("fingerprints."):
            table.add_row(escape(name.removeprefix("fingerprints.")) + " fingerprint", escape(str(value)[:16]))
    return table


def _value(value: object) -> str:
    if isinstance(value, list | tuple):
        return " x ".join(map(str, value)) if value and isinstance(value[0], int) else ", ".join(value) or "none"
    return str(value)


def _skipped(summary: Summary) -> Table:
    table = _table(headers=True)
    table.add_column("reason")
    table.add_column("pairs", justify="right")
    for reason, count in summary.skipped.items():
        table.add_row(escape(reason), f"{count:,}")
    for reason, count in summary.counts.items():
        table.add_row(f"{escape(reason)} (kept)", f"{count:,}")
    return table


def _bytes(summary: Summary, *, ascii_only: bool) -> Table:
    table = _table(headers=True)
    table.add_column("array")
    table.add_column("bytes", justify="right")
    table.add_column("share", justify="right")
    table.add_column("")
    large = [item for item in summary.array_bytes.items() if item[1] >= 0.001 * summary.total_bytes]
    for name, size in large:
        share = size / summary.total_bytes
        table.add_row(escape(name), human_bytes(size), f"{100 * share:.1f}%", bar(share, 24, ascii_only=ascii_only))
    rest = summary.total_bytes - sum(size for _, size in large)
    if rest:
        table.add_row("(the rest)", human_bytes(rest), f"{100 * rest / summary.total_bytes:.1f}%", "")
    return table


def _timesteps(summary: Summary, *, ascii_only: bool) -> Table:
    table = _table(headers=True)
    table.add_column("timestep")
    table.add_column("records", justify="right")
    table.add_column("")
    table.add_column("E_ref win", justify="right")
    table.add_column("E_ref lose", justify="right")
    most = max(each.num_records for each in summary.timesteps) or 1
    for each in summary.timesteps:
        table.add_row(
            f"{each.low}..{each.high - 1}",
            f"{each.num_records:,}",
            bar(each.num_records / most, 24, ascii_only=ascii_only),
            number(each.reference_error_win),
            number(each.reference_error_lose),
        )
    return table


def _statistics(summary: Summary) -> Table:
    table = _table()
    error = summary.inversion_error
    images = summary.num_images
    if error.num_measured:
        table.add_row(
            "inversion error",
            f"median {number(error.median)}, 95% {number(error.p95)}, largest {number(error.largest)} "
            f"({escape(str(error.largest_pair))}); measured on {error.num_measured:,} of {images:,} images",
        )
    else:
        table.add_row(
            "inversion error", f"measured on none of {images:,} images (--measure-inversion, a setting of the cache)"
        )
    if summary.spread is not None:
        table.add_row("spread", f"{number(summary.spread)}: how far rounding moves the root of a reference error")
    found = {name: count for name, count in summary.num_nan.items() if count}
    table.add_row("NaN or infinity", ", ".join(f"{count:,} in {name}" for name, count in found.items()) or "none")
    if summary.num_soft_labels:
        table.add_row("labels", f"{summary.num_soft_labels:,} soft")
    if summary.num_captions_dropped:
        table.add_row("captions dropped", f"{summary.num_captions_dropped:,} pairs")
    return table


def _advice(summary: Summary, console: Console) -> None:
    if not summary.num_shards and not summary.unreadable:
        what = "No pair" if summary.num_texts else "Nothing"
        console.print(f"{what} is committed yet." + (" A writer seems to be at work." if summary.num_pending else ""))
    if summary.num_orphaned:
        console.print(
            f"[dim]`{escape(command('inspect', 'clean', summary.location))}` removes the orphaned attempts.[/dim]",
            soft_wrap=True,
            highlight=False,
        )
    if summary.num_pairs:
        console.print(
            f"[dim]No latent was read here: `{escape(command('inspect', 'verify', summary.location))}` reads "
            "and checks every byte.[/dim]",
            soft_wrap=True,
            highlight=False,
        )
    if summary.unreadable:
        console.print(
            f"[bold red]{len(summary.unreadable)} unreadable shard{'s' if len(summary.unreadable) > 1 else ''}, "
            "left out of the statistics above:[/bold red]"
        )
        for name, text in summary.unreadable.items():
            console.print(f"[bold]{escape(name)}[/bold]", highlight=False)
            console.print(f"  {text}", markup=False, highlight=False, soft_wrap=True)


def bar(share: float, width: int, *, ascii_only: bool) -> str:
    """A horizontal bar in eighths of a character; whole ones where the output's encoding has no others."""
    if ascii_only:
        return "#" * round(share * width)
    eighths = round(share * width * 8)
    full, part = divmod(eighths, 8)
    return "█" * full + (" ▏▎▍▌▋▊▉"[part] if part else "")
