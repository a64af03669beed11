"""`inpo toyworld`: preference pairs and prompts of the embedded default."""

from pathlib import Path
from typing import Annotated, Any

import typer

from inpo.common.durable import write_file
from inpo.common.errors import UsageError, command
from inpo.common.options import path_option
from inpo.toyworld.split import Split

app = typer.Typer(
    help="The embedded default: a tiny text-to-image world with a known preference.", no_args_is_help=True
)


@app.command("pairs")
def pairs_command(
    out: Annotated[Path, path_option(help="Folder for the pairs: new, or begun with the same settings.")],
    pairs: Annotated[int, typer.Option(min=1, help="Number of pairs.")] = 1024,
    seed: Annotated[int, typer.Option(help="Seed of captions, pictures and flips.")] = 0,
    split: Annotated[Split, typer.Option(help="Whose captions to use.")] = "train",
    format: Annotated[str, typer.Option(help="parquet, webdataset, or both with a comma.")] = "parquet,webdataset",
    flip_labels: Annotated[float, typer.Option(min=0, max=1, help="Share of labels turned to the opposite.")] = 0.05,
    model: Annotated[str, typer.Option(help="The model that makes the pictures: base, or flow.")] = "base",
    images: Annotated[
        str,
        typer.Option(
            help="own: the model makes both of a pair; other: base and flow make one each; "
            "rendered: the renderer does, as the training data."
        ),
    ] = "own",
    distance: Annotated[
        float, typer.Option(min=0, help="How far the look of rendered pictures is from the training data's.")
    ] = 0.0,
) -> None:
    """Make preference pairs, labelled by the oracle."""
    # Imported here, as it takes seconds and the other commands of `inpo` do not need it.
    from inpo.toyworld.backdrops import SIZE
    from inpo.toyworld.pairs import PairSettings, make_pairs

    formats: Any = tuple(name.strip() for name in format.split(","))
    told: Any = images
    settings = PairSettings(
        num_pairs=pairs,
        seed=seed,
        split=split,
        formats=formats,
        flip_labels=flip_labels,
        model=model,
        images=told,
        distance=distance,
    )
    report = make_pairs(settings, out)
    print(f"{report.num_pairs} pairs in {out}: {report.num_ties} ties, {report.num_flipped} labels flipped on purpose")
    for name in formats:
        print(f"  {out / name}")
    options = {"--pairs": out / formats[0], "--model": f"toyworld/{model}", "--resolution": SIZE}
    words = [str(word) for option in options.items() for word in option]
    print(f"next: {command('precompute', *words, '--cache', 'CACHE')}")


@app.command("prompts")
def prompts_command(
    out: Annotated[Path, path_option(help="Text file to write, one caption per line.")],
    split: Annotated[Split, typer.Option(help="Whose captions to list.")] = "test",
    limit: Annotated[
        int | None,
        typer.Option(
            min=1, help="At most so many, the first of the split: one in three has one object, until these are spent."
        ),
    ] = None,
) -> None:
    """Write captions of a split as a prompts file, for `inpo evaluate generate`."""
    from inpo.toyworld.scenes import captions

    chosen = captions(split)[:limit]
    if limit is not None and limit > len(chosen):
        raise UsageError(
            f"The {split} split has fewer captions.",
            where="--limit",
            expected=f"at most {len(chosen)}",
            got=limit,
            fix="lower it, or leave it out for all",
        )
    write_file(out, "".join(f"{caption}\n" for caption in chosen))
    print(f"{len(chosen)} captions of the {split} split in {out}")
