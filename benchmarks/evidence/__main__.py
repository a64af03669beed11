"""`python -m benchmarks.evidence`: make what is missing, then write docs/evidence.json, the plots, and the tables."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import argparse
import itertools
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.evidence import conditions as c
from benchmarks.evidence import results as r
from benchmarks.evidence.conditions import Run
from benchmarks.evidence.jobs import Job, run_jobs
from benchmarks.evidence.online import train_online


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="jobs at once, one thread each")
    phases = {
        "world": _world, "grid": _grid, "seeds": _seeds, "same-calls": _same_calls, "same-rate": _same_rate,
        "ablation-caches": _ablation_caches, "ablations": _ablations, "head-to-head": _head_to_head, "results": _results,
    }
    parser.add_argument("--until", choices=list(phases), default="results", help="the last phase to run")
    options = parser.parse_args()
    for name, phase in phases.items():
        phase(options.processes)
        if name == options.until:
            return


def chosen() -> dict[str, dict[str, Any]]:
    """Per method the learning rate and beta that improve on the base most surely, on validation captions, seed 0.

    That is, the oracle's mean paired improvement over its standard error. The win rate alone would choose the most
    timid steps, since a tiny change for the better wins; the mean alone the most violent.
    """
    found = {}
    for method in c.METHODS:
        runs = _grid_runs(method)
        cells = [_cell(run) for run in runs]
        best = max(cells, key=lambda cell: cell["sureness"])
        found[method.name] = {"learning_rate": best["learning_rate"], "beta": best["beta"], "grid": cells}
    return found


def _cell(run: Run) -> dict[str, Any]:
    """A run of the grid in numbers."""
    scores = r.read_comparison(run.images("grid"))
    oracle = scores["toyworld-oracle"]
    low, high = oracle["mean_difference_interval"]
    return {
        "learning_rate": run.learning_rate, "beta": run.beta, "improvement": oracle["mean_difference"],
        "sureness": oracle["mean_difference"] / ((high - low) / (2 * 1.96)),
        **{name: scores[name]["win_rate"] for name in c.SCORERS},
    }


def _world(at_once: int) -> None:
    run_jobs("pairs", [Job(name="pairs", folder=c.ROOT, steps=[
        ["toyworld", "pairs", "--out", str(c.PAIRS), "--pairs", str(c.NUM_PAIRS), "--seed", "0"],
        *(
            ["toyworld", "prompts", "--split", split, "--out", str(c.prompts_file(name))]
            + ([] if limit is None else ["--limit", str(limit)])
            for name, (split, limit) in c.PROMPTS.items()
        ),
    ])], at_once=1)
    relabel = ["relabel", str(c.CLEAN.folder), "--pairs", c.SOURCE, "--scorer", "toyworld-oracle", "--set", c.LABELS]
    run_jobs("caches", [
        Job(name="cache", folder=cache.folder.with_name(f"{cache.name}-log"),
            steps=[cache.command(), *([relabel] if cache is c.CLEAN else [])])
        for cache in c.MAIN_CACHES
    ], at_once=at_once)
    run_jobs("base", [
        Job(name="images", folder=c.base_images(name).with_name(f"{name}-log"),
            steps=c.picture_commands(c.BASE, c.base_images(name), name))
        for name in c.PROMPTS
    ], at_once=at_once)


def _grid_runs(method: c.Method) -> list[Run]:
    return [
        Run(
            label=method.name, objective=method.objective, cache=method.cache, learning_rate=rate, beta=beta,
            seed=c.GRID_SEED, extra=method.extra,
        )
        for rate, beta in itertools.product(c.LEARNING_RATES, method.betas)
    ]


def _job(run: Run, prompts: str) -> Job:
    """Train, if that is not done yet, and compare with the base on `prompts`. A longer run goes on from the usual one."""
    shorter = replace(run, steps=c.STEPS)
    begin = [lambda: shutil.copytree(shorter.folder / "train", run.folder / "train", dirs_exist_ok=True)]
    listed = [run.cache.write_only] if run.cache.first else []
    return Job(name=prompts, folder=run.folder, steps=[
        *(begin if run.steps != c.STEPS else []), *listed, run.train_command(),
        *c.picture_commands(run.pipeline, run.images(prompts), prompts),
    ])


def _grid(at_once: int) -> None:
    jobs = [_job(run, "grid") for method in c.METHODS for run in _grid_runs(method)]
    run_jobs("grid", jobs, at_once=at_once)


def final_runs(method: c.Method, *, steps: int = c.STEPS) -> list[Run]:
    """The runs of the main table: the method's chosen setting, every test seed."""
    best = chosen()[method.name]
    return _test_runs(method, best["learning_rate"], best["beta"], steps=steps)


