"""`inpo train`, `inpo export` and `inpo push`."""

from pathlib import Path
from typing import Annotated

import typer

from inpo.common.choices import DtypeName, LoraFormat
from inpo.common.errors import UsageError, command
from inpo.common.options import Given, RecipeOption, options, path_option
from inpo.common.paths import home, local_path
from inpo.common.recipe import ModelSection
from inpo.train.settings import TrainSettings


@options(ModelSection, TrainSettings)
def train(
    given: Given,
    recipe: RecipeOption = None,
    resume: Annotated[str, typer.Option(help="auto, never, or a checkpoint folder.", callback=home)] = "auto",
    sweep: Annotated[
        Path | None,
        path_option(
            help="TOML file of several runs, trained one after another (docs/objectives.md).", show_default="one run"
        ),
    ] = None,
    sweep_scorer: Annotated[
        list[str],
        typer.Option(
            help="Scorer of a sweep's last samples, by name, as in `inpo evaluate score`; repeatable.",
            show_default="none",
        ),
    ] = [],  # noqa: B006
) -> None:
    """Train from a cache: one network in memory, no reference model, no VAE, no text encoder.

    Run the same command again to resume from the last checkpoint.
    """
    from inpo.common.processes import leave
    from inpo.train.run import run_train

    flags = dict(given[TrainSettings])
    caches = flags.pop("caches", None)
    if sweep is None:
        if sweep_scorer:
            raise UsageError(
                "There is no sweep to score.", where="--sweep-scorer", fix="pass --sweep FILE, or leave it out"
            )
        raise typer.Exit(leave(run_train(recipe, given[ModelSection], caches, flags, resume=resume)))
    from inpo.train.sweep import run_sweep

    if resume not in ("auto", "never"):
        raise UsageError(
            "A sweep has no one checkpoint.",
            where="--resume",
            expected="auto or never",
            got=resume,
            fix="leave it out: every run goes on from its own",
        )
    code = run_sweep(sweep, recipe, given[ModelSection], caches, flags, scorers=sweep_scorer, resume=resume)
    raise typer.Exit(leave(code))


def export(
    run: Annotated[
        Path, typer.Argument(metavar="RUN", help="Output folder of a run, or a pipeline folder.", parser=local_path)
    ],
    single_file: Annotated[
        Path | None, path_option(help="The .safetensors file to write: all weights, LoRA merged.")
    ] = None,
    lora: Annotated[
        Path | None, path_option(help="The .safetensors file (for peft: folder) to write: LoRA alone.")
    ] = None,
    form: Annotated[
        LoraFormat,
        typer.Option("--format", help="Of --lora: kohya is read by ComfyUI, Forge, A1111, InvokeAI and sd-scripts."),
    ] = "kohya",
    dtype: Annotated[DtypeName, typer.Option(help="Dtype of the weights.")] = "float16",
) -> None:
    """Write a trained model, or its LoRA layers, as one file that other programs read (docs/use-the-result.md)."""
    if (single_file is None) == (lora is None):
        file = f"{run.resolve().name}.safetensors"
        whole, layers = command("export", run, "--single-file", file), command("export", run, "--lora", file)
        raise UsageError(
            "Say what to write.",
            where="--single-file, --lora",
            expected="one of the two",
            got="neither" if lora is None else "both",
            fix=f"for instance `{layers if (run / 'lora').is_dir() else whole}`",
        )
    if single_file is not None and form != "kohya":
        raise UsageError(
            "--format is of --lora: a single file has one layout.",
            where="--format",
            expected="no --format with --single-file",
            got=form,
            fix="leave it out",
        )
    if lora is not None:
        from inpo.train.lora import export_lora

        print(export_lora(run, lora, form=form, dtype=dtype))
    elif single_file is not None:
        from inpo.train.export import export_single_file

        print(export_single_file(run, single_file, dtype=dtype))


def push(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Output folder of a finished run.", parser=local_path)],
    repository: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="Repository of the hub; made if need be.")],
    private: Annotated[bool, typer.Option("--private", help="Make a private one.", show_default="off")] = False,
    license: Annotated[
        str | None,
        typer.Option(help="The hub's short name of the licence, for instance openrail.", show_default="the base's"),
    ] = None,
    compare: Annotated[
        Path | None, path_option(help="Folder of `inpo evaluate compare --out`: its picture and scores.")
    ] = None,
) -> None:
    """Upload a run's pipeline or LoRA files to the Hugging Face hub, with a card: usage, images, scores, recipe."""
    from inpo.train.push import push as push_run

    print(push_run(run, repository, private=private, license=license, compare=compare))
