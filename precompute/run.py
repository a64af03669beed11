"""A precompute run from resolved settings to its exit code."""

import json
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from inpo.common.cache import CacheWriter, Commit, Manifest, open_cache
from inpo.common.cache.identity import check_identity
from inpo.common.cache.schema import MANIFEST
from inpo.common.cache.store import CacheStore, is_remote
from inpo.common.completeness import check_complete
from inpo.common.console import console
from inpo.common.errors import CacheMismatch, DataError, InpoError, UsageError, command
from inpo.common.models import Model
from inpo.common.pairs import SKIP_REASONS, open_source
from inpo.common.pairs.walk import count_not_read, not_read_words
from inpo.common.printable import shown
from inpo.common.processes import processes
from inpo.common.progress import ProgressReport
from inpo.common.recipe import DataSection, ModelSection, read_recipe, resolve, to_toml
from inpo.common.space import human_bytes
from inpo.precompute.engines.local import run_local
from inpo.precompute.pipeline import Outcome
from inpo.precompute.plan import Plan, check_disk, make_plan, print_plan
from inpo.precompute.settings import PrecomputeSettings, build_manifest
from inpo.precompute.tasks import ShardTask, list_tasks
from inpo.precompute.worker import load_components


@dataclass(frozen=True, kw_only=True)
class RayOptions:
    """How the ray engine finds its workers."""

    address: str | None = None
    gpus_per_worker: float | None = None
    workers: int | None = None


@dataclass(frozen=True, kw_only=True)
class _Resolved:
    model_section: ModelSection
    data: DataSection
    settings: PrecomputeSettings

    def to_toml(self) -> str:
        return to_toml({"model": self.model_section, "data": self.data, "precompute": self.settings})


def _resolve(
    recipe: Path | None, model_flags: Mapping[str, Any], data_flags: Mapping[str, Any], flags: Mapping[str, Any]
) -> _Resolved:
    sections = read_recipe(recipe)
    return _Resolved(
        model_section=resolve(ModelSection, "model", sections, model_flags),
        data=resolve(DataSection, "data", sections, data_flags),
        settings=resolve(PrecomputeSettings, "precompute", sections, flags),
    )


def run_precompute(
    recipe: Path | None,
    model_flags: Mapping[str, Any],
    data_flags: Mapping[str, Any],
    flags: Mapping[str, Any],
    *,
    ray_options: RayOptions,
    dry_run: bool,
) -> int:
    """Run (or only plan) a precompute. Returns the exit code: 1 if an input shard could not be read, or if the source
    has no pair at all; its empty commits are taken back then."""
    resolved = _resolve(recipe, model_flags, data_flags, flags)
    settings, cache = resolved.settings, resolved.data.need("cache")
    if settings.engine != "ray" and ray_options != RayOptions():
        raise UsageError(
            "Ray options without the ray engine.",
            where="--engine",
            expected="ray",
            got=settings.engine,
            fix="add --engine ray, or leave out --ray-address, --gpus-per-worker and --ray-workers",
        )
    state = processes()
    is_main = state.is_main_process
    model = resolved.model_section.open()
    manifest = build_manifest(settings, model, device_type=_device_type(settings, ray_options))
    pairs = resolved.data.need("pairs")
    if is_main:
        check_complete(model)
    source = open_source(pairs, allow_remote=resolved.data.allow_remote)
    tasks, unreadable = list_tasks(source, limit=settings.limit)
    if not tasks:  # before there is a cache: the next try may have other settings
        raise _nothing_to_read(pairs, unreadable)
    committed = _committed(cache, manifest)
    plan = make_plan(tasks, committed, manifest, model, cache=cache)
    if is_main:
        print(resolved.to_toml(), flush=True)
        print_plan(plan, console())
    check_disk(plan, cache)
    if dry_run:
        return 0
    writer = CacheWriter.open(cache, manifest)
    if is_main:
        writer.write_configuration(resolved.to_toml())
        for error in unreadable:
            print(f"error: {error}", file=sys.stderr)
        not_read = count_not_read(source, {task.input_shard.name: task.input_shard for task in tasks}.values())
        if not_read:
            print(f"note: not read, for no pair is made of it: {not_read_words(not_read)}", file=sys.stderr)
        for line in _input_warnings(writer, tasks, committed):
            print(f"warning: {line}", file=sys.stderr)
    failures: list[DataError] = list(unreadable)
    total = sum(task.stop - task.start for task in tasks if task.name not in committed)
    whole_total = total if state.num_processes == 1 or settings.engine == "ray" else total // state.num_processes
    start = time.perf_counter()
    with ProgressReport("precompute", total=whole_total, unit="pairs", quiet=not is_main) as progress:

        def on_outcome(outcome: Outcome) -> None:
            if outcome.error is not None:
                failures.append(outcome.error)
                print(f"error: {outcome.error}", file=sys.stderr, flush=True)
            progress.advance(outcome.task.stop - outcome.task.start)

        if settings.engine == "ray":
            from inpo.precompute.engines.ray import run_ray

            remaining = [task for task in tasks if task.name not in committed]
            report = run_ray(
                remaining,
                model=resolved.model_section,
                writer=writer,
                settings=settings,
                options=ray_options,
                on_outcome=on_outcome,
            )
        else:
            report = run_local(tasks, model=model, writer=writer, settings=settings, on_outcome=on_outcome)
    if is_main:
        num_pairs = _print_summary(
            writer, tasks, failures, time.perf_counter() - start, report, _next_command(resolved, recipe)
        )
        if num_pairs == 0:
            _take_back(writer, tasks)
            return 1
    return 1 if failures else 0


