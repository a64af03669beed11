"""`inpo inspect`: look at a cache. Nothing heavy is imported before a command runs."""

import json
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from inpo.common.log import warn
from inpo.common.options import Given, RecipeOption, help_text, options, path_option
from inpo.common.paths import home, local_path
from inpo.common.recipe import DataSection, ModelSection, read_recipe, resolve

if TYPE_CHECKING:
    from inpo.common.models import Model

app = typer.Typer(
    help="Look at a cache: figures, pictures, proof that it is whole, and whether it has aged; and at training runs.",
    no_args_is_help=True,
)
_CACHE_HELP = help_text(DataSection, "cache")
Cache = Annotated[str, typer.Argument(metavar="CACHE", help=_CACHE_HELP, callback=home)]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead.", show_default="off")]


@app.command()
def summary(
    cache: Annotated[
        str | None, typer.Argument(metavar="[CACHE]", help=_CACHE_HELP, show_default="the recipe's")
    ] = None,
    recipe: RecipeOption = None,
    as_json: Json = False,
) -> None:
    """Identity, settings, what is committed, skipped and orphaned, bytes, timesteps and errors.

    Exit code 1 if a shard cannot be read: it is named, and the rest is shown.
    """
    from inpo.common.console import console
    from inpo.common.errors import UsageError
    from inpo.inspection.summary import summarise
    from inpo.inspection.summary_view import show

    location = resolve(DataSection, "data", read_recipe(recipe), {"cache": cache}).cache
    if location is None:
        raise UsageError(
            "No cache given.", where="inpo inspect summary", fix="name its folder, or pass --recipe with one in [data]"
        )
    found = summarise(location)
    if as_json:
        print(json.dumps(found.to_json(), indent=1))
    else:
        show(found, console())
    if found.unreadable:
        raise typer.Exit(1)


@app.command()
@options(ModelSection)
def pair(
    given: Given,
    cache: Cache,
    pair_id: Annotated[str | None, typer.Argument(metavar="PAIR_ID", help="The pair's id in its source.")] = None,
    out: Annotated[Path, path_option(help="The PNG to write.")] = Path("pair.png"),
    first: Annotated[
        bool, typer.Option("--first", help="Take the cache's first readable pair.", show_default="off")
    ] = False,
) -> None:
    """One cached pair as a contact sheet: x0, and per timestep x0(t), x_t, |delta| and |target - prediction|.

    Latents are decoded by the VAE of --model, or without one by a fast linear approximation.
    """
    from io import BytesIO

    from inpo.common.cache import open_cache
    from inpo.common.errors import UsageError
    from inpo.inspection.output import refuse_output, write_output
    from inpo.inspection.pair_view import find_pair
    from inpo.inspection.preview import linear_preview, vae_preview
    from inpo.inspection.sheet import draw_sheet
    from inpo.inspection.words import cache_facts, pair_facts

    if (pair_id is None) == (not first):
        raise UsageError(
            "Say which pair.",
            where="inpo inspect pair",
            expected="a PAIR_ID, or --first",
            got="neither" if pair_id is None else "both",
            fix="`inpo inspect filter` lists pair ids",
        )
    refuse_output(out, what="sheet", suffix=".png", begins=b"\x89png")
    unreadable: dict[str, Any] = {}
    opened = open_cache(cache, damaged=unreadable)
    view = find_pair(opened, pair_id, unreadable)
    model = _model(given)
    preview = linear_preview(opened) if model is None else vae_preview(opened, model)
    sheet = draw_sheet(view, preview, facts=f"{pair_facts(view)}   ·   {cache_facts(opened.manifest)}")
    content = BytesIO()
    sheet.save(content, format="PNG", optimize=True)
    write_output(out, content.getvalue(), what="sheet")
    print(f"{out}: pair {view.pair_id}, {len(view.timestep)} timesteps, {preview.note}")
    for name, error in sorted(unreadable.items()):
        warn(f"cannot be read, left out: {name}: {error.what}")


