"""`inpo data`: look at the columns of a source, check it without a model, pack it into webdataset tars. Nothing heavy
is imported before a command runs: the front door mounts this, and every command would wait for it."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, TextIO

import typer

from inpo.common.durable import new_file, refuse_other_file
from inpo.common.errors import DataError, UsageError
from inpo.common.log import fail, warn
from inpo.common.options import Given, help_text, options, path_option
from inpo.common.paths import home
from inpo.common.printable import shown_message
from inpo.common.progress import ProgressReport
from inpo.common.recipe import DataSection, resolve

if TYPE_CHECKING:
    from rich.table import Table

    from inpo.common.pairs import InputShard, Pair, PairSource, Skipped
    from inpo.common.pairs.pair import SkipReason
    from inpo.common.pairs.walk import Walk
    from inpo.data.check import CheckReport
    from inpo.data.pack import PackReport

app = typer.Typer(help="Look at, check and pack preference pairs.", no_args_is_help=True)

SOURCE_HELP = help_text(DataSection, "pairs")
READING = ("columns", "pairs_from", "allow_remote")
"""How the source is read: options of every command that opens one."""
"""More than a line of a list has."""


@app.command("pack")
@options(DataSection, only=READING)
def pack_command(
    given: Given,
    source: Annotated[str, typer.Argument(metavar="SRC", help=SOURCE_HELP, callback=home)],
    output: Annotated[str, typer.Argument(metavar="OUT", help="New local folder for the tars.", callback=home)],
    pairs_per_tar: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Pairs in one tar; a multiple of 256 gives full cache shards.",
            show_default="1024; 256, which is the most, with --group prompt",
        ),
    ] = None,
    group: Annotated[
        Literal["pair", "prompt"],
        typer.Option(
            help="prompt: bring pairs with equal prompts together, into one tar where they fit. Needs disk space for "
            "the pairs twice while it works."
        ),
    ] = "pair",
) -> None:
    """Write any source as webdataset tars. Ties, unlabelled and other rows without a pair are listed, not packed."""
    from inpo.common.cache.document import MAX_PAIRS_PER_SHARD
    from inpo.common.console import console
    from inpo.common.pairs import Skipped
    from inpo.common.pairs.walk import Walk, count_not_read
    from inpo.data.pack import pack, refuse_occupied

    if "://" in output:
        raise UsageError(
            "Tars are packed to a local folder.",
            where="OUT",
            expected="a path",
            got=output,
            fix="pack locally, then copy the folder",
        )
    by_prompt = group == "prompt"
    if by_prompt and pairs_per_tar is not None and pairs_per_tar > MAX_PAIRS_PER_SHARD:
        raise UsageError(
            "A tar of that size is several cache shards, whose borders may cut through the pairs of a prompt.",
            where="--pairs-per-tar",
            expected=f"at most {MAX_PAIRS_PER_SHARD} with --group prompt",
            got=pairs_per_tar,
            fix="leave --pairs-per-tar out",
        )
    refuse_occupied(Path(output))
    walk = Walk(source=_opened(source, given, with_noise=True), on_unreadable=_warn)
    shards = _counted(walk)
    num_rows = sum(rows for _, rows in shards)
    passes, unit = (2, "rows read or written") if by_prompt else (1, "rows")
    with ProgressReport("pack", total=passes * num_rows, unit=unit) as progress:

        def rows() -> "Iterator[tuple[str, Pair | Skipped]]":
            for name, item in walk.rows(shards):
                yield name, item
                # A pair's last pass is over when it is written.
                progress.advance(passes if isinstance(item, Skipped) else passes - 1)

        report = pack(
            rows(),
            output=Path(output),
            pairs_per_tar=pairs_per_tar or (MAX_PAIRS_PER_SHARD if by_prompt else 1024),
            by_prompt=by_prompt,
            shards=[shard for shard, _ in shards],
            on_written=progress.advance,
        )
    not_read = count_not_read(walk.source, [shard for shard, _ in shards])
    console().print(_pack_table(report, output, len(walk.unreadable), not_read))
    if walk.unreadable:
        raise typer.Exit(1)


@app.command("check")
@options(DataSection, only=READING)
def check_command(
    given: Given,
    source: Annotated[str, typer.Argument(metavar="SRC", help=SOURCE_HELP, callback=home)],
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object instead of a table.", show_default="off")
    ] = False,
    out: Annotated[
        Path | None,
        path_option(
            help="Write a JSON line for each row without a pair: id, reason, detail, shard, row.", show_default="none"
        ),
    ] = None,
    decode_workers: Annotated[int, typer.Option(min=0, help="Processes that decode images; 0: none.")] = 4,
) -> None:
    """Read and decode everything, and count pairs and reasons. Exit code 1 if an input shard is unreadable or there is
    no pair.
    """
    from inpo.common.console import console
    from inpo.common.pairs import Skipped
    from inpo.common.pairs.walk import Walk
    from inpo.data.check import check_source
    from inpo.data.pack import is_skipped_line, skipped_line

    if out is not None:
        refuse_other_file(out, what="list of rows without a pair", is_own=is_skipped_line)
    walk = Walk(source=_opened(source, given), on_unreadable=_warn)
    shards = _counted(walk)
    num_rows = sum(rows for _, rows in shards)
    with _open_list(out) as bad, ProgressReport("check", total=num_rows, unit="rows") as progress:

        def on_row(name: str, item: "Pair | Skipped") -> None:
            progress.advance()
            if bad is not None and isinstance(item, Skipped):
                bad.write(skipped_line(name, item))

        report = check_source(walk, shards, on_row=on_row, workers=decode_workers)
    if as_json:
        print(json.dumps(asdict(report), indent=2))
    else:
        console().print(_check_table(report))
    if not report.num_pairs:
        lines = ["no pair: nothing here can be used", *report.no_pair]
        fail("\n  ".join(lines))
    if report.unreadable or not report.num_pairs:
        raise typer.Exit(1)


@app.command("columns")
@options(DataSection, only=READING)
def columns_command(
    given: Given,
    source: Annotated[str, typer.Argument(metavar="SRC", help=SOURCE_HELP, callback=home)],
    rows: Annotated[int, typer.Option(min=1, max=100, help="Rows that are shown.")] = 3,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object instead of tables.", show_default="off")
    ] = False,
) -> None:
    """Show which columns are there, what each is taken for, and the first rows. Exit code 1 if no shard can be read or
    no pair can be made of these columns.
    """
    from inpo.common.console import console
    from inpo.data.columns import columns_report, columns_tables

    report = columns_report(_opened(source, given), num_rows=rows)
    if as_json:
        print(json.dumps(asdict(report), indent=2))
    else:
        known = report.recognised or "no known set"
        print(shown_message(f"{report.location} ({report.kind}), {report.shard}: {known}"))
        for table in columns_tables(report):
            console().print(table)
    if report.problem:
        fail(report.problem)
        raise typer.Exit(1)


def _opened(source: str, given: Given, *, with_noise: bool = False) -> "PairSource":
    return resolve(DataSection, "data", {}, {"pairs": source, **given[DataSection]}).open(with_noise=with_noise)


def _counted(walk: "Walk") -> "list[tuple[InputShard, int]]":
    """The readable shards with their rows; the headers of many tars take a while, so this has its own progress."""
    found = walk.source.shards
    with ProgressReport("count", total=len(found), unit="shards", quiet=len(found) < 10) as progress:

        def counting() -> "Iterator[InputShard]":
            for shard in found:
                yield shard
                progress.advance()

        return walk.readable_shards(counting())


@contextmanager
def _open_list(path: Path | None) -> "Iterator[TextIO | None]":
    if path is None:
        yield None
        return
    with new_file(path, action="write the list") as staged, staged.open("w", encoding="utf-8") as stream:
        yield stream


def _warn(name: str, error: DataError) -> None:
    warn(f"unreadable input shard {name}: {error.what} In {error.where}: {error.got}; to do: {error.fix}")


def _check_table(report: "CheckReport") -> "Table":
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=f"{escape(report.location)} ({report.kind})", title_justify="left")
    table.add_column("what")
    table.add_column("number", justify="right")
    table.add_column("meaning")
    table.add_row("input shards", f"{report.num_input_shards:,}", "")
    table.add_row("rows", f"{report.num_rows:,}", "")
    table.add_row("pairs", f"{report.num_pairs:,}", "rows whose two images decode")
    table.add_row("  soft labels", f"{report.num_soft_labels:,}", "label below 1")
    table.add_row("  empty prompts", f"{report.num_empty_prompts:,}", "")
    if report.smallest_side is not None:
        table.add_row("  image sides", f"{report.smallest_side:,}..{report.largest_side:,}", "pixels")
    _add_reasons(table, report.skipped)
    _add_not_read(table, report.not_read)
    if report.unreadable:
        table.add_row("unreadable shards", f"{len(report.unreadable):,}", escape(", ".join(report.unreadable)))
    return table


def _pack_table(report: "PackReport", output: str, num_unreadable: int, not_read: dict[str, int]) -> "Table":
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=escape(output), title_justify="left")
    table.add_column("what")
    table.add_column("number", justify="right")
    table.add_column("meaning")
    table.add_row("tars", f"{report.num_tars:,}", "")
    table.add_row("pairs", f"{report.num_pairs:,}", "images copied, not decoded")
    _add_reasons(table, report.skipped)
    _add_not_read(table, not_read)
    if num_unreadable:
        table.add_row("unreadable shards", f"{num_unreadable:,}", "not packed, or only up to the damage")
    return table


def _add_reasons(table: "Table", skipped: "dict[SkipReason, int]") -> None:
    from inpo.common.pairs import SKIP_REASONS

    for reason, meaning in SKIP_REASONS.items():
        if reason in skipped:
            table.add_row(f"skipped: {reason}", f"{skipped[reason]:,}", meaning)


def _add_not_read(table: "Table", not_read: dict[str, int]) -> None:
    from rich.markup import escape

    from inpo.common.pairs.walk import not_read_words

    if not_read:
        table.add_row("not read", f"{sum(not_read.values()):,}", escape(not_read_words(not_read)))