def run_plan(
    recipe: Path | None,
    model_flags: Mapping[str, Any],
    data_flags: Mapping[str, Any],
    flags: Mapping[str, Any],
    *,
    gpus: int,
    calibrate: bool,
    as_json: bool,
) -> None:
    """Print what a run would cost; raises StorageError if the disk is too small for it."""
    resolved = _resolve(recipe, model_flags, data_flags, flags)
    cache = resolved.data.need("cache")
    model = resolved.model_section.open()
    manifest = build_manifest(resolved.settings, model, device_type=_device_type(resolved.settings, None))
    pairs = resolved.data.need("pairs")
    check_complete(model)
    tasks, unreadable = list_tasks(
        open_source(pairs, allow_remote=resolved.data.allow_remote), limit=resolved.settings.limit
    )
    if not tasks:
        raise _nothing_to_read(pairs, unreadable)
    plan = make_plan(tasks, _committed(cache, manifest), manifest, model, cache=cache)
    hours = _calibrated_hours(plan, model, manifest, resolved.settings) if calibrate else None
    if as_json:
        print(json.dumps(plan.to_json() | {"device_hours": hours, "gpus": gpus}, indent=1))
    else:
        print_plan(plan, console(), gpu_hours=hours, gpus=gpus)
    check_disk(plan, cache)


def _nothing_to_read(pairs: str, unreadable: list[DataError]) -> DataError:
    """Why a source gives no work at all: what is wrong with its first file, or that its files hold no rows."""
    if not unreadable:
        return DataError(
            "The pair source has no rows.",
            where=pairs,
            expected="at least one pair",
            got="0 rows",
            fix="`inpo data check` shows what a source holds; docs/data.md shows the three kinds",
        )
    if len(unreadable) > 1:
        print(f"none of {len(unreadable)} input shards can be read; the first:", file=sys.stderr, flush=True)
    return unreadable[0]


def _device_type(settings: PrecomputeSettings, ray_options: RayOptions | None) -> str:
    """The device that will do the work. Ray's workers may have GPUs that this process has not, so the cluster is asked;
    without `ray_options` nothing is started and this machine stands for it."""
    if settings.engine == "ray" and ray_options is not None:
        from inpo.precompute.engines.ray_cluster import connect, has_gpus

        connect(ray_options)
        return "cuda" if has_gpus() else "cpu"
    return processes().device.type


def _committed(cache: str, manifest: Manifest) -> set[str]:
    """Names of shards done already; {} for a cache that does not exist yet. Raises CacheMismatch for another's."""
    if not is_remote(cache) and not Path(cache).is_dir():
        if Path(cache).exists():
            raise UsageError("The cache is no folder.", where=cache, got="a file", fix="choose another --cache")
        return set()
    store = CacheStore(cache)
    data = store.get(MANIFEST)
    if data is None:
        # A manifest that another process is writing at this moment is no foreign file.
        foreign = [] if is_remote(cache) else [e.name for e in Path(cache).iterdir() if not e.name.startswith(MANIFEST)]
        if foreign and store.get(MANIFEST) is None:
            if "commits" in foreign:
                open_cache(cache)  # raises CacheMissing, which tells a cache that has lost its manifest
            raise CacheMismatch(
                "The folder is not empty and holds no cache.",
                where=cache,
                expected="a cache, or a new or empty folder",
                got=", ".join(sorted(foreign)[:6]),
                fix="choose another --cache, so that nothing of yours is mixed with the cache",
            )
        return set()
    existing: Manifest = Manifest.from_json(data, store.path(MANIFEST))
    committed = CacheWriter(store, existing).committed()
    try:
        check_identity(existing, manifest, cache)
    except CacheMismatch as error:
        if not committed:  # what a first try leaves that failed for its model or its pairs
            error.fix = "nothing is committed here yet: remove this cache and run again, or repeat its settings"
        raise
    return committed


