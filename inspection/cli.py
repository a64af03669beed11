"""`inpo inspect`: look at a cache. Nothing heavy is imported before a command runs."""

import json
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    help="Look at a cache: figures, pictures, proof that it is whole, and whether it has aged.", no_args_is_help=True
)
Cache = Annotated[str, typer.Argument(metavar="CACHE", help="The cache: a folder, or s3:// or gs://.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead.")]


@app.command()
def summary(cache: Cache, as_json: Json = False) -> None:
    """Identity, settings, what is committed, skipped and orphaned, bytes, timesteps and errors.

    Exit code 1 if a shard is damaged: it is named, and the rest is shown.
    """
    from rich.console import Console

    from inspection.summary import summarise
    from inspection.summary_view import show

    found = summarise(cache)
    if as_json:
        print(json.dumps(found.to_json(), indent=1))
    else:
        show(found, Console())
    if found.damaged:
        raise typer.Exit(1)


@app.command()
def pair(
    cache: Cache,
    pair_id: Annotated[str | None, typer.Argument(metavar="PAIR_ID", help="The pair's id in its source.")] = None,
    out: Annotated[Path, typer.Option(help="The PNG to write.")] = Path("pair.png"),
    model: Annotated[
        str | None, typer.Option(help="Decode through this model's VAE; without, a fast linear approximation.")
    ] = None,
    first: Annotated[bool, typer.Option("--first", help="Take the cache's first pair.")] = False,
) -> None:
    """One cached pair as a contact sheet: x0, and per timestep x0(t), x_t, |delta| and |target - delta|."""
    from common.cache import open_cache
    from common.cache.store import storage_errors
    from common.errors import UsageError
    from common.models import open_model
    from inspection.pair_view import view_pair
    from inspection.preview import linear_preview, vae_preview
    from inspection.sheet import draw_sheet
    from inspection.words import cache_facts, pair_facts

    if (pair_id is None) == (not first):
        raise UsageError(
            "Say which pair.", where="inpo inspect pair", expected="a PAIR_ID, or --first",
            got="neither" if pair_id is None else "both", fix="`inpo inspect filter` lists pair ids",
        )
    opened = open_cache(cache)
    shard, row = (next(iter(opened)), 0) if pair_id is None else opened.find(pair_id)
    view = view_pair(opened, shard, row)
    preview = linear_preview(opened) if model is None else vae_preview(opened, open_model(model))
    sheet = draw_sheet(view, preview, facts=f"{pair_facts(view)}   ·   {cache_facts(opened.manifest)}")
    with storage_errors("write the sheet", out):
        out.parent.mkdir(parents=True, exist_ok=True)
        sheet.save(out, format="PNG", optimize=True)
    print(f"{out}: pair {view.pair_id}, {len(view.timestep)} timesteps, {preview.note}")
