"""`inpo evaluate`: generate images, score them, compare two models; `inpo relabel`: label a cache's pairs anew."""

import math
from pathlib import Path
from typing import Annotated

import typer

from inpo.common.foreign import Command
from inpo.common.options import AllowRemote, Given, RecipeOption, help_text, options
from inpo.common.paths import home
from inpo.common.recipe import DataSection, ModelSection, read_recipe, resolve
from inpo.evaluation.settings import EvaluateSettings

app = typer.Typer(help="Generate images, score them, and compare models.", no_args_is_help=True)


@app.command("generate", cls=Command)
@options(ModelSection, EvaluateSettings, without=("scorers",))
def generate_command(
    given: Given,
    out: Annotated[
        Path, typer.Option(help="Folder for the images: new, or begun with the same settings.", callback=home)
    ],
    recipe: RecipeOption = None,
) -> None:
    """Make images with a model, resumably. `accelerate launch -m inpo evaluate generate ...` uses many GPUs."""
    from inpo.common.errors import UsageError

    _quieten()
    from inpo.evaluation.generate import generate
    from inpo.evaluation.prompts import read_prompts

    sections = read_recipe(recipe)
    settings = resolve(EvaluateSettings, "evaluate", sections, given[EvaluateSettings])
    chosen = resolve(ModelSection, "model", sections, given[ModelSection])
    if settings.prompts is None:
        raise UsageError(
            "No prompts given.", where="--prompts", fix="pass --prompts, or set prompts in [evaluate] of the recipe"
        )
    report = generate(chosen.open(), read_prompts(settings.prompts), settings, out)
    cut = f"; prompts cut, being longer than the text encoder reads: {report.num_cut}" if report.num_cut else ""
    _say(f"{report.num_images} images in {out}{cut}")


@app.command("score")
@options(EvaluateSettings, only=("scorers", "batch_size"))
def score_command(
    given: Given,
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="Folder with images.jsonl, as `generate` makes it.", callback=home)
    ],
    recipe: RecipeOption = None,
) -> None:
    """Score a folder's images, resumably, into scores-NAME.jsonl."""
    from inpo.common.device import say_device
    from inpo.common.processes import processes
    from inpo.common.scorer import load_scorer
    from inpo.evaluation.image_folder import ImageFolder
    from inpo.evaluation.score import SCORERS_DTYPE, score_folder, try_scorers

    settings = _settings(recipe, given)
    images = ImageFolder(folder)
    say_device(processes().device, SCORERS_DTYPE, num_processes=processes().num_processes)
    try_scorers(_needed(settings.scorers), images)
    for name in settings.scorers:
        score_folder(images, load_scorer(name), batch_size=settings.batch_size)
        values = list(images.scores(name).values())
        _say(f"{name}: mean {sum(values) / len(values):.4g} over {len(values)} images in {folder}")


@app.command("compare")
@options(EvaluateSettings, only=("scorers", "batch_size"))
def compare_command(
    given: Given,
    a: Annotated[Path, typer.Argument(metavar="A", help="Folder of the model to compare with.", callback=home)],
    b: Annotated[Path, typer.Argument(metavar="B", help="Folder of the model in question.", callback=home)],
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for comparison.md, comparison.json and comparison.png.", show_default="none", callback=home
        ),
    ] = None,
    recipe: RecipeOption = None,
) -> None:
    """Compare two folders' scores, paired by prompt and seed. Scores that are not there yet are computed first."""
    from inpo.common.durable import storage_errors, write_file
    from inpo.common.processes import processes
    from inpo.common.scorer import load_scorer
    from inpo.evaluation.compare import compare_folders, comparison_json, shared_keys
    from inpo.evaluation.image_folder import ImageFolder
    from inpo.evaluation.score import score_folder, try_scorers

    settings = _settings(recipe, given)
    folders = ImageFolder(a), ImageFolder(b)
    # Before hours of scoring: whether there is anything to compare, all scorers, and a place for the outcome.
    shared_keys(*folders)
    missing = [name for name in settings.scorers if not all(images.has_scores(name) for images in folders)]
    try_scorers(missing, folders[0])
    if out is not None:
        with storage_errors("write the comparison", out):
            out.mkdir(parents=True, exist_ok=True)
    for name in settings.scorers:
        for images in folders:
            if not images.has_scores(name):
                score_folder(images, load_scorer(name), batch_size=settings.batch_size)
    if not processes().is_main_process:
        return
    comparison = compare_folders(*folders, settings.scorers)
    print(comparison.to_markdown(), end="")
    if out is not None:
        from inpo.evaluation.picture import draw_picture

        write_file(out / "comparison.md", comparison.to_markdown().encode())
        write_file(out / "comparison.json", comparison_json(comparison))
        write_file(out / "comparison.png", draw_picture(comparison, comparison.scored[0]))
        print(f"\ntable and picture in {out}")


