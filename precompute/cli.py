"""`inpo precompute` and `inpo plan`."""

import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer

from inpo.common.paths import home

Recipe = Annotated[Path | None, typer.Option(help="TOML recipe; flags win over it.", callback=home)]
Pairs = Annotated[str | None, typer.Option(help="Pair source: webdataset tars, Pick-a-Pic v2 parquet, or a folder.")]
ModelName = Annotated[str | None, typer.Option(help="Pipeline folder, hub id, or one .safetensors file.")]
AllowRemote = Annotated[
    bool | None,
    typer.Option(help="A list of pairs may name images outside its folder: elsewhere here, or on other hosts."),
]
CachePath = Annotated[str | None, typer.Option(help="The cache: a folder, s3:// or gs://.")]


class Stopped(BaseException):
    """SIGTERM or SIGINT arrived: no error, but the run ends before its work."""


def precompute(
    recipe: Recipe = None,
    pairs: Pairs = None,
    model: ModelName = None,
    cache: CachePath = None,
    allow_remote: AllowRemote = None,
    variant: Annotated[str | None, typer.Option(help="Weights variant, e.g. fp16.")] = None,
    model_config: Annotated[str | None, typer.Option(help="Configuration folder for a single-file model.")] = None,
    vae: Annotated[str | None, typer.Option(help="Replacement VAE: its folder or hub id.")] = None,
    steps: Annotated[int | None, typer.Option(help="Points of the inversion grid, n.")] = None,
    timesteps_per_pair: Annotated[int | None, typer.Option(help="Grid points kept per pair, K <= n.")] = None,
    inverter: Annotated[str | None, typer.Option(help="ddim, ab2, fixed_point or noise.")] = None,
    refine_start: Annotated[int | None, typer.Option(help="Extra path points near the clean end (ab2: 3).")] = None,
    noised_start: Annotated[float | None, typer.Option(help="Noise grid points below this share of T.")] = None,
    guidance: Annotated[float | None, typer.Option(help="0 empty prompt, 1 caption, more: guided inversion.")] = None,
    iterations: Annotated[int | None, typer.Option(help="fixed_point: most iterations per step.")] = None,
    tolerance: Annotated[float | None, typer.Option(help="fixed_point: relative change that ends a step.")] = None,
    caption_dropout: Annotated[float | None, typer.Option(help="Share of pairs inverted under no caption.")] = None,
    faithful: Annotated[bool | None, typer.Option(help="The released code's grid, noise and rounding.")] = None,
    timestep_range: Annotated[tuple[int, int] | None, typer.Option(help="Keep timesteps in [LOW, HIGH).")] = None,
    profile: Annotated[str | None, typer.Option(help="full, or lean: a quarter of the bytes.")] = None,
    extra: Annotated[list[str] | None, typer.Option(help="Store delta_prev or eps_ref too; repeatable.")] = None,
    resolution: Annotated[int | None, typer.Option(help="Side of the images in pixels.")] = None,
    flip: Annotated[bool | None, typer.Option(help="Mirror half of the pairs, both sides alike.")] = None,
    vae_latent: Annotated[str | None, typer.Option(help="mean or sample of the VAE's posterior.")] = None,
    measure_inversion: Annotated[float | None, typer.Option(help="Share of pairs with a measured round trip.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Pairs per network batch.")] = None,
    decode_workers: Annotated[
        int | None, typer.Option(help="Processes that decode images, for each device; 0: none.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16 network.")] = None,
    engine: Annotated[str | None, typer.Option(help="local (also under accelerate launch) or ray.")] = None,
    ray_address: Annotated[str | None, typer.Option(help="ray: join this cluster instead of a local one.")] = None,
    gpus_per_worker: Annotated[float | None, typer.Option(help="ray: GPUs per worker, fractions allowed.")] = None,
    ray_workers: Annotated[int | None, typer.Option(help="ray: most workers; unset: as many as fit.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of everything random.")] = None,
    limit: Annotated[int | None, typer.Option(help="Stop after the shards with the first N rows.")] = None,
    dry_run: Annotated[bool, typer.Option(help="Print the configuration and the plan, then stop.")] = False,
) -> None:
    """Invert every pair once and store (x_t, delta, x0(t)) with the reference error in a zarr cache.

    Run the same command again to resume: committed shards are never made twice.
    """
    from inpo.precompute.run import RayOptions, run_precompute

    flags: dict[str, Any] = {
        "steps": steps,
        "timesteps_per_pair": timesteps_per_pair,
        "inverter": inverter,
        "refine_start": refine_start,
        "noised_start": noised_start,
        "guidance": guidance,
        "iterations": iterations,
        "tolerance": tolerance,
        "caption_dropout": caption_dropout,
        "faithful": faithful,
        "timestep_range": timestep_range,
        "profile": profile,
        "extra": extra,
        "resolution": resolution,
        "flip": flip,
        "vae_latent": vae_latent,
        "measure_inversion": measure_inversion,
        "batch_size": batch_size,
        "decode_workers": decode_workers,
        "dtype": dtype,
        "engine": engine,
        "seed": seed,
        "limit": limit,
    }
    model_flags = {"model": model, "variant": variant, "model_config_dir": model_config, "vae": vae}
    ray_options = RayOptions(address=ray_address, gpus_per_worker=gpus_per_worker, workers=ray_workers)
    previous = {number: signal.signal(number, _stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        code = run_precompute(
            recipe,
            model_flags,
            {"pairs": pairs, "cache": cache, "allow_remote": allow_remote},
            flags,
            ray_options=ray_options,
            dry_run=dry_run,
        )
    except Stopped:
        print(
            "stopped: committed shards stay, the ones in flight are dropped; run the same command again to go on",
            file=sys.stderr,
            flush=True,
        )
        code = 1
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    raise typer.Exit(code)


def plan(
    recipe: Recipe = None,
    pairs: Pairs = None,
    model: ModelName = None,
    cache: CachePath = None,
    timesteps_per_pair: Annotated[int | None, typer.Option(help="Grid points kept per pair, K <= n.")] = None,
    profile: Annotated[str | None, typer.Option(help="full or lean.")] = None,
    gpus: Annotated[int, typer.Option(min=1, help="Devices the hours are divided by.")] = 1,
    calibrate: Annotated[bool, typer.Option(help="Time a few network calls here to estimate hours.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """What a precompute run will cost: shards, network calls, bytes, device hours. Refuses if the disk is short."""
    from inpo.precompute.run import run_plan

    run_plan(
        recipe,
        {"model": model},
        {"pairs": pairs, "cache": cache},
        {"timesteps_per_pair": timesteps_per_pair, "profile": profile},
        gpus=gpus,
        calibrate=calibrate,
        as_json=as_json,
    )


def _stop(number: int, frame: FrameType | None) -> None:
    # A second signal must not interrupt the orderly end of the first.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    raise Stopped
