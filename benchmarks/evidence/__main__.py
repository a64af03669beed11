"""`python -m benchmarks.evidence [--long | --flow]`: make what is missing, then write docs/evidence*.json, plots and
tables.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import argparse
import itertools
import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.evidence import conditions as c
from benchmarks.evidence import results as r
from benchmarks.evidence.conditions import Run
from benchmarks.evidence.jobs import Job, run_jobs
from benchmarks.evidence.online import train_online

AGAINST_DPO, AGAINST_NOISE = "test-against-dpo", "test-against-noise"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="jobs at once, one thread each")
    phases = {"world": _world, "grid": _grid, "seeds": _seeds, "same-calls": _same_calls, "variations": _variations}
    parser.add_argument("--until", choices=list(phases)[2:], default="variations", help="the last kind of runs to make")
    parser.add_argument("--long", action="store_true", help="three times the training, every test caption")
    parser.add_argument("--flow", action="store_true", help="the toy world's flow in place of its UNet, fewer methods")
    options = parser.parse_args()
    if options.long and options.flow:
        parser.error("--long and --flow: one of them")
    if options.flow:
        c.length, options.until = c.FLOW, "seeds"
    elif options.long:
        c.length = c.LONG
    for name, phase in phases.items():
        phase(options.processes)
        if name == options.until:
            break
    _head_to_head(options.processes)
    _results()


def chosen() -> dict[str, dict[str, Any]]:
    """Per method the learning rate and beta that improve on the base most surely, on validation captions, seed 0.

    That is, the oracle's mean paired improvement over its standard error. The win rate alone would choose the most
    timid steps, since a tiny change for the better wins; the mean alone the most violent.
    """
    found = {}
    for method in c.methods():
        runs = _grid_runs(method)
        cells = [_cell(run) for run in runs]
        best = max(cells, key=lambda cell: cell["sureness"])
        found[method.name] = {"learning_rate": best["learning_rate"], "beta": best["beta"], "grid": cells}
    return found


def _cell(run: Run) -> dict[str, Any]:
    """A run of the grid in numbers."""
    scores = r.read_comparison(run.images("validation"))
    oracle = scores["toyworld-oracle"]
    low, high = oracle["mean_difference_interval"]
    return {
        "learning_rate": run.learning_rate,
        "beta": run.beta,
        "improvement": oracle["mean_difference"],
        "sureness": oracle["mean_difference"] / ((high - low) / (2 * 1.96)),
        **{name: scores[name]["win_rate"] for name in c.SCORERS},
    }


def _world(at_once: int) -> None:
    run_jobs(
        "pairs",
        [
            Job(
                name="pairs",
                folder=c.length.root,
                steps=[
                    [
                        "toyworld",
                        "pairs",
                        "--out",
                        str(c.length.pairs),
                        "--pairs",
                        str(c.NUM_PAIRS),
                        "--seed",
                        "0",
                        "--model",
                        c.length.model,
                    ],
                    *(
                        ["toyworld", "prompts", "--split", split, "--out", str(c.prompts_file(split))]
                        + ([] if limit is None else ["--limit", str(limit)])
                        for split, limit in c.length.captions.items()
                    ),
                ],
            )
        ],
        at_once=1,
    )
    relabel = [
        "relabel",
        str(c.CLEAN.folder),
        "--pairs",
        c.length.source,
        "--scorer",
        "toyworld-oracle",
        "--set",
        c.LABELS,
    ]
    varied = () if c.length.only else (*c.NOISED.values(), *c.OTHER_CACHES.values())
    wanted = dict.fromkeys([c.NOISE, *(method.cache for method in c.methods()), *varied])
    caches = [_cache_job(cache) for cache in wanted if cache is not c.CLEAN]
    caches.append(_cache_job(c.CLEAN, [relabel]))
    images = [
        Job(
            name="images",
            folder=c.base_images(name).with_name(f"{name}-log"),
            steps=c.picture_commands(c.length.base, c.base_images(name), name),
        )
        for name in c.length.captions
    ]
    run_jobs("caches and the base's images", [*caches, *images], at_once=at_once)


def _cache_job(cache: c.CacheChoice, more: Sequence[list[str]] = ()) -> Job:
    folder = cache.folder.with_name(f"{cache.name}-log")
    return Job(name="cache", folder=folder, steps=[cache.command(), *more])


def _grid_runs(method: c.Method) -> list[Run]:
    return [
        Run(
            label=method.name,
            objective=method.objective,
            cache=method.cache,
            learning_rate=rate,
            beta=beta,
            seed=c.GRID_SEED,
            extra=method.extra,
        )
        for rate, beta in itertools.product(c.length.learning_rates, method.betas)
    ]


def _job(run: Run, prompts: str) -> Job:
    """Train, if that is not done yet, and compare with the base on `prompts`. A longer run goes on from the usual
    one.
    """
    shorter = replace(run, longer=None)
    begin = [lambda: shutil.copytree(shorter.folder / "train", run.folder / "train", dirs_exist_ok=True)]
    listed = [run.cache.write_only] if run.cache.first else []
    return Job(
        name=prompts,
        folder=run.folder,
        steps=[
            *(begin if run.longer else []),
            *listed,
            run.train_command(),
            *c.picture_commands(run.pipeline, run.images(prompts), prompts),
        ],
    )


def _grid(at_once: int) -> None:
    jobs = [_job(run, "validation") for method in c.methods() for run in _grid_runs(method)]
    run_jobs("grid", jobs, at_once=at_once)


def final_runs(method: c.Method, *, longer: int | None = None) -> list[Run]:
    """The runs of the main table: the method's chosen setting, every test seed."""
    best = chosen()[method.name]
    return _test_runs(method, best["learning_rate"], best["beta"], longer=longer)


