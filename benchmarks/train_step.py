"""Our cached step against a complete online InPO step and a Diffusion-DPO step: `python -m benchmarks.train_step`.

Same model, batch, optimiser and machine, in turn, compiled alike or not at all; the cached step draws its batch from
the real record stream.
"""

import argparse
from typing import get_args

from benchmarks.measure import interleaved, machine, peak_bytes, ratio_table, record, setting_up
from benchmarks.setting import PROMPTS, Setting, setting
from inpo.common.choices import CompileName


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arch", choices=["toyworld", "sd15-narrow", "sd15", "sdxl"])
    parser.add_argument("--batch-size", type=int, nargs="+", default=[2, 8], help="pairs per step; one table each")
    parser.add_argument("--compile", choices=get_args(CompileName), default="auto")
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args(arguments)
    here = setting(options.arch, compile=options.compile)
    for batch_size in options.batch_size:
        _measure(here, batch_size, options.rounds)


def _measure(here: Setting, batch_size: int, rounds: int) -> None:
    with setting_up():
        cache = here.cache(num_pairs=4 * batch_size, steps=10, kept=4, batch_size=batch_size)
        ours = here.cached(cache, batch_size=batch_size)
        online, dpo = here.online(batch_size), here.online(batch_size, inverts=False)
        pixels = here.pixels(batch_size)
    prompts = [PROMPTS[number % len(PROMPTS)] for number in range(batch_size)]
    contestants = {
        "cached": ours.step,
        "online InPO": lambda: online.inpo_step(pixels, prompts),
        "online DPO": lambda: dpo.dpo_step(pixels, prompts),
    }
    networks = {
        "cached": [ours.denoiser],
        "online InPO": [online.trained, online.reference],
        "online DPO": [dpo.trained, dpo.reference],
    }
    for network in (network for used in networks.values() for network in used):
        network.num_calls = 0  # those of compiling
    timings = interleaved(contestants, rounds=rounds)
    images = 2 * batch_size * (rounds + 1)
    calls = {name: sum(network.num_calls for network in used) / images for name, used in networks.items()}
    held = {
        "cached": [ours.denoiser.network, ours.optimizer],
        **{
            name: [
                loop.trained.network,
                loop.optimizer,
                loop.reference.network,
                loop.images.vae,
                loop.text.pipeline.text_encoder,
            ]
            for name, loop in {"online InPO": online, "online DPO": dpo}.items()
        },
    }
    memory = {name: peak_bytes(run, held[name]) for name, run in contestants.items()}
    ours.stream.close()
    title = f"train step, {here.architecture}, {batch_size} pairs, {here.dtype}, --compile {here.compile}, {machine()}"
    print(f"{title}\n\n{ratio_table(timings, ours='cached', unit='s')}")
    print("\nUNet calls per image: " + ", ".join(f"{name} {value:.2f}" for name, value in calls.items()))
    print("peak memory, MB: " + ", ".join(f"{name} {value / 1e6:.0f}" for name, value in memory.items()), flush=True)
    record(
        "train_step",
        {
            "architecture": here.architecture,
            "batch_size": batch_size,
            "dtype": here.dtype,
            "compile": here.compile,
            "median_seconds": {name: timing.median for name, timing in timings.items()},
            "calls_per_image": calls,
            "peak_bytes": memory,
        },
    )


if __name__ == "__main__":
    main()