@app.command()
@options(ModelSection)
def verify(
    given: Given,
    cache: Cache,
    sample: Annotated[
        int | None, typer.Option(min=1, help="Pairs inverted again with --model.", show_default="16")
    ] = None,
    quarantine: Annotated[
        bool,
        typer.Option(
            "--quarantine",
            help="Move the commits of bad shards aside: precompute makes them again.",
            show_default="off",
        ),
    ] = False,
) -> None:
    """Read every byte and check everything that follows from it. Exit code 1 names each shard that is bad or that could
    not be read, or says that nothing is committed.

    With --model, the model that made the cache, a sample is inverted again and compared.
    """
    from inpo.common.cache import open_cache
    from inpo.common.console import console
    from inpo.common.errors import UsageError
    from inpo.common.progress import ProgressReport
    from inpo.inspection.verify import quarantine as move_commits
    from inpo.inspection.verify import verify as verify_cache
    from inpo.inspection.verify_view import show

    model = _model(given)
    if sample is not None and model is None:
        raise UsageError(
            "A sample is inverted again by a model, and none is given.",
            where="--sample",
            expected="--model too",
            got=f"--sample {sample} alone",
            fix="pass the --model that made the cache, or leave out --sample",
        )
    opened = open_cache(cache, allow_empty=True, damaged={})
    total = len(opened.shards) + len(list(opened.texts))
    with ProgressReport("verify", total=total, unit="shards") as progress:
        found = verify_cache(cache, model=model, num_sampled=sample or 16, on_shard=progress.advance)
    show(found, console())
    if quarantine and found.findings:
        moved = move_commits(cache, found)
        print(f"moved {len(moved)} commits to {found.location}/quarantine: {', '.join(moved) or 'none'}")
        if moved:
            print("the next `inpo precompute` makes these shards again; `inpo inspect clean` removes what they leave")
    if found.not_checked:
        print("a disk or a store refused what is not checked: mend that, then verify again; it may be sound, and stays")
    if found.findings or found.not_checked or not found.num_shards:
        raise typer.Exit(1)


@app.command()
def clean(
    cache: Cache,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.", show_default="off")] = False,
    everything: Annotated[
        bool,
        typer.Option(
            "--all",
            help="Also attempts younger than an hour; only while no precompute works on this cache.",
            show_default="off",
        ),
    ] = False,
) -> None:
    """Remove attempts that no commit names, and documents without their name: what died or lost a race. Never touches
    a committed one."""
    from inpo.common.cache import open_cache
    from inpo.common.space import human_bytes
    from inpo.inspection.leftovers import Leftover, StagedDocument, find_leftovers, find_staged, remove_leftover

    store = open_cache(cache, allow_empty=True, damaged={}).store
    found: list[Leftover | StagedDocument] = [*find_leftovers(store), *find_staged(store)]
    chosen = [leftover for leftover in found if everything or not leftover.is_young()]
    spared = len(found) - len(chosen)
    for leftover in chosen:
        print(f"{leftover.path}  {human_bytes(leftover.num_bytes)}  {leftover.modified:%Y-%m-%d %H:%M} UTC")
    if spared:
        print(f"left alone: {spared} younger than an hour, a writer may be at work on them (--all takes them too)")
    if not chosen:
        print("nothing to remove")
        return
    total = human_bytes(sum(leftover.num_bytes for leftover in chosen))
    if not yes and not typer.confirm(f"Remove these {len(chosen)}, {total}?"):
        print("nothing was removed")
        raise typer.Exit(1)
    removed = [leftover for leftover in chosen if remove_leftover(store, leftover)]
    print(f"removed {len(removed)} leftovers, {human_bytes(sum(leftover.num_bytes for leftover in removed))}")
    if len(removed) < len(chosen):
        print(f"kept {len(chosen) - len(removed)}: committed in the meantime")