def _test_runs(method: c.Method, rate: float, beta: float | None, *, longer: int | None = None) -> list[Run]:
    return [
        Run(
            label=method.name,
            objective=method.objective,
            cache=method.cache,
            learning_rate=rate,
            beta=beta,
            seed=seed,
            longer=longer,
            extra=method.extra,
        )
        for seed in c.TEST_SEEDS
    ]


def _seeds(at_once: int) -> None:
    runs = [run for group in zip(*(final_runs(method) for method in c.methods()), strict=True) for run in group]
    run_jobs("seeds", [_job(run, "test") for run in runs], at_once=at_once)


def _sft_reference() -> c.CacheChoice:
    """InPO's cache made by the first SFT model, which is then start and reference."""
    return c.CacheChoice(name="reference-sft", model=str(final_runs(c.SFT)[0].pipeline))


def variation_runs() -> dict[str, list[Run]]:
    """InPO on every cache, all with the learning rate and beta chosen for InPO, the seeds in order.

    The starts, noise at every point among them, have all test seeds. Online runs read no cache; the one given here is
    there for the folder's name.
    """
    best = chosen()[c.INPO.name]
    rate, beta = best["learning_rate"], best["beta"]
    starts = {c.ONLY_NOISE: c.DPO, "clean start, n = 10": c.INPO} | {
        f"noised start {share}": method for share, method in c.STARTS.items()
    }
    others = {**c.OTHER_CACHES, c.SFT_REFERENCE: _sft_reference(), c.ONLINE: c.OTHER_CACHES["faithful grid"]}
    return {name: _test_runs(method, rate, beta) for name, method in starts.items()} | {
        name: [
            Run(label=f"variation {name}", objective="inpo", cache=cache, learning_rate=rate, beta=beta, seed=seed)
            for seed in c.FEWER_SEEDS
        ]
        for name, cache in others.items()
    }


def _online_job(run: Run) -> Job:
    return Job(
        name="test",
        folder=run.folder,
        steps=[
            lambda: train_online(
                run.pipeline,
                source=c.length.source,
                learning_rate=run.learning_rate,
                beta=run.beta or 0.0,
                steps=run.steps,
                batch=c.length.batch,
                seed=run.seed,
            ),
            *c.picture_commands(run.pipeline, run.images("test"), "test"),
        ],
    )


def _variations(at_once: int) -> None:
    groups = variation_runs()
    jobs = [_online_job(run) for run in groups[c.ONLINE]]
    jobs += [_job(run, "test") for name, runs in groups.items() if name != c.ONLINE for run in runs]
    jobs.append(
        Job(
            name="drift",
            folder=c.length.root,
            steps=[
                [
                    "inspect",
                    "drift",
                    str(c.CLEAN.folder),
                    "--model",
                    str(final_runs(c.INPO)[0].pipeline),
                    "--sample",
                    "64",
                    "--json",
                ]
            ],
        )
    )
    run_jobs("variations", jobs, at_once=at_once)


def _same_calls_methods() -> list[c.Method]:
    return [method for method in c.SAME_CALLS if method in c.methods()]


