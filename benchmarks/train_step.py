"""Our cached step against a complete online InPO step and a Diffusion-DPO step: `python -m benchmarks.train_step`.

Same model, batch, optimiser and machine, in turn; the cached step draws its batch from the real record stream.
"""

import argparse

import torch

from benchmarks.measure import interleaved, machine, ratio_table, record
from benchmarks.setting import PROMPTS, setting
from train.objectives import inpo
from train.proof import record_errors
from train.records import Needs
from train.stream import RecordStream


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arch", choices=["toyworld", "sd15-narrow", "sd15", "sdxl"])
    parser.add_argument("--batch-size", type=int, default=8, help="pairs per step")
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args(arguments)
    here = setting(options.arch)
    cache = here.cache(num_pairs=4 * options.batch_size, steps=10, kept=4, batch_size=options.batch_size)
    stream = RecordStream(
        here.index(cache), Needs(), batch_size=options.batch_size, window_shards=4, seed=0,
        pin=here.device.type == "cuda",
    )
    batches = iter(stream)
    denoiser, optimizer = here.trained()
    online, dpo = here.online(), here.online()
    pixels = here.pixels(options.batch_size)
    prompts = [PROMPTS[number % len(PROMPTS)] for number in range(options.batch_size)]

    def cached_step() -> None:
        batch = next(batches).to(here.device)
        error = record_errors(denoiser, batch)
        inpo(error, batch.reference_error, batch.label, 2000.0).loss.mean().backward()
        torch.nn.utils.clip_grad_norm_(denoiser.unet.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    contestants = {
        "cached": cached_step,
        "online InPO": lambda: online.inpo_step(pixels, prompts),
        "online DPO": lambda: dpo.dpo_step(pixels, prompts),
    }
    networks = {"cached": [denoiser], "online InPO": [online.trained, online.reference],
                "online DPO": [dpo.trained, dpo.reference]}
    timings = interleaved(contestants, rounds=options.rounds)
    images = 2 * options.batch_size * (options.rounds + 1)
    calls = {name: sum(network.num_calls for network in used) / images for name, used in networks.items()}
    stream.close()
    print(f"train step, {here.architecture}, {options.batch_size} pairs, {here.dtype}, {machine()}\n")
    print(ratio_table(timings, ours="cached", unit="s"))
    print("\nUNet calls per image: " + ", ".join(f"{name} {value:.2f}" for name, value in calls.items()))
    record(
        "train_step",
        {
            "architecture": here.architecture, "batch_size": options.batch_size, "dtype": here.dtype,
            "median_seconds": {name: timing.median for name, timing in timings.items()}, "calls_per_image": calls,
        },
    )


if __name__ == "__main__":
    main()
