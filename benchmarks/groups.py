"""Chains of pairs, by prompt and as plain pairs: `python -m benchmarks.groups`.

A chain is what Pick-a-Pic's users made: the image that was preferred meets the next one under the same prompt. Six
pairs of a chain show seven images as twelve sides: 1.71 sides per image. The same pairs are inverted and trained with
`--group pair` and `--group prompt`; network calls are counted, times are of the same worker and the same loop.
"""

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.measure import interleaved, machine, ratio_table, record
from benchmarks.setting import PROMPTS, Setting, setting
from inpo.common.cache import open_cache
from inpo.common.choices import GroupName
from inpo.common.pairs import open_source
from inpo.precompute.tasks import list_tasks

PAIRS_PER_CHAIN = 6
BY_PROMPT, BY_PAIR = "--group prompt", "--group pair"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arch", choices=["toyworld", "sd15-narrow", "sd15", "sdxl"])
    parser.add_argument("--pairs", type=int, default=24, help="a multiple of 6, at most 24: a chain per prompt")
    parser.add_argument("--kept", type=int, default=4, help="K")
    parser.add_argument("--batch-size", type=int, default=12, help="pairs")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args(arguments)
    here = setting(options.arch)
    groups: dict[str, GroupName] = {BY_PROMPT: "prompt", BY_PAIR: "pair"}
    with tempfile.TemporaryDirectory() as scratch:
        source = _chains(here, Path(scratch) / "chains", options.pairs)
        task = list_tasks(open_source(str(source)))[0][0]
        settings = here.settings(steps=10, kept=options.kept, batch_size=options.batch_size)
        workers = {
            name: here.worker(Path(scratch) / group, settings.model_copy(update={"group": group}))
            for name, group in groups.items()
        }
        calls = {}
        for name, worker in workers.items():
            worker.write(task, worker.compute(worker.read(task)))
            calls[name] = worker.components.denoiser.num_calls / options.pairs
        inverting = interleaved(
            {name: (lambda worker=worker: worker.compute(worker.read(task))) for name, worker in workers.items()},
            rounds=options.rounds,
        )
        for worker in workers.values():
            worker.close()
        loops = {
            name: here.cached(open_cache(str(Path(scratch) / group)), batch_size=options.batch_size)
            for name, group in groups.items()
        }
        training = interleaved({name: loop.step for name, loop in loops.items()}, rounds=4 * options.rounds)
        slots = {name: loop.stream.num_slots / options.batch_size for name, loop in loops.items()}
        for loop in loops.values():
            loop.stream.close()
    print(
        f"chains of {PAIRS_PER_CHAIN} pairs, {here.architecture}, {options.pairs} pairs, n = 10, K = {options.kept}, "
        f"{here.dtype}, {machine()}\n"
    )
    print(ratio_table(inverting, ours=BY_PROMPT, unit="s to precompute"))
    print("\nnetwork calls per pair: " + ", ".join(f"{name} {count:.3g}" for name, count in calls.items()))
    print()
    print(ratio_table(training, ours=BY_PROMPT, unit=f"s for a step of {options.batch_size} pairs"))
    print("\nimages per pair of a step, at most: " + ", ".join(f"{name} {count:.3g}" for name, count in slots.items()))
    record(
        "groups",
        {
            "architecture": here.architecture,
            "network_calls_per_pair": calls,
            "precompute_seconds": {name: timing.median for name, timing in inverting.items()},
            "step_seconds": {name: timing.median for name, timing in training.items()},
        },
    )


def _chains(here: Setting, folder: Path, num_pairs: int) -> Path:
    """A list of chains of random pictures, each under a prompt of its own."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    lines = []
    for chain in range(num_pairs // PAIRS_PER_CHAIN):
        names = [f"{chain}-{number}.png" for number in range(PAIRS_PER_CHAIN + 1)]
        for name in names:
            coarse = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(coarse).resize((here.resolution, here.resolution)).save(folder / name)
        best = names[0]
        for number, name in enumerate(names[1:]):
            win, lose = (name, best) if rng.random() < 0.5 else (best, name)
            lines.append({"win": win, "lose": lose, "prompt": PROMPTS[chain % len(PROMPTS)], "id": f"{chain}-{number}"})
            best = win
    (folder / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


if __name__ == "__main__":
    main()