def same_calls_steps() -> dict[str, int]:
    """Steps that cost as many network calls as InPO's cache and training; a backward pass counts as two calls.

    Per image: InPO's cache 1 + n calls a pair's side, a cache of noise K; a trained record 3 (SFT trains one side).
    """
    whole = 2 * c.NUM_PAIRS * 11 + c.length.steps * c.length.batch * 2 * 3
    rest = whole - 2 * c.NUM_PAIRS * 4
    return {
        method.name: rest // (c.length.batch * (1 if method is c.SFT else 2) * 3) for method in _same_calls_methods()
    }


def same_calls_runs() -> dict[str, list[Run]]:
    """The finished runs, prolonged."""
    steps = same_calls_steps()
    runs = {method.name: final_runs(method, longer=steps[method.name]) for method in _same_calls_methods()}
    return {name: [run for run in each if run.seed in c.FEWER_SEEDS] for name, each in runs.items()}


def _same_calls(at_once: int) -> None:
    prolonged = [_job(run, "test") for runs in same_calls_runs().values() for run in runs]
    run_jobs("same calls, and SFT's cache", [*prolonged, _cache_job(_sft_reference())], at_once=at_once)


def _finished(groups: dict[str, list[Run]]) -> dict[str, list[Run]]:
    """The groups of which every run has been compared with the base."""
    return {
        name: runs
        for name, runs in groups.items()
        if all(Job(name="test", folder=run.folder, steps=()).mark.exists() for run in runs)
    }


def _head_to_head(at_once: int) -> None:
    """Every method against Diffusion-DPO with the same seed, and the variations against noise at every point."""
    methods = [run for method in c.methods() if method is not c.DPO for run in final_runs(method)]
    pairs = [(AGAINST_DPO, methods, final_runs(c.DPO))]
    variations = _finished(variation_runs())
    if noise := variations.pop(c.ONLY_NOISE, None):
        pairs.append((AGAINST_NOISE, [run for runs in variations.values() for run in runs], noise))
    jobs = []
    for name, ours, theirs in pairs:
        images = {run.seed: run.images("test") for run in theirs}
        for run in ours:
            compare = c.compare_command(images[run.seed], run.images("test"), run.folder / name)
            jobs.append(Job(name=name, folder=run.folder, steps=[compare]))
    run_jobs("head to head", jobs, at_once=at_once)


def _results() -> None:
    """docs/evidence.json, or that of another length, the plots, and the tables as Markdown on the terminal."""
    best = chosen()
    main_rows = {
        method.name: {
            "learning_rate": best[method.name]["learning_rate"],
            "beta": best[method.name]["beta"],
            "base": r.against_base(final_runs(method), "test"),
            "dpo": None if method is c.DPO else r.head_to_head(final_runs(method), AGAINST_DPO),
        }
        for method in c.methods()
    }
    same_calls = {
        f"{name}, {runs[0].steps} steps": main_rows[name] | {"base": r.against_base(runs, "test"), "dpo": None}
        for name, runs in _finished(same_calls_runs()).items()
    }
    finished = _finished(variation_runs())
    variations = (
        {}
        if c.ONLY_NOISE not in finished
        else {
            name: {
                "base": r.against_base(runs, "test"),
                "noise": None if name == c.ONLY_NOISE else r.head_to_head(runs, AGAINST_NOISE),
            }
            for name, runs in finished.items()
        }
    )
    accuracy = {method.name: r.accuracies(final_runs(method)) for method in c.methods()}
    values = {
        "steps": c.length.steps,
        "batch": c.length.batch,
        "pairs": c.NUM_PAIRS,
        "test_seeds": c.TEST_SEEDS,
        "fewer_seeds": c.FEWER_SEEDS,
        "hours": r.hours(c.length.root),
        "chosen": best,
        "main": main_rows,
        "same_calls": same_calls,
        "variations": variations,
        "accuracy": accuracy,
        "drift": r.drift(c.length.root),
    }
    name = c.length.root.name
    Path(f"docs/{name}.json").write_text(json.dumps(values, indent=1) + "\n")
    r.draw_wins(main_rows, Path(f"docs/images/{name}.png"), title="Test captions, five seeds, 95% intervals")
    if variations:
        r.draw_wins(variations, Path(f"docs/images/{name}-variations.png"), title="Variations of InPO, test captions")
    tables = {"Main table": r.main_table(main_rows)}
    if same_calls:
        tables["Same network calls"] = r.main_table(same_calls)
    if variations:
        tables["Variations"] = r.variation_table(variations)
    tables |= {"Accuracy": r.accuracy_table(accuracy), "Grid": r.grid_table(best)}
    for title, text in tables.items():
        print(f"\n{title}\n\n{text}")
    print(f"\nhours: {values['hours']}")


if __name__ == "__main__":
    main()
