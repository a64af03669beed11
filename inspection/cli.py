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
