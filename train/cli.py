"""`inpo train` and `inpo export`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from inpo.common.paths import home


def train(
    recipe: Annotated[Path | None, typer.Option(help="TOML recipe; flags win over it.", callback=home)] = None,
    cache: Annotated[list[str] | None, typer.Option(help="Cache to train on; repeat for several.")] = None,
    model: Annotated[str | None, typer.Option(help="The model that precompute used.")] = None,
    variant: Annotated[str | None, typer.Option(help="Weights variant, e.g. fp16.")] = None,
    model_config: Annotated[str | None, typer.Option(help="Configuration folder for a single-file model.")] = None,
    vae: Annotated[str | None, typer.Option(help="Replacement VAE, for samples and the final pipeline.")] = None,
    output: Annotated[Path | None, typer.Option(help="Folder of the run.")] = None,
    objective: Annotated[str | None, typer.Option(help="inpo, dpo, ipo, hinge, kto, sft, smpo, mapo, ...")] = None,
    beta: Annotated[
        float | None,
        typer.Option(
            help="Strength of the reference; unset: "
            "inpo 2000 (InPO, for SD1.5), dpo 2000 (ours; released launchers 5000), ipo 0.05 and hinge 1000 (ours; "
            "diffusers' example 5000), kto 1000 (Diffusion-KTO's script), smpo 2000 (SmPO's launcher), mapo 1000 "
            "(MaPO's code), inversion_dpo 100 (ours, as the loss is). diffusers' DPO has no 1/2: double its beta here."
        ),
    ] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Effective: nothing scales it.")] = None,
    steps: Annotated[int | None, typer.Option(help="Optimiser steps.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Records per micro-batch and process.")] = None,
    accumulate: Annotated[int | None, typer.Option(help="Micro-batches per optimiser step.")] = None,
    optimizer: Annotated[str | None, typer.Option(help="adamw, adafactor or adamw8bit.")] = None,
    weight_decay: Annotated[float | None, typer.Option(help="Weight decay.")] = None,
    schedule: Annotated[str | None, typer.Option(help="Learning-rate schedule, by diffusers' name.")] = None,
    warmup_steps: Annotated[int | None, typer.Option(help="Warm-up in optimiser steps.")] = None,
    clip: Annotated[float | None, typer.Option(help="Largest gradient norm; 0: none.")] = None,
    ema: Annotated[
        float | None,
        typer.Option(
            help="Largest decay of the weights' moving average, which is then what is written; 0: none. "
            "At step s it is at most s / (9 + s), as in diffusers: 0.98 at step 400, 0.999 from step 9000."
        ),
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="Network dtype; unset: the cache's.")] = None,
    gradient_checkpointing: Annotated[bool | None, typer.Option(help="Trade time for memory.")] = None,
    compile: Annotated[bool | None, typer.Option(help="torch.compile the network.")] = None,
    lora_rank: Annotated[int | None, typer.Option(help="0: full fine-tuning.")] = None,
    lora_alpha: Annotated[float | None, typer.Option(help="LoRA scale is alpha / rank; unset: the rank.")] = None,
    lora_targets: Annotated[list[str] | None, typer.Option(help="Modules that get LoRA layers; repeatable.")] = None,
    init_from: Annotated[str | None, typer.Option(help="Start from another model than the reference.")] = None,
    labels: Annotated[
        str | None, typer.Option(help="Label set made by `inpo relabel` (for smpo: at SmPO's temperature).")
    ] = None,
    only: Annotated[Path | None, typer.Option(help="File of pair ids to train on.")] = None,
    except_: Annotated[Path | None, typer.Option("--except", help="File of pair ids to leave out.")] = None,
    held_out: Annotated[float | None, typer.Option(help="Share of prompts never trained on.")] = None,
    evaluate_every: Annotated[int | None, typer.Option(help="Steps between held-out evaluations.")] = None,
    log_every: Annotated[int | None, typer.Option(help="Steps between lines of metrics.jsonl.")] = None,
    save_every: Annotated[int | None, typer.Option(help="Steps between checkpoints.")] = None,
    keep_last: Annotated[int | None, typer.Option(help="Checkpoints to keep.")] = None,
    reference_guard: Annotated[bool | None, typer.Option(help="Stop when loss or gradient is not finite.")] = None,
    tracker: Annotated[str | None, typer.Option(help="tensorboard, wandb or none.")] = None,
    sample_every: Annotated[int | None, typer.Option(help="Steps between sample images; 0: none.")] = None,
    sample_prompts: Annotated[
        list[str] | None, typer.Option(help="Prompt of a sample image; repeatable. Unset: the cache's first four.")
    ] = None,
    resume: Annotated[str, typer.Option(help="auto, never, or a checkpoint folder.", callback=home)] = "auto",
    seed: Annotated[int | None, typer.Option(help="Seed of the order and of new weights.")] = None,
) -> None:
    """Train from a cache: one network in memory, no reference model, no VAE, no text encoder.

    Run the same command again to resume from the last checkpoint.
    """
    from inpo.train.run import run_train

    flags: dict[str, Any] = {
        "output": output,
        "objective": objective,
        "beta": beta,
        "learning_rate": learning_rate,
        "steps": steps,
        "batch_size": batch_size,
        "accumulate": accumulate,
        "optimizer": optimizer,
        "weight_decay": weight_decay,
        "schedule": schedule,
        "warmup_steps": warmup_steps,
        "clip": clip,
        "ema": ema,
        "dtype": dtype,
        "gradient_checkpointing": gradient_checkpointing,
        "compile": compile,
        "lora_rank": lora_rank,
        "lora_alpha": lora_alpha,
        "lora_targets": lora_targets,
        "init_from": init_from,
        "labels": labels,
        "only": only,
        "except": except_,
        "held_out": held_out,
        "evaluate_every": evaluate_every,
        "log_every": log_every,
        "save_every": save_every,
        "keep_last": keep_last,
        "reference_guard": reference_guard,
        "tracker": tracker,
        "sample_every": sample_every,
        "sample_prompts": sample_prompts,
        "seed": seed,
    }
    model_flags = {"model": model, "variant": variant, "model_config_dir": model_config, "vae": vae}
    raise typer.Exit(run_train(recipe, model_flags, cache, flags, resume=resume))


def export(
    run: Annotated[
        Path, typer.Argument(metavar="RUN", help="Output folder of a run, or a pipeline folder.", callback=home)
    ],
    single_file: Annotated[Path, typer.Option(help="The .safetensors file to write.", callback=home)],
    dtype: Annotated[str, typer.Option(help="float16, bfloat16 or float32 weights.")] = "float16",
) -> None:
    """Write a trained pipeline as one file in the original Stable Diffusion layout, for the wider ecosystem."""
    from inpo.train.export import export_single_file

    print(export_single_file(run, single_file, dtype=dtype))
