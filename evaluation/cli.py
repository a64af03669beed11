"""`inpo evaluate`: make images, score and compare them, ask people; `inpo relabel`: label a cache's pairs anew."""

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from inpo.common.errors import UsageError, command
from inpo.common.foreign import Command
from inpo.common.options import Given, RecipeOption, help_text, options, path_option
from inpo.common.paths import home, local_path
from inpo.common.recipe import DataSection, ModelSection, option_name, read_recipe, resolve
from inpo.evaluation.settings import CombineName, EvaluateSettings

if TYPE_CHECKING:
    from inpo.evaluation.relabel import RelabelReport

_PAIRS_AT_ONCE = 16
app = typer.Typer(help="Generate images, score them, and compare models.", no_args_is_help=True)


@app.command("generate", cls=Command)
@options(ModelSection, EvaluateSettings, without=("scorers",))
def generate_command(
    given: Given,
    out: Annotated[Path, path_option(help="Folder for the images: new, or begun with the same settings.")],
    recipe: RecipeOption = None,
) -> None:
    """Make images with a model, resumably. `accelerate launch -m inpo evaluate generate ...` uses many GPUs."""
    _quieten()
    from inpo.evaluation.generate import generate
    from inpo.evaluation.prompts import read_prompts

    sections = read_recipe(recipe)
    settings = resolve(EvaluateSettings, "evaluate", sections, given[EvaluateSettings])
    chosen = resolve(ModelSection, "model", sections, given[ModelSection])
    if settings.prompts is None and settings.control_images is None and settings.inpaint is None:
        raise UsageError(
            "No prompts given.", where="--prompts", fix="pass --prompts, or set prompts in [evaluate] of the recipe"
        )
    prompts = read_prompts(settings.prompts) if settings.prompts is not None else []
    report = generate(chosen.open(), prompts, settings, out)
    cut = f"; prompts cut, being longer than the text encoder reads: {report.num_cut}" if report.num_cut else ""
    _say(f"{report.num_images} images in {out}{cut}")


@app.command("score")
@options(EvaluateSettings, only=("scorers", "batch_size"))
def score_command(
    given: Given,
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="Folder with images.jsonl, as `generate` makes it.", parser=local_path)
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
    try_scorers(_needed(settings.scorers), images)
    say_device(processes().device, SCORERS_DTYPE, num_processes=processes().num_processes)
    for name in settings.scorers:
        score_folder(images, load_scorer(name), batch_size=settings.batch_size)
        values = list(images.scores(name).values())
        _say(f"{name}: mean {sum(values) / len(values):.4g} over {len(values)} images in {folder}")


@app.command("compare")
@options(EvaluateSettings, only=("scorers", "batch_size"))
def compare_command(
    given: Given,
    folders: Annotated[
        list[Path],
        typer.Argument(
            metavar="A B [C ...]",
            help="Folder of the model to compare with; folders of those in question.",
            parser=local_path,
        ),
    ],
    out: Annotated[
        Path | None,
        path_option(help="Folder for comparison.md, comparison.json and comparison.png.", show_default="none"),
    ] = None,
    recipe: RecipeOption = None,
) -> None:
    """Compare the scores of every folder with the first one's, paired by prompt and seed. Scores that are not there yet
    are computed first."""
    from inpo.common.durable import storage_errors, write_file
    from inpo.common.processes import processes
    from inpo.common.scorer import load_scorer
    from inpo.evaluation.compare import compare_folders, comparison_json, shared_keys, to_markdown
    from inpo.evaluation.image_folder import ImageFolder
    from inpo.evaluation.score import score_folder, try_scorers

    settings = _settings(recipe, given)
    if len(folders) < 2:
        raise UsageError(
            "There is nothing to compare with.",
            where="the arguments",
            expected="two folders or more",
            got=len(folders),
            fix="give the base's folder first, then those of the trained models",
        )
    opened = [ImageFolder(folder) for folder in folders]
    # Before hours of scoring: whether there is anything to compare, all scorers, and a place for the outcome.
    shared_keys(*opened)
    missing = [name for name in settings.scorers if not all(images.has_scores(name) for images in opened)]
    try_scorers(missing, opened[0])
    if out is not None:
        with storage_errors("write the comparison", out):
            out.mkdir(parents=True, exist_ok=True)
    for name in settings.scorers:
        for images in opened:
            if not images.has_scores(name):
                score_folder(images, load_scorer(name), batch_size=settings.batch_size)
    if not processes().is_main_process:
        return
    comparisons = compare_folders(opened, settings.scorers)
    table = to_markdown(comparisons)
    print(table, end="")
    if out is not None:
        from inpo.evaluation.picture import draw_picture

        write_file(out / "comparison.md", table)
        write_file(out / "comparison.json", comparison_json(comparisons))
        write_file(out / "comparison.png", draw_picture(comparisons))
        print(f"\ntable and picture in {out}")