def _input_warnings(writer: CacheWriter, tasks: list[ShardTask], committed: set[str]) -> list[str]:
    """What a user should know about inputs before days of work: a line per committed shard whose input file is not
    what it was, per such input that cannot be read any more, and per new input that is a committed one renamed."""
    paths = [f"commits/{name}.json" for name in sorted(committed)]
    documents = zip(sorted(committed), paths, writer.store.get_many(paths), strict=True)
    commits = {
        name: Commit.from_json(data, writer.store.path(path))
        for name, path, data in documents
        if isinstance(data, bytes)
    }
    made_from = {commit.source.fingerprint: commit.source.input_shard for commit in commits.values()}
    lines: list[str] = []
    fingerprints: dict[str, str | None] = {}
    for task in tasks if commits else []:
        name, commit = task.input_shard.name, commits.get(task.name)
        is_first = name not in fingerprints
        if is_first:
            try:
                fingerprints[name] = task.input_shard.fingerprint()
            except InpoError as error:  # the run itself meets and reports it where there is work to do
                fingerprints[name] = None
                if commit is not None:
                    lines.append(f"input {name} cannot be compared with what its shards were made from: {error}")
        found = fingerprints[name]
        if found is None:
            continue
        if commit is not None and commit.source.fingerprint != found:
            lines.append(
                f"input {name} has changed since shard {task.name} was committed from it; the committed shard stays. "
                f"To make it again, move {writer.store.path(f'commits/{task.name}.json')} away"
            )
        if commit is None and is_first and made_from.get(found, name) != name:
            lines.append(
                f"input {name} holds what {made_from[found]} held when this cache was made from it: its pairs "
                f"come into "
                f"the cache twice. If the file was renamed or moved, stop and give it back its name"
            )
    return lines


def _calibrated_hours(plan: Plan, model: Model, manifest: Manifest, settings: PrecomputeSettings) -> float:
    """Device hours, from the median time of a few full network batches here; VAE and text are not counted."""
    device = processes().device
    components = load_components(model, manifest, device)
    latents = 2 * settings.batch_size
    x = torch.randn(latents, *manifest.latent_shape, device=device)
    condition = model.family.blank(model.config, latents, settings.resolution).to(device)
    timestep = torch.full((latents,), 500, device=device)
    times = []
    with torch.inference_mode():
        for _ in range(5):
            clock = time.perf_counter()
            components.denoiser.predict(x, timestep, condition).sum().item()
            times.append(time.perf_counter() - clock)
    return plan.network_calls / latents * sorted(times[1:])[len(times[1:]) // 2] / 3600


def _next_command(resolved: _Resolved, recipe: Path | None) -> str:
    """The whole command that trains on this cache."""
    cache, model = shown(resolved.data.need("cache")), resolved.model_section
    words = ["train", "--cache", cache]
    for option, value in (
        ("--model", model.model),
        ("--variant", model.variant),
        ("--model-config", model.model_config_dir),
        ("--vae", model.vae),
    ):
        words += [option, value] if value else []
    if recipe is not None:
        words += ["--recipe", str(recipe)]
    if "output" not in read_recipe(recipe).get("train", {}):
        words += ["--output", "run" if is_remote(cache) else f"{cache.rstrip('/')}-run"]
    return command(*words)


def _print_summary(
    writer: CacheWriter,
    tasks: list[ShardTask],
    failures: list[DataError],
    seconds: float,
    report: str,
    next_command: str,
) -> int:
    """The final table: what is committed now, what was skipped and why. Returns the number of pairs of these tasks."""
    cache = open_cache(writer.store.address, allow_empty=True)
    names = {task.name for task in tasks}
    commits = {name: commit for name, commit in cache.commits.items() if name in names}
    skipped: dict[str, int] = {}
    counts: dict[str, int] = {}
    for commit in commits.values():
        for reason, count in commit.skipped.items():
            skipped[reason] = skipped.get(reason, 0) + count
        for what, count in commit.counts.items():
            counts[what] = counts.get(what, 0) + count
    size = sum(sum(commit.files.values()) for commit in commits.values())
    num_pairs = sum(commit.num_pairs for commit in commits.values())
    print(
        f"committed: {len(commits)} of {len(tasks)} shards, {num_pairs} pairs, {human_bytes(size)}, in {seconds:.1f} s"
    )
    print(f"time: {report}")
    for reason, count in sorted(skipped.items()):
        meaning = SKIP_REASONS.get(reason, "a number that would be stored is NaN or infinite")  # type: ignore[call-overload]
        print(f"skipped: {count} x {reason}: {meaning}")
    if skipped:
        print(f"skipped rows are listed by pair id in {writer.store.path('skipped')}")
    if "unreachable" in skipped:
        print(
            "unreachable images are not asked for again: to make a shard with them anew, move its "
            f"{writer.store.path('commits')}/SHARD.json away and run again"
        )
    for what, count in sorted(counts.items()):
        print(f"counted: {count} x {what}")
    if failures:
        print(f"unreadable input shards: {len(failures)}; the others are done")
    if num_pairs == 0:
        print(
            "no pair was kept, so nothing of this source stays committed: "
            f"`{command('data', 'check', tasks[0].location)}` counts the reasons",
            flush=True,
        )
        return 0
    print(f"next: {command('inspect', 'summary', writer.store.location)}")
    print(f"next: {next_command}", flush=True)
    return num_pairs


def _take_back(writer: CacheWriter, tasks: list[ShardTask]) -> None:
    """Remove the commits of a source that gave no pair: a cache without pairs is none, and the same command is to look
    again when the images or the settings have been put right, which a committed shard would not."""
    for task in tasks:
        writer.store.remove(f"commits/{task.name}.json")