def _test_runs(method: c.Method, rate: float, beta: float | None, *, steps: int = c.STEPS) -> list[Run]:
    return [
        Run(
            label=method.name, objective=method.objective, cache=method.cache, learning_rate=rate, beta=beta, seed=seed,
            steps=steps, extra=method.extra,
        )
        for seed in c.TEST_SEEDS
    ]


def _seeds(at_once: int) -> None:
    runs = [run for group in zip(*(final_runs(method) for method in c.METHODS), strict=True) for run in group]
    run_jobs("seeds", [_job(run, "test") for run in runs], at_once=at_once)


def _sft_reference() -> c.CacheChoice:
    """InPO's cache made by the first SFT model, which is then start and reference."""
    return c.CacheChoice(name="reference-sft", model=str(final_runs(c.SFT)[0].pipeline))


def _ablation_caches(at_once: int) -> None:
    caches = [cache for cache in (*c.ABLATIONS.values(), _sft_reference()) if cache not in c.MAIN_CACHES]
    run_jobs("ablation caches", [
        Job(name="cache", folder=cache.folder.with_name(f"{cache.name}-log"), steps=[cache.command()])
        for cache in caches
    ], at_once=at_once)


def ablation_runs() -> dict[str, list[Run]]:
    """Every ablation's runs, the seeds in order."""
    best = chosen()[c.INPO.name]
    rate, beta = best["learning_rate"], best["beta"]
    caches = c.ABLATIONS | {c.SFT_REFERENCE: _sft_reference()}
    return {
        name: [
            Run(
                label=c.INPO.name if cache is c.CLEAN else f"ablation {name}", objective="inpo", cache=cache,
                learning_rate=rate, beta=beta, seed=seed,
            )
            for seed in c.ABLATION_SEEDS
        ]
        for name, cache in caches.items()
    }


def online_runs() -> list[Run]:
    """Placeholders for folders: the online runs read no cache."""
    best = chosen()[c.INPO.name]
    return [
        Run(
            label=f"ablation {c.ONLINE}", objective="inpo", cache=c.ABLATIONS["faithful grid"],
            learning_rate=best["learning_rate"], beta=best["beta"], seed=seed,
        )
        for seed in c.ABLATION_SEEDS
    ]


def _ablations(at_once: int) -> None:
    for number, online in enumerate(online_runs()):
        jobs = [_job(runs[number], "validation") for runs in ablation_runs().values()]
        jobs.append(Job(name="validation", folder=online.folder, steps=[
            lambda run=online: train_online(
                run.pipeline, learning_rate=run.learning_rate, beta=run.beta or 0.0, steps=run.steps, seed=run.seed
            ),
            *c.picture_commands(online.pipeline, online.images("validation"), "validation"),
        ]))
        run_jobs(f"ablations, seed {online.seed}", jobs, at_once=at_once)
    trained = final_runs(c.INPO)[0].pipeline
    drift = c.ROOT / "drift.log"
    run_jobs("drift", [Job(name="drift", folder=drift.parent, steps=[
        ["inspect", "drift", str(c.CLEAN.folder), "--model", str(trained), "--sample", "64", "--json"],
    ])], at_once=1)