@app.command("study")
def study_command(
    paths: Annotated[
        list[Path],
        typer.Argument(
            metavar="A B | ANSWERS...",
            help="Folders of two models' images; with --tally files that people saved from the page.",
            parser=local_path,
        ),
    ],
    out: Annotated[Path, path_option(help="Folder of the study: its page and its key.")],
    tally: Annotated[
        bool, typer.Option("--tally", help="Count answers to the study in --out.", show_default="off")
    ] = False,
    seed: Annotated[
        int | None, typer.Option(help="Of which pairs are shown, their order and their sides.", show_default="0")
    ] = None,
    most_pairs: Annotated[int | None, typer.Option(min=1, help="Pairs in the page at most.", show_default="50")] = None,
) -> None:
    """Make a blind study of two models for people to answer in a browser, and count what they answered.

    The page asks the paper's three questions and does not tell which image is whose: key.json does.
    """
    from inpo.common.durable import write_file
    from inpo.evaluation.image_folder import ImageFolder
    from inpo.evaluation.study import KEY, MOST_PAIRS, make_study, read_key
    from inpo.evaluation.tally import count_answers

    if tally:
        for value, option in ((seed, "--seed"), (most_pairs, "--most-pairs")):
            if value is not None:
                raise UsageError(
                    f"{option} is of a new study.", where=option, got="--tally as well", fix="leave it out"
                )
        counted = count_answers(read_key(out), paths)
        table = counted.to_markdown()
        print(table, end="")
        write_file(out / "tally.md", table)
        write_file(out / "tally.json", json.dumps(counted.to_json(), indent=1, ensure_ascii=False) + "\n")
        return
    if len(paths) != 2:
        raise UsageError(
            "A study is of two models.",
            where="the arguments",
            expected="two folders of images, or --tally and files of answers",
            got=len(paths),
            fix="make a study for each two of them",
        )
    a, b = (ImageFolder(path) for path in paths)
    made = make_study(a, b, out, seed=seed or 0, most_pairs=most_pairs or MOST_PAIRS)
    print(f"{made.num_pairs} pairs in {made.page} ({made.num_bytes / 1e6:.1f} MB): that file is all that people need")
    print(f"which side is whose is in {out / KEY}: keep it to yourself")
    for note in made.notes:
        print(f"note: {note}")
    print(f"next: {command('evaluate', 'study', '--tally', 'ANSWERS.json', '--out', out)}")


