"""`inpo relabel`: label a cache's pairs anew by a scorer."""

import math
from typing import Annotated

import typer

from inpo.common.paths import home


def relabel(
    cache: Annotated[
        str, typer.Argument(metavar="CACHE", help="The cache: a folder, or s3:// or gs://.", callback=home)
    ],
    pairs: Annotated[str, typer.Option(help="The pair source that the cache was made from.", callback=home)],
    scorer: Annotated[str, typer.Option(help="Scorer by name, as in `inpo evaluate score`.")],
    temperature: Annotated[
        float | None,
        typer.Option(
            help="P(win preferred) = sigmoid((win - lose) / temperature), in the scorer's unit. \\[default: the "
            "scorer's own: 0.01 for cosines, else 1] For `train --objective smpo` SmPO's released labels are --scorer "
            "pickscore --temperature 0.16658."
        ),
    ] = None,
    set_name: Annotated[
        str | None,
        typer.Option("--set", help="Name of the label set, for `inpo train --labels`. \\[default: the scorer's]"),
    ] = None,
    allow_remote: Annotated[
        bool,
        typer.Option(
            "--allow-remote",
            help="A list of pairs may name images outside its folder: elsewhere here, or on other hosts.",
        ),
    ] = False,
    batch_size: Annotated[int, typer.Option(min=1, help="Pairs scored at once.")] = 16,
) -> None:
    """Score both images of every committed pair and write a label set beside the shards. Nothing is inverted again."""
    from inpo.common.cache import open_cache
    from inpo.common.cache.labels import check_set_name
    from inpo.common.errors import UsageError, command
    from inpo.common.processes import processes
    from inpo.common.progress import ProgressReport
    from inpo.common.scorer import load_scorer
    from inpo.evaluation.relabel import default_temperature, relabel_cache

    if temperature is not None and not 0 < temperature < math.inf:
        raise UsageError(
            "The temperature must be above 0 and finite.", where="--temperature", expected="for instance 0.01",
            got=temperature, fix="leave it out for the scorer's own",
        )  # fmt: skip
    judge = load_scorer(scorer)
    used = default_temperature(judge) if temperature is None else temperature
    name = check_set_name(set_name or scorer)
    opened = open_cache(cache)
    main = processes().is_main_process
    share = -(-opened.num_pairs // processes().num_processes)
    with ProgressReport("relabel", total=share, unit="pairs", quiet=not main) as progress:
        report = relabel_cache(
            opened,
            pairs,
            judge,
            set_name=name,
            temperature=used,
            allow_remote=allow_remote,
            pairs_per_batch=batch_size,
            on_pairs=progress.advance,
        )
    if main:
        agreeing = 100 * report.num_agreeing / max(1, report.num_pairs)
        print(f"label set {name}: {report.num_pairs} pairs in {report.num_shards} shards, temperature {used:g}")
        print(
            f"  {scorer} prefers the source's winner in {agreeing:.1f}% of them, and neither in {report.num_ties} pairs"
        )
        if report.num_replaced:
            print(f"  labels of {report.num_replaced} shards were for attempts that are gone, and were made anew")
        labelled = ("--cache", opened.location, "--labels", name)
        print(f"next: {command('train', *labelled, '--model', 'MODEL', '--output', 'RUN')}")
