"""Our cached step against a complete online InPO step and a Diffusion-DPO step: `python -m benchmarks.train_step`.

Same model, batch, optimiser and machine, in turn; the cached step draws its batch from the real record stream.
"""

import argparse

from benchmarks.measure import interleaved, machine, peak_bytes, ratio_table, record
from benchmarks.setting import PROMPTS, setting


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arch", choices=["toyworld", "sd15-narrow", "sd15", "sdxl"])
    parser.add_argument("--batch-size", type=int, default=8, help="pairs per step")
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args(arguments)
    here = setting(options.arch)
    cache = here.cache(num_pairs=4 * options.batch_size, steps=10, kept=4, batch_size=options.batch_size)
    ours = here.cached(cache, batch_size=options.batch_size)
    online, dpo = here.online(), here.online()
    pixels = here.pixels(options.batch_size)
    prompts = [PROMPTS[number % len(PROMPTS)] for number in range(options.batch_size)]

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
    timings = interleaved(contestants, rounds=options.rounds)
    images = 2 * options.batch_size * (options.rounds + 1)
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
    print(f"train step, {here.architecture}, {options.batch_size} pairs, {here.dtype}, {machine()}\n")
    print(ratio_table(timings, ours="cached", unit="s"))
    print("\nUNet calls per image: " + ", ".join(f"{name} {value:.2f}" for name, value in calls.items()))
    print("peak memory, MB: " + ", ".join(f"{name} {value / 1e6:.0f}" for name, value in memory.items()))
    record(
        "train_step",
        {
            "architecture": here.architecture,
            "batch_size": options.batch_size,
            "dtype": here.dtype,
            "median_seconds": {name: timing.median for name, timing in timings.items()},
            "calls_per_image": calls,
            "peak_bytes": memory,
        },
    )


if __name__ == "__main__":
    main()