def same_calls_steps() -> dict[str, int]:
    """Steps that cost as many network calls as InPO's cache and training; a backward pass counts as two calls.

    Per image: InPO's cache 1 + n calls a pair's side, a cache of noise K; a trained record 3 (SFT trains one side).
    """
    whole = 2 * c.NUM_PAIRS * 11 + c.STEPS * c.BATCH * 2 * 3
    rest = whole - 2 * c.NUM_PAIRS * 4
    return {method.name: rest // (c.BATCH * (1 if method is c.SFT else 2) * 3) for method in c.SAME_CALLS}


def same_calls_runs() -> dict[str, list[Run]]:
    """The finished runs, prolonged."""
    steps = same_calls_steps()
    runs = {method.name: final_runs(method, steps=steps[method.name]) for method in c.SAME_CALLS}
    return {name: [run for run in each if run.seed in c.SAME_CALLS_SEEDS] for name, each in runs.items()}


def _same_calls(at_once: int) -> None:
    run_jobs("same calls", [_job(run, "test") for runs in same_calls_runs().values() for run in runs], at_once=at_once)


def same_rate_runs() -> dict[float, tuple[list[Run], dict[str, list[Run]]]]:
    """By learning rate: Diffusion-DPO's runs, and InPO's by method."""
    return {
        rate: (
            _test_runs(c.DPO, rate, c.SAME_RATE_BETA),
            {method.name: _test_runs(method, rate, c.SAME_RATE_BETA) for method in methods},
        )
        for rate, methods in c.SAME_RATE.items()
    }


def _same_rate(at_once: int) -> None:
    groups = [group for dpo, ours in same_rate_runs().values() for group in (dpo, *ours.values())]
    run_jobs("same rate", [_job(run, "test") for runs in zip(*groups, strict=True) for run in runs], at_once=at_once)


def _head_to_head(at_once: int) -> None:
    """Every method against Diffusion-DPO with the same seed, and the ablations against cached noise."""
    pairs: list[tuple[Path, Path, Path]] = []
    for method in c.METHODS:
        if method is not c.DPO:
            for ours, theirs in zip(final_runs(method), final_runs(c.DPO), strict=True):
                pairs.append((theirs.images("test"), ours.images("test"), ours.folder / "test-against-dpo"))
    for dpo, groups in same_rate_runs().values():
        for runs in groups.values():
            for ours, theirs in zip(runs, dpo, strict=True):
                pairs.append((theirs.images("test"), ours.images("test"), ours.folder / "test-against-dpo-same-rate"))
    noise = {run.seed: run for run in ablation_runs()["noise at every point (DPO on cached noise)"]}
    for name, runs in [*ablation_runs().items(), (c.ONLINE, online_runs())]:
        if not name.startswith("noise at every"):
            for ours in _finished(runs, "validation"):
                theirs = noise[ours.seed].images("validation")
                pairs.append((theirs, ours.images("validation"), ours.folder / "validation-against-noise"))
    run_jobs("head to head", [
        Job(name=out.name, folder=out.parent, steps=[c.compare_command(a, b, out)])
        for a, b, out in pairs if not (out / "comparison.json").exists()
    ], at_once=at_once)


def _finished(runs: list[Run], prompts: str) -> list[Run]:
    """Those whose images have been compared with the base's."""
    return [run for run in runs if Job(name=prompts, folder=run.folder, steps=()).mark.exists()]


def _drift() -> dict[str, Any]:
    """What `inpo inspect drift --json` printed."""
    text = (c.ROOT / "drift.log").read_text()
    return json.loads(text[text.index("{") :])


def _results(at_once: int) -> None:
    """docs/evidence.json, the plots, and the tables as Markdown on the terminal."""
    best = chosen()
    main_rows = {
        method.name: {
            "learning_rate": best[method.name]["learning_rate"], "beta": best[method.name]["beta"],
            "base": r.against_base(final_runs(method), "test"),
            "dpo": None if method is c.DPO else r.head_to_head(final_runs(method), "test-against-dpo"),
        }
        for method in c.METHODS
    }
    same_calls = {}
    for name, every in same_calls_runs().items():
        runs = _finished(every, "test")
        row = main_rows[name] | {"base": r.against_base(runs, "test"), "dpo": None}
        same_calls[f"{name}, {runs[0].steps} steps"] = row
    same_rate = {}
    for dpo, groups in same_rate_runs().values():
        for name, runs in {c.DPO.name: dpo, **groups}.items():
            same_rate[f"{name}, {runs[0].learning_rate:g}"] = {
                "learning_rate": runs[0].learning_rate, "beta": runs[0].beta, "base": r.against_base(runs, "test"),
                "dpo": None if runs is dpo else r.head_to_head(runs, "test-against-dpo-same-rate"),
            }
    noise = "noise at every point (DPO on cached noise)"
    ablations = {
        name: {
            "base": r.against_base(runs, "validation"),
            "noise": None if name == noise else r.head_to_head(runs, "validation-against-noise"),
        }
        for name, every in [*ablation_runs().items(), (c.ONLINE, online_runs())]
        if (runs := _finished(every, "validation"))
    }
    accuracy = {method.name: r.accuracies(final_runs(method)) for method in c.METHODS}
    values = {
        "steps": c.STEPS, "batch": c.BATCH, "pairs": c.NUM_PAIRS, "test_seeds": c.TEST_SEEDS,
        "ablation_seeds": c.ABLATION_SEEDS, "chosen": best, "main": main_rows, "same_calls": same_calls, "same_rate": same_rate,
        "ablations": ablations, "accuracy": accuracy, "drift": _drift(),
    }
    Path("docs/evidence.json").write_text(json.dumps(values, indent=1) + "\n")
    r.draw_wins(main_rows, Path("docs/images/evidence.png"), title="Test captions, five seeds, 95% intervals")
    r.draw_wins(ablations, Path("docs/images/evidence-ablations.png"), title="Variations of InPO, validation captions")
    for title, text in {
        "Main table": r.main_table(main_rows), "Same network calls": r.main_table(same_calls),
        "Same learning rate": r.main_table(same_rate),
        "Ablations": r.ablation_table(ablations), "Accuracy": r.accuracy_table(accuracy), "Grid": r.grid_table(best),
    }.items():
        print(f"\n{title}\n\n{text}")


if __name__ == "__main__":
    main()
