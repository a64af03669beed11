"""`inpo evaluate`: generate images, score them, compare two models."""

from pathlib import Path
from typing import Annotated

import typer

from inpo.common.paths import home

app = typer.Typer(help="Generate images, score them, and compare models.", no_args_is_help=True)

RecipeOption = Annotated[
    Path | None, typer.Option(help="TOML recipe; its \\[evaluate] section gives what no flag does.", callback=home)
]
ScorerOption = Annotated[
    list[str] | None,
    typer.Option(
        help="Scorer by name; may be repeated. Ours: pickscore, hpsv2, hpsv21, clip, aesthetic, imagereward, "
        "toyworld-oracle, toyworld-heldout; others come from installed packages."
    ),
]


@app.command("generate")
def generate_command(
    out: Annotated[
        Path, typer.Option(help="Folder for the images: new, or begun with the same settings.", callback=home)
    ],
    model: Annotated[str | None, typer.Option(help="Pipeline folder, hub id, or .safetensors file.")] = None,
    lora: Annotated[str | None, typer.Option(help="LoRA weights to lay over the model (safetensors).")] = None,
    prompts: Annotated[
        str | None,
        typer.Option(
            help="Text file with one prompt a line, .tsv with a Prompt column (Parti-Prompts), .json list (HPDv2), or "
            "a hub dataset as OWNER/NAME[:SPLIT[:COLUMN]]."
        ),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Equal seeds give equal noise. \\[default: 0]")] = None,
    images_per_prompt: Annotated[int | None, typer.Option(min=1, help="Images for each prompt. \\[default: 1]")] = None,
    inference_steps: Annotated[int | None, typer.Option(min=1, help="Denoising steps. \\[default: 50]")] = None,
    guidance: Annotated[
        float | None, typer.Option(min=0, help="Classifier-free guidance scale. \\[default: 7.5]")
    ] = None,
    scheduler: Annotated[
        str | None, typer.Option(help="ddim, or own: the scheduler of the pipeline folder. \\[default: ddim]")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32, float16 or bfloat16. \\[default: bfloat16 on a GPU, float32 on a CPU]")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Images at once; changes no noise.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first so many prompts.")] = None,
    recipe: RecipeOption = None,
) -> None:
    """Make images with a model, resumably. `accelerate launch -m inpo evaluate generate ...` uses many GPUs."""
    from inpo.common.errors import UsageError
    from inpo.common.recipe import ModelSection, read_recipe, resolve

    _quieten()
    from inpo.evaluation.generate import generate
    from inpo.evaluation.prompts import read_prompts
    from inpo.evaluation.settings import EvaluateSettings

    sections = read_recipe(recipe)
    flags = {
        "prompts": prompts,
        "lora": lora,
        "seed": seed,
        "images_per_prompt": images_per_prompt,
        "inference_steps": inference_steps,
        "guidance": guidance,
        "scheduler": scheduler,
        "dtype": dtype,
        "batch_size": batch_size,
        "limit": limit,
    }
    settings = resolve(EvaluateSettings, "evaluate", sections, flags)
    chosen = resolve(ModelSection, "model", sections, {"model": model})
    if settings.prompts is None:
        raise UsageError(
            "No prompts given.", where="--prompts", fix="pass --prompts, or set prompts in [evaluate] of the recipe"
        )
    report = generate(chosen.open(), read_prompts(settings.prompts), settings, out)
    cut = f"; prompts cut, being longer than the text encoder reads: {report.num_cut}" if report.num_cut else ""
    _say(f"{report.num_images} images in {out}{cut}")


@app.command("score")
def score_command(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="Folder with images.jsonl, as `generate` makes it.", callback=home)
    ],
    scorer: ScorerOption = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Images scored at once. \\[default: 32]")] = None,
    recipe: RecipeOption = None,
) -> None:
    """Score a folder's images, resumably, into scores-NAME.jsonl."""
    from inpo.common.scorer import load_scorer
    from inpo.evaluation.image_folder import ImageFolder
    from inpo.evaluation.score import score_folder, try_scorers

    settings = _settings(recipe, scorer, batch_size)
    images = ImageFolder(folder)
    try_scorers(_needed(settings.scorers), images)
    for name in settings.scorers:
        score_folder(images, load_scorer(name), batch_size=settings.batch_size)
        values = list(images.scores(name).values())
        _say(f"{name}: mean {sum(values) / len(values):.4g} over {len(values)} images in {folder}")


@app.command("compare")
def compare_command(
    a: Annotated[Path, typer.Argument(metavar="A", help="Folder of the model to compare with.", callback=home)],
    b: Annotated[Path, typer.Argument(metavar="B", help="Folder of the model in question.", callback=home)],
    scorer: ScorerOption = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for comparison.md, comparison.json and comparison.png.", callback=home)
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

    settings = _settings(recipe, scorer, None)
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


def _settings(recipe: Path | None, scorer: list[str] | None, batch_size: int | None):
    from inpo.common.recipe import read_recipe, resolve
    from inpo.evaluation.settings import EvaluateSettings

    flags = {"scorers": tuple(dict.fromkeys(scorer)) if scorer else None, "batch_size": batch_size}
    return resolve(EvaluateSettings, "evaluate", read_recipe(recipe), flags)


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