@app.command(name="filter")
def filter_pairs(
    cache: Cache,
    where: Annotated[
        str | None,
        typer.Option(
            help='Condition, e.g. "inversion_error < 0.2 and reference_error < 3". Columns: inversion_error, '
            "reference_error (each also _win, _lose; reference_error_max), label, caption_dropped, timestep_min, "
            'timestep_max, num_images (of the group), prompt, pair_id; "cat" in prompt looks for text.',
            show_default="all",
        ),
    ] = None,
    agree: Annotated[
        str | None,
        typer.Option(
            metavar="<N/M>",
            help="Only pairs in which N of M label sets prefer the same side, for instance 4/5.",
            show_default="none",
        ),
    ] = None,
    labels: Annotated[
        list[str], typer.Option(help="A label set for --agree; repeatable.", show_default="all that one scorer made")
    ] = [],  # noqa: B006
    out: Annotated[
        Path | None, path_option(help="The list to write, one pair id a line.", show_default="standard output")
    ] = None,
) -> None:
    """List the pairs for which a condition holds, for `inpo train --only LIST` or `--except LIST`.

    A pair that lacks a value (an inversion error is measured on a sample only) is counted, and not listed.
    """
    from inpo.common.cache import open_cache
    from inpo.common.durable import refuse_other_file
    from inpo.common.errors import UsageError, command
    from inpo.inspection.agree import agreeing
    from inpo.inspection.output import refuse_output, write_output
    from inpo.inspection.pair_table import is_listable, read_pair_table
    from inpo.inspection.where import select

    if labels and agree is None:
        raise UsageError(
            "Label sets are named for --agree, which is not there.",
            where="--labels",
            expected="--agree N/M",
            got=", ".join(labels),
            fix="pass --agree as well, or leave --labels out",
        )
    if out is not None:
        refuse_output(out, what="list")
    bad: dict[str, Any] = {}
    opened = open_cache(cache, damaged=bad)
    table = read_pair_table(opened, dict(bad))
    if out is not None:
        ids = {f"{name}\n".encode() for name in table.pair_id.tolist()}
        refuse_other_file(out, what="list of pairs", is_own=ids.__contains__)
    selection = select(table, "label >= 0" if where is None else where)
    agreed = selection.truth.yes if agree is None else agreeing(opened, table, agree, labels)
    selected = table.pair_id[selection.truth.yes & agreed].tolist()
    chosen = [pair_id for pair_id in selected if is_listable(pair_id)]
    text = "".join(f"{pair_id}\n" for pair_id in chosen)
    if out is None:
        sys.stdout.write(text)
    else:
        write_output(out, text, what="list")
    say = print if out is not None else partial(print, file=sys.stderr)
    unknown = int(selection.truth.unknown.sum())
    say(f"{len(chosen):,} of {len(table):,} pairs, {int(selection.truth.no.sum()):,} fail, {unknown:,} undecided")
    if agree is not None:
        say(f"{int((~agreed).sum()):,} pairs have less than {agree} of the label sets on one side")
    again = command("precompute", "--like", cache, "--model", "MODEL", "--measure-inversion", "1", "--cache", "OTHER")
    for name, count in selection.num_lacking.items():
        hint = f"; `{again}` measures all, in another cache" if name.startswith("inversion_error") else ""
        say(f"{count:,} pairs lack {name}{hint}")
    if len(chosen) < len(selected):
        say(f"{len(selected) - len(chosen):,} pairs have ids that no list can hold (line breaks, control characters)")
    if out is not None and not chosen:
        say(f"{out}: an empty list")
    elif out is not None:
        say(f"{out}: for `{command('train', '--only', out)}` or `{command('train', '--except', out)}`")
    for name, error in table.unreadable.items():
        warn(f"cannot be read, left out: {name}: {error.what}")
    if table.unreadable or len(chosen) < len(selected):
        raise typer.Exit(1)


