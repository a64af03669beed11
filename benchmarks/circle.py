"""The circle on the toy world: rounds, and ways of making points of a model's own samples, at equal network calls.

    one           recorded points, one round
    three         as many pairs in three rounds, each from the model of the one before
    three-first   the same with the first model as the reference
    inverted      the samples of `one` inverted by ddim, fewer of them, so that the calls are as many
    noise         noise in place of their own path
    lists         as many images, four of a prompt, by listwise

Every one is trained for as many steps from its own samples and compared with the base on captions of the test split, by
the scorer that ranks and by one that never does. Nothing is made twice: run it again to go on.
"""

import argparse
import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import scipy.stats

from benchmarks.evidence.jobs import Job, run_jobs
from inpo.common.durable import write_file

SCORERS = ("toyworld-oracle", "toyworld-heldout")
N, K, GRID = 20, 4, 10
"""Steps of the sampler, records of an image, points of the inversion."""
RECORDED = 2 * (N + 1) + K
INVERTED = 2 * (N + 1) + GRID + 1
"""Network calls of an image: of `inverted` without those of the recorded points, which it has no use for."""
BASE = "toyworld/base"
PAIRS_OF_CONDITIONS = (
    ("three", "one"),
    ("three-first", "three"),
    ("one", "inverted"),
    ("one", "noise"),
    ("lists", "one"),
)
_SAMPLE = ["--model", BASE, "--scorer", SCORERS[0], "--gap", "0.05", "--resolution", "64", "--batch-size", "32"]
_SAMPLE += ["--inference-steps", str(N), "--guidance", "2.5", "--timesteps-per-pair", str(K)]
_DRAW = ["--inference-steps", "20", "--guidance", "2.5", "--seed", "1000"]
_TRAIN = ["--learning-rate", "2e-5", "--beta", "1000", "--held-out", "0", "--tracker", "none"]
IMAGES_PER_STEP = 64