@options(DataSection, only=("columns", "pairs_from", "allow_remote"))
def relabel(
    given: Given,
    cache: Annotated[str, typer.Argument(metavar="CACHE", help=help_text(DataSection, "cache"), callback=home)],
    pairs: Annotated[
        str | None, typer.Option(help=help_text(DataSection, "pairs"), show_default="none", callback=home)
    ] = None,
    scorer: Annotated[
        list[str], typer.Option(help="Scorer by name, as in `inpo evaluate score`; repeatable.", show_default="none")
    ] = [],  # noqa: B006
    from_file: Annotated[
        Path | None,
        path_option(
            "--from",
            help='Instead of a scorer a file with a line {"pair_id": ..., "label": P(win preferred)} for each pair; '
            "label may be a list, one for each kept timestep.",
            show_default="none",
        ),
    ] = None,
    combine: Annotated[
        CombineName | None,
        typer.Option(
            help="With several scorers, what the set takes of each one's own (vote, mean).",
            metavar="<name>",
            show_default="none",
        ),
    ] = None,
    temperature: Annotated[
        float | None,
        typer.Option(
            help="P(win preferred) = sigmoid((win - lose) / temperature), in the scorer's unit. For "
            "`train --objective smpo` SmPO's released labels are --scorer pickscore --temperature 0.16658.",
            show_default="the scorer's own: 0.01 for cosines, else 1",
        ),
    ] = None,
    smpo: Annotated[
        bool,
        typer.Option("--smpo", help="Labels for `train --objective smpo`: temperature 0.16658.", show_default="off"),
    ] = False,
    set_name: Annotated[
        str | None,
        typer.Option("--set", help="Name of the label set, for `inpo train --labels`.", show_default="the scorer's"),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Pairs scored at once.")] = _PAIRS_AT_ONCE,
) -> None:
    """Score both images of every committed pair and write a label set beside the shards. Nothing is inverted again.

    With several scorers each has a set of its own name, and --combine makes the set of --set out of them.
    """
    from inpo.common.cache import open_cache
    from inpo.common.cache.labels import SMPO_TEMPERATURE, check_set_name
    from inpo.common.device import say_device
    from inpo.common.processes import processes
    from inpo.common.progress import ProgressReport
    from inpo.common.scorer import load_scorer
    from inpo.evaluation.combine import combine_sets, read_file
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
    names = list(dict.fromkeys(scorer))
    source_options = {"pairs": pairs, **given[DataSection]}
    other_batch = None if batch_size == _PAIRS_AT_ONCE else batch_size
    of_scorers = {**source_options, "temperature": temperature, "batch_size": other_batch}
    unused = [option_name(name) for name, value in of_scorers.items() if value] if from_file else []
    _check_relabel(names, pairs, from_file, combine, temperature, smpo, set_name, unused)
    chosen = check_set_name(set_name or names[0])
    opened = open_cache(cache)
    main = processes().is_main_process
    if from_file is not None:
        if main:
            _say_set(chosen, read_file(opened, from_file, set_name=chosen), "the file", opened.location)
        return
    judges = [load_scorer(name) for name in names]
    say_device(processes().device, SCORERS_DTYPE, num_processes=processes().num_processes)
    source = resolve(DataSection, "data", {}, source_options).open()
    mine = list(opened)[processes().process_index :: processes().num_processes]
    share = sum(shard.num_pairs for shard in mine) * len(judges)
    with ProgressReport("relabel", total=share, unit="pairs", quiet=not main) as progress:
        for name, judge in zip(names, judges, strict=True):
            own = SMPO_TEMPERATURE if smpo else default_temperature(judge)
            used = own if temperature is None else temperature
            made = check_set_name(name) if combine else chosen
            report = relabel_cache(
                opened,
                source,
                judge,
                set_name=made,
                temperature=used,
                pairs_per_batch=batch_size,
                on_pairs=progress.advance,
            )
            if main:
                _say_set(made, report, name, None if combine else opened.location, temperature=used)
    if combine and main:
        report = combine_sets(opened, names, how=combine, set_name=chosen)
        _say_set(chosen, report, f"the {combine} of {', '.join(names)}", opened.location)


def _check_relabel(
    scorers: list[str],
    pairs: str | None,
    from_file: Path | None,
    combine: str | None,
    temperature: float | None,
    smpo: bool,
    set_name: str | None,
    unused: list[str],
) -> None:
    """Raise UsageError for options that do not go together."""
    several = len(scorers) > 1
    own = "one scorer, or none: several have each its own"
    for wrong, where, expected, fix in (
        (not scorers and from_file is None, "--scorer", "a scorer, or --from FILE", "pass one"),
        (bool(scorers) and from_file is not None, "--from", "a file, or scorers", "leave one of both out"),
        (bool(unused), ", ".join(unused), "none of them with --from: the file has the labels", "leave them out"),
        (bool(scorers) and pairs is None, "--pairs", "the source of the pairs", "pass the source of the cache"),
        (from_file is not None and set_name is None, "--set", "a name", "pass --set NAME"),
        (several and combine is None, "--combine", "vote or mean", "pass --combine, or one scorer at a time"),
        (not several and combine is not None, "--combine", "several scorers", "leave it out"),
        (
            several and (set_name is None or set_name in scorers),
            "--set",
            "a name that no scorer has",
            "pass --set NAME",
        ),
        (several and temperature is not None, "--temperature", own, "leave it out, or label with one at a time"),
        (
            smpo and (scorers != ["pickscore"] or temperature is not None),
            "--smpo",
            "pickscore alone, without --temperature: its unit is PickScore's",
            "leave --smpo out, and pass --temperature",
        ),
    ):
        if wrong:
            raise UsageError(
                "An option is missing, or two do not go together.", where=where, expected=expected, fix=fix
            )


def _say_set(
    name: str, report: "RelabelReport", who: str, location: str | None, *, temperature: float | None = None
) -> None:
    """What a label set is, and with `location` what to do next."""
    agreeing = 100 * report.num_agreeing / max(1, report.num_pairs)
    unit = "" if temperature is None else f", temperature {temperature:g}"
    print(f"label set {name}: {report.num_pairs} pairs in {report.num_shards} shards{unit}")
    print(f"  {who} prefers the source's win in {agreeing:.1f}% of them, and neither in {report.num_ties} pairs")
    if report.num_replaced:
        print(f"  labels of {report.num_replaced} shards were for attempts that are gone, and were made anew")
    if location is not None:
        labelled = ("--cache", location, "--labels", name)
        print(f"next: {command('train', *labelled, '--model', 'MODEL', '--output', 'RUN')}")


def _settings(recipe: Path | None, given: Given) -> EvaluateSettings:
    return resolve(EvaluateSettings, "evaluate", read_recipe(recipe), given[EvaluateSettings])


def _needed(scorers: tuple[str, ...]) -> tuple[str, ...]:
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