def relabel(
    cache: Annotated[str, typer.Argument(metavar="CACHE", help=help_text(DataSection, "cache"), callback=home)],
    pairs: Annotated[str, typer.Option(help=help_text(DataSection, "pairs"), callback=home)],
    scorer: Annotated[str, typer.Option(help="Scorer by name, as in `inpo evaluate score`.")],
    temperature: Annotated[
        float | None,
        typer.Option(
            help="P(win preferred) = sigmoid((win - lose) / temperature), in the scorer's unit. For "
            "`train --objective smpo` SmPO's released labels are --scorer pickscore --temperature 0.16658.",
            show_default="the scorer's own: 0.01 for cosines, else 1",
        ),
    ] = None,
    set_name: Annotated[
        str | None,
        typer.Option("--set", help="Name of the label set, for `inpo train --labels`.", show_default="the scorer's"),
    ] = None,
    allow_remote: AllowRemote = False,
    batch_size: Annotated[int, typer.Option(min=1, help="Pairs scored at once.")] = 16,
) -> None:
    """Score both images of every committed pair and write a label set beside the shards. Nothing is inverted again."""
    from inpo.common.cache import open_cache
    from inpo.common.cache.labels import check_set_name
    from inpo.common.device import say_device
    from inpo.common.errors import UsageError, command
    from inpo.common.processes import processes
    from inpo.common.progress import ProgressReport
    from inpo.common.scorer import load_scorer
    from inpo.evaluation.relabel import default_temperature, relabel_cache
    from inpo.evaluation.score import SCORERS_DTYPE

    if temperature is not None and not 0 < temperature < math.inf:
        raise UsageError(
            "The temperature must be above 0 and finite.",
            where="--temperature",
            expected="for instance 0.01",
            got=temperature,
            fix="leave it out for the scorer's own",
        )
    judge = load_scorer(scorer)
    used = default_temperature(judge) if temperature is None else temperature
    name = check_set_name(set_name or scorer)
    opened = open_cache(cache)
    main = processes().is_main_process
    say_device(processes().device, SCORERS_DTYPE, num_processes=processes().num_processes)
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
        print(f"  {scorer} prefers the source's win in {agreeing:.1f}% of them, and neither in {report.num_ties} pairs")
        if report.num_replaced:
            print(f"  labels of {report.num_replaced} shards were for attempts that are gone, and were made anew")
        labelled = ("--cache", opened.location, "--labels", name)
        print(f"next: {command('train', *labelled, '--model', 'MODEL', '--output', 'RUN')}")


def _settings(recipe: Path | None, given: Given) -> EvaluateSettings:
    return resolve(EvaluateSettings, "evaluate", read_recipe(recipe), given[EvaluateSettings])


def _needed(scorers: tuple[str, ...]) -> tuple[str, ...]:
    from inpo.common.errors import UsageError
    from inpo.common.scorer import scorer_names

    if not scorers:
        raise UsageError(
            "No scorer given.",
            where="--scorer",
            expected=", ".join(scorer_names()),
            fix="pass --scorer, or set scorers in [evaluate] of the recipe",
        )
    return scorers


def _quieten() -> None:
    """Loading bars and advice of the libraries would bury our own lines; what matters of it is said by us."""
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()


def _say(text: str) -> None:
    """Print once, however many processes run."""
    from inpo.common.processes import processes

    if processes().is_main_process:
        print(text)