def jobs_of(folder: Path, seed: int, pairs: int, steps: int) -> list[Job]:
    """All conditions of one seed."""
    here = folder / f"seed-{seed}"
    prompts, seeded = str(folder / "train.txt"), ["--seed", str(seed)]
    made = []
    for name, count, per_prompt, like, objective in (
        ("one", pairs, 2, [], "inpo"),
        ("inverted", pairs * RECORDED // INVERTED, 2, ["--inverter", "ddim", "--grid-points", str(GRID)], "inpo"),
        ("noise", pairs, 2, ["--inverter", "noise", "--grid-points", str(GRID)], "inpo"),
        ("lists", pairs // 2, 4, [], "listwise"),
    ):
        out = here / name
        cache = str(out / "cache")
        own = str(out / "prompts.txt")
        sampled = str(out / "sampled") if like else cache
        train = ["train", "--cache", cache, "--model", BASE, "--output", str(out / "run"), *seeded, *_TRAIN]
        train += ["--batch-size", str(IMAGES_PER_STEP // per_prompt)]
        again = ["precompute", "--like", sampled, "--model", BASE, "--cache", cache, "--batch-size", "32"]
        work: list[Any] = [
            lambda own=own, count=count: write_file(
                Path(own), "\n".join(Path(prompts).read_text().splitlines()[:count]) + "\n"
            ),
            ["sample", "--prompts", own, "--per-prompt", str(per_prompt), "--cache", sampled, *seeded, *_SAMPLE],
            *([[*again, *like]] if like else []),
            [*train, "--steps", str(steps), "--objective", objective],
        ]
        made.append(Job(name=name, folder=out, steps=[*work, *_judged(folder, out, out / "run" / "pipeline")]))
    for name, reference in (("three", "moving"), ("three-first", "first")):
        out = here / name
        recipe = out / "recipe.toml"
        text = _recipe(folder, out / "rounds", seed, pairs // 3, steps // 3, reference)
        work = [
            lambda recipe=recipe, text=text: write_file(recipe, text),
            ["round", "--recipe", str(recipe), "--rounds", "3"],
        ]
        pipeline = out / "rounds" / "round-3" / "run" / "pipeline"
        made.append(Job(name=name, folder=out, steps=[*work, *_judged(folder, out, pipeline)]))
    return made


def _judged(folder: Path, out: Path, pipeline: Path) -> list[list[str]]:
    draw = ["evaluate", "generate", "--model", str(pipeline), "--out", str(out / "images")]
    compare = ["evaluate", "compare", str(folder / "base"), str(out / "images"), "--out", str(out / "compare")]
    return [
        [*draw, "--prompts", str(folder / "test.txt"), *_DRAW],
        [*compare, *(word for name in SCORERS for word in ("--scorer", name))],
    ]


def _recipe(folder: Path, output: Path, seed: int, pairs: int, steps: int, reference: str) -> str:
    """The settings of the other conditions, as rounds."""
    shipped = tomllib.loads((Path(__file__).parents[1] / "recipes" / "rounds.toml").read_text())
    sections: dict[str, dict[str, Any]] = {name: dict(values) for name, values in shipped.items()}
    sections["sample"] |= {"prompts": str(folder / "train.txt"), "seed": seed, "inference_steps": N}
    sections["train"] |= {"steps": steps, "seed": seed, "tracker": "none"}
    sections["evaluate"] |= {"prompts": str(folder / "test.txt"), "limit": 20}
    sections["round"] = {"output": str(output), "prompts_per_round": pairs, "reference": reference}
    lines = []
    for name, values in sections.items():
        lines += [f"[{name}]", *(f"{key} = {json.dumps(value)}" for key, value in values.items())]
    return "\n".join(lines) + "\n"


def results(folder: Path, seeds: int) -> dict[str, Any]:
    """By condition and scorer, and differences between conditions: mean over seeds, half its 95% t-interval, values."""
    found: dict[str, dict[str, list[float]]] = {}
    for name in sorted({name for pair in PAIRS_OF_CONDITIONS for name in pair}):
        found[name] = {scorer: [] for scorer in SCORERS}
        for seed in range(seeds):
            told = json.loads((folder / f"seed-{seed}" / name / "compare" / "comparison.json").read_text())
            for scorer in SCORERS:
                found[name][scorer].append(told["scorers"][scorer]["mean_difference"])
    over_base = {name: {scorer: _over(values) for scorer, values in each.items()} for name, each in found.items()}
    between = {
        f"{a} - {b}": {scorer: _over(list(np.subtract(found[a][scorer], found[b][scorer]))) for scorer in SCORERS}
        for a, b in PAIRS_OF_CONDITIONS
    }
    return {"over the base": over_base, "between": between}


def costs(folder: Path, seeds: int) -> dict[str, dict[str, float]]:
    """Seconds of one process: of whole conditions, and of a round of `three` by stage; means over seeds, without rounds
    whose seconds are not known."""
    whole, stages = {}, {}
    for name in sorted({name for pair in PAIRS_OF_CONDITIONS for name in pair}):
        marks = [folder / f"seed-{seed}" / name / f"{name}.done" for seed in range(seeds)]
        whole[name] = float(np.mean([float(mark.read_text()) for mark in marks]))
    lines = [
        line
        for seed in range(seeds)
        for line in (folder / f"seed-{seed}" / "three" / "rounds" / "rounds.jsonl").read_text().splitlines()
    ]
    rows = [json.loads(line)["seconds"] for line in lines]
    for stage in rows[0]:
        known = [row[stage] for row in rows if row[stage] is not None]
        stages |= {stage: float(np.mean(known))} if known else {}
    return {"condition": whole, "stage of a round": stages}


def _over(values: list[float]) -> dict[str, Any]:
    count = len(values)
    half = scipy.stats.t.ppf(0.975, count - 1) * np.std(values, ddof=1) / count**0.5 if count > 1 else float("nan")
    return {"mean": float(np.mean(values)), "half": float(half), "values": [float(each) for each in values]}


def table(found: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    """Markdown."""
    lines = [f"| | {' | '.join(SCORERS)} |", "| --- " * (1 + len(SCORERS)) + "|"]
    for part in found.values():
        for name, each in part.items():
            cells = [f"{each[scorer]['mean']:+.3f} ± {each[scorer]['half']:.3f}" for scorer in SCORERS]
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/circle"))
    parser.add_argument("--pairs", type=int, default=450, help="of one round; three rounds have a third of it each")
    parser.add_argument("--steps", type=int, default=66)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--prompts", type=int, default=200, help="of the test split")
    parser.add_argument("--at-once", type=int, default=2)
    given = parser.parse_args()
    folder = given.out.absolute()
    prompts, draw = ["toyworld", "prompts", "--out"], ["evaluate", "generate", "--model", BASE]
    first = [
        [*prompts, str(folder / "train.txt"), "--split", "train", "--limit", str(given.pairs)],
        [*prompts, str(folder / "test.txt"), "--split", "test", "--limit", str(given.prompts)],
        [*draw, "--out", str(folder / "base"), "--prompts", str(folder / "test.txt"), *_DRAW],
    ]
    run_jobs("base", [Job(name="base", folder=folder, steps=first)], at_once=1)
    jobs = [job for seed in range(given.seeds) for job in jobs_of(folder, seed, given.pairs, given.steps)]
    run_jobs("circle", jobs, at_once=given.at_once)
    found = results(folder, given.seeds)
    spent, size = costs(folder, given.seeds), {name: vars(given)[name] for name in ("pairs", "steps", "prompts")}
    write_file(folder / "circle.json", json.dumps({**found, "seconds": spent, **size}, indent=1) + "\n")
    print(table(found))
    for of, seconds in spent.items():
        print(f"seconds by {of}: " + ", ".join(f"{name} {value:.0f}" for name, value in seconds.items()))


if __name__ == "__main__":
    main()