@app.command()
def table(
    cache: Cache, out: Annotated[Path, path_option(help="The .parquet file to write.")] = Path("pairs.parquet")
) -> None:
    """One row a pair, with every column of `filter`, for pandas, polars or DuckDB."""
    from inpo.common.cache import open_cache
    from inpo.inspection.output import refuse_output, write_output
    from inpo.inspection.pair_table import nothing_readable, read_pair_table
    from inpo.inspection.where import parquet

    refuse_output(out, what="table", suffix=".parquet", begins=b"par1")
    bad: dict[str, Any] = {}
    opened = open_cache(cache, damaged=bad)
    found = read_pair_table(opened, dict(bad))
    if not len(found):
        raise nothing_readable(opened, found.unreadable)
    write_output(out, parquet(found), what="table")
    print(f"{out}: {len(found):,} pairs")
    for name, error in found.unreadable.items():
        warn(f"cannot be read, left out: {name}: {error.what}")
    if found.unreadable:
        raise typer.Exit(1)


@app.command()
@options(ModelSection)
def drift(
    given: Given,
    cache: Cache,
    sample: Annotated[int, typer.Option(min=1, help="Pairs inverted again.")] = 64,
    as_json: Json = False,
) -> None:
    """How far the cached points are from those that the trained --model would invert to, and whether to refresh."""
    from inpo.common.console import console
    from inpo.common.progress import ProgressReport
    from inpo.inspection.drift import measure_drift
    from inpo.inspection.drift_view import show

    model = resolve(ModelSection, "model", {}, given[ModelSection]).open()
    with ProgressReport("drift", total=None, unit="pairs", quiet=as_json) as progress:
        found = measure_drift(cache, model, num_sampled=sample, on_pairs=progress.advance)
    if as_json:
        print(json.dumps(found.to_json(), indent=1))
    else:
        show(found, console())
    if found.unreadable:
        raise typer.Exit(1)


@app.command()
@options(ModelSection)
def report(
    given: Given,
    cache: Cache,
    out: Annotated[Path, path_option(help="The HTML page to write.")] = Path("report.html"),
    pairs: Annotated[int, typer.Option(min=1, help="Pairs with pictures, for each of four reasons.")] = 40,
) -> None:
    """The whole cache as one HTML page: figures, plots, and a gallery of pairs. Needs no network to be read.

    Latents are decoded by the VAE of --model, or without one by a fast linear approximation.
    """
    from inpo.common.progress import ProgressReport
    from inpo.inspection.output import refuse_output, write_output
    from inpo.inspection.report import make_report

    refuse_output(out, what="report", begins=b"<!doctype html")
    with ProgressReport("report", total=None, unit="pairs") as progress:
        made = make_report(cache, model=_model(given), per_group=pairs, on_pair=progress.advance)
    write_output(out, made.html, what="report")
    size = out.stat().st_size / 1e6
    print(f"{out}: {made.num_shown:,} of {made.num_pairs:,} pairs with pictures, {size:.1f} MB")
    for name, error in sorted(made.unreadable.items()):
        warn(f"cannot be read: {name}: {error.what}")
    if made.unreadable:
        raise typer.Exit(1)


def _model(given: Given) -> "Model | None":
    """The model of the command line. None without any of its options."""
    chosen = resolve(ModelSection, "model", {}, given[ModelSection])
    return None if chosen == ModelSection() else chosen.open()


@app.command()
def run(
    runs: Annotated[
        list[Path],
        typer.Argument(metavar="RUN...", help="Output folders of `inpo train`, or of a sweep.", parser=local_path),
    ],
    out: Annotated[Path, path_option(help="The HTML page to write.")] = Path("run.html"),
    compare: Annotated[
        list[Path],
        path_option(
            help="Folder of `inpo evaluate compare --out`; repeatable.",
            show_default="those in the run's folder, and those beside it that are of its images",
        ),
    ] = [],  # noqa: B006
) -> None:
    """Training runs as one HTML page, side by side: warnings, curves, samples over time, comparisons, configuration.

    What a run lacks is said on the page. Needs no network to be read.
    """
    from inpo.inspection.output import refuse_output, write_output
    from inpo.inspection.run_page import make_run_page

    refuse_output(out, what="page", begins=b"<!doctype html")
    page, found = make_run_page(runs, compare)
    write_output(out, page, what="page")
    print(f"{out}: {', '.join(f'{each.name} at step {each.last_step:,}' for each in found)}")
