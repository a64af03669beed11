"""A precompute run from resolved settings to its exit code."""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from inpo.common.cache import CacheWriter, Commit, TextCommit, open_cache
from inpo.common.cache.commits import skipped_rows
from inpo.common.cache.store import is_remote
from inpo.common.completeness import check_complete
from inpo.common.console import console
from inpo.common.device import say_device
from inpo.common.errors import CacheIncomplete, DataError, command
from inpo.common.log import fail, is_quiet, log_file, note, say, warn
from inpo.common.models import Model
from inpo.common.options import flags as flags_of
from inpo.common.pairs import SKIP_REASONS
from inpo.common.pairs.walk import Reasons
from inpo.common.printable import shown
from inpo.common.processes import processes
from inpo.common.progress import ProgressReport
from inpo.common.recipe import read_recipe
from inpo.common.space import human_bytes
from inpo.precompute.configuration import Configuration, check_ray, configure
from inpo.precompute.engines.local import run_local
from inpo.precompute.engines.waiting_room import WaitingRoom
from inpo.precompute.inputs import committed_shards, named_texts, print_inputs
from inpo.precompute.like import all_works
from inpo.precompute.phases import Phase
from inpo.precompute.pipeline import Outcome, Task
from inpo.precompute.plan import check_disk, print_plan
from inpo.precompute.settings import RayOptions
from inpo.precompute.tasks import ShardTask, split
from inpo.precompute.texts import TextTable, list_texts
from inpo.precompute.works import Work, check_agreed


def run_precompute(
    recipe: Path | None,
    model_flags: Mapping[str, Any],
    data_flags: Mapping[str, Any],
    flags: Mapping[str, Any],
    *,
    ray_options: RayOptions,
    dry_run: bool,
) -> int:
    """Run (or only plan) a precompute. Returns the exit code, in every process the same: 1 if an input shard could not
    be read or another source's shards have its name, if shards are not committed at the end or are without their texts,
    or if the source has no pair at all; its empty commits are taken back then."""
    resolved = configure(recipe, model_flags, data_flags, flags)
    settings = resolved.settings
    resolved.data.need("cache")
    check_ray(settings, ray_options)
    model = resolved.model_section.open()
    works, unreadable = all_works(resolved, model, is_real=not dry_run)
    codes: list[int | None] = []
    for number, work in enumerate(works):
        if work.title and processes().is_main_process:
            say(work.title)
        failed = unreadable if number == 0 else []
        codes.append(run_work(work, model, failed, recipe, ray_options=ray_options, dry_run=dry_run))
    if settings.buckets is not None and processes().is_main_process and not dry_run:
        say(f"next: {_next_command(resolved, recipe)}")  # on all buckets
    return 1 if set(codes) == {None} else max(code or 0 for code in codes)


def run_work(
    work: Work,
    model: Model,
    unreadable: list[DataError],
    recipe: Path | None,
    *,
    ray_options: RayOptions,
    dry_run: bool,
) -> int | None:
    """Make one cache. Returns its exit code, as `run_precompute` does; None where its source has no pair at all."""
    resolved, settings, cache = work.resolved, work.resolved.settings, work.cache
    state = processes()
    is_main = state.is_main_process
    manifest = work.manifest(model, ray_options)
    if is_main:
        check_complete(model)
        if settings.engine != "ray":  # whose workers have devices of their own
            say_device(state.device, manifest.network_dtype, num_processes=state.num_processes)
    committed = committed_shards(cache, manifest)
    work, foreign = work.own(committed)
    unreadable = [*unreadable, *foreign]
    room = WaitingRoom(state)
    if state.num_processes > 1:
        check_agreed(work, unreadable, room)
    if not work.tasks:
        for error in unreadable if is_main else ():
            fail(error)
        return 1
    plan = work.plan(committed, manifest, model)
    if is_main:
        tell = print if dry_run else say  # a dry run is asked for nothing else
        tell(resolved.to_toml(differing=True))
        tell("every other setting is its default; all are kept with the cache, in configurations/")
        if dry_run or not is_quiet():
            print_plan(plan, console(stderr=not dry_run))
        print_inputs(work.source, work.tasks, unreadable)
    check_disk(plan, cache)
    if dry_run:
        return 1 if unreadable else 0
    writer = CacheWriter.open(cache, manifest)
    work.claim(writer, committed)
    with log_file(Path(writer.store.location) if is_main and not writer.store.remote else None):
        code = _make(work, model, writer, room, unreadable, committed, recipe, ray_options=ray_options)
        # The first process knows the code of all; a launcher stops the others once one of them has left.
        return room.gathered(code)[0]


@dataclass(kw_only=True)
class _NotMade:
    """Shards of a run that it did not make itself, by name."""

    errors: dict[str, DataError] = field(default_factory=dict)
    """Why: an input that cannot be read, or another source's commit."""
    of_left_out: set[str] = field(default_factory=set)
    """All shards of inputs of which another source has committed one."""
    num_lost_races: int = 0
    """Those that another run has committed from the same source."""

    def add(self, name: str, error: DataError) -> None:
        """Each input's first error is told."""
        if all(error.where != each.where for each in self.errors.values()):
            fail(error)
        self.errors[name] = error

    def leave_out(self, names: set[str], error: DataError) -> None:
        """All shards of an input: else two sources would have parts of it, and neither could go on."""
        self.add(min(names), error)
        self.errors |= dict.fromkeys(names, error)
        self.of_left_out |= names


def _make(
    work: Work,
    model: Model,
    writer: CacheWriter,
    room: WaitingRoom,
    unreadable: list[DataError],
    committed: set[str],
    recipe: Path | None,
    *,
    ray_options: RayOptions,
) -> int | None:
    """Make the shards of one cache that are not `committed`. Returns as `run_work` does, in the first process."""
    resolved, tasks, state = work.resolved, work.tasks, processes()
    settings, is_main = resolved.settings, state.is_main_process
    if is_main:
        writer.write_configuration(resolved.to_toml())
        for line in work.warnings(writer, committed):
            warn(line)
    not_made, start = _NotMade(), time.perf_counter()

    def carry_out(phase: Phase, tasks: Mapping[int, Task], done: set[str], unit: str) -> str:
        """Make what is not done yet; returns the time report."""
        by_rank = (0, 1) if settings.engine == "ray" else (state.process_index, state.num_processes)
        share = split(max(tasks, default=-1) + 1, *by_rank)  # what this process will count, as run_local has it
        total = sum(task.num_rows for number, task in tasks.items() if number in share and task.name not in done)
        with ProgressReport(
            f"precompute {phase.name}", total=total, unit=unit, quiet=not is_main or not total
        ) as progress:

            def on_outcome(outcome: Outcome) -> None:
                name, error = outcome.task.name, outcome.error
                if phase.kind is Commit and outcome.commit is None and error is None:  # another's: of which source?
                    for shard, of_another in work.foreign({name}).items():
                        not_made.leave_out(
                            {task.name for task in work.tasks if task.input_shard.name == shard}, of_another
                        )
                elif error is not None:
                    not_made.add(name, error)
                if outcome.lost_race and name not in not_made.errors:
                    not_made.num_lost_races += 1
                progress.advance(outcome.task.num_rows)

            def is_wanted(task: Task) -> bool:
                return task.name not in not_made.errors

            return make(phase, tasks, committed=done, on_outcome=on_outcome, is_wanted=is_wanted)

    def on_batch_size(pairs: int) -> None:
        if is_main and pairs:
            writer.write_configuration(resolved.with_batch_size(pairs).to_toml())

    with _engine(resolved, model, writer, room, ray_options, on_batch_size) as make:
        table, named = TextTable(writer), named_texts(writer)
        texts: Mapping[int, Task]
        if work.text_tasks is None:
            texts = list_texts(tasks, named, table, by_length=writer.manifest.is_padded)
        else:
            texts = {number: task for number, task in work.text_tasks.items() if task.name not in table.names}
        carry_out(work.texts, texts, set(), "prompts")
        if is_main and texts:
            num_prompts, seconds = sum(task.num_rows for task in texts.values()), time.perf_counter() - start
            say(f"texts: {num_prompts} prompts in {len(texts)} text shards, in {seconds:.1f} s")
        lost = _texts_lost(writer, {task.name: named.get(task.name, ()) for task in tasks})
        if is_main and lost is not None:
            fail(lost)
        report = carry_out(work.images, dict(enumerate(tasks)), committed, "pairs")
    for rank, other in enumerate(room.gathered(not_made)):
        if rank != state.process_index and is_main:
            for name, error in other.errors.items():
                not_made.add(name, error)
            not_made.of_left_out |= other.of_left_out
            not_made.num_lost_races += other.num_lost_races
    if not is_main:
        return 0
    if not_made.num_lost_races:
        note(f"{not_made.num_lost_races} shards were committed by another writer first, and stay as it made them")
    left_out = {error.where for error in (*unreadable, *not_made.errors.values())}
    seconds, next_command = time.perf_counter() - start, _next_command(resolved, recipe)
    num_pairs, is_whole = _print_summary(writer, work, not_made, len(left_out), seconds, report, next_command)
    failed = bool(left_out) or lost is not None or not is_whole
    if num_pairs == 0:
        _take_back(writer, [task for task in tasks if task.name not in not_made.errors], committed)
        return 1 if failed else None
    return 1 if failed else 0


def _texts_lost(writer: CacheWriter, named: Mapping[str, tuple[str, ...]]) -> CacheIncomplete | None:
    """What to say if committed shards need text shards that are still not there after the text phase."""
    there = writer.committed(TextCommit)
    users = {name: sorted({*texts} - there) for name, texts in named.items() if not there.issuperset(texts)}
    if not users:
        return None
    lost = sorted({text for texts in users.values() for text in texts})
    shards = f"{', '.join([*users][:4])}{', ...' if len(users) > 4 else ''}"
    return CacheIncomplete(
        f"Text shards that committed shards need are lost, and these pairs do not give the same ones: {len(lost)}.",
        where=writer.store.path(TextCommit.folder),
        expected=f"{', '.join(f'{name}.json' for name in lost[:4])}{', ...' if len(lost) > 4 else ''}",
        got=f"no commit; {len(users)} shards cannot be read without: {shards}",
        fix="bring the source to what it was, or restore the text shards from a copy of the cache; to make the shards "
        f"again, move their commits in {writer.store.path(Commit.folder)} away and run again",
    )


@contextlib.contextmanager
def _engine(
    resolved: Configuration,
    model: Model,
    writer: CacheWriter,
    room: WaitingRoom,
    ray_options: RayOptions,
    on_batch_size: Callable[[int], None],
) -> Iterator[Callable[..., str]]:
    """What makes the tasks of a phase: make(phase, tasks, committed=..., on_outcome=...)."""
    settings = resolved.settings
    if settings.engine != "ray":
        yield partial(run_local, model=model, writer=writer, settings=settings, room=room, on_batch_size=on_batch_size)
        return
    from inpo.precompute.engines.ray import ray_cluster, run_ray

    with ray_cluster(ray_options):
        yield partial(run_ray, model=resolved.model_section, writer=writer, settings=settings, options=ray_options)


def _next_command(resolved: Configuration, recipe: Path | None) -> str:
    """The whole command that trains on this cache."""
    cache = shown(resolved.data.need("cache"))
    words = ["train", "--cache", cache, *flags_of(resolved.model_section)]
    if recipe is not None:
        words += ["--recipe", str(recipe)]
    if "output" not in read_recipe(recipe).get("train", {}):
        words += ["--output", "run" if is_remote(cache) else f"{_named(cache)}-run"]
    return command(*words)


def _named(folder: str) -> Path:
    """The same folder by a path that ends in its name, which `.` and `..` do not."""
    path = Path(folder)
    return path.resolve() if path.name in ("", "..") else path


def _print_summary(
    writer: CacheWriter,
    work: Work,
    not_made: _NotMade,
    num_left_out: int,
    seconds: float,
    report: str,
    next_command: str,
) -> tuple[int, bool]:
    """The final table: what is committed now of these tasks and this source, what was skipped and why. Returns the
    number of pairs, and whether every task is committed of which no error tells."""
    tasks, cache = work.tasks, open_cache(writer.store.address, allow_empty=True)
    names = {task.name for task in tasks} - {name for name in not_made.of_left_out if work.foreign({name})}
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
    say(f"committed: {len(commits)} of {len(tasks)} shards, {num_pairs} pairs, {human_bytes(size)}, in {seconds:.1f} s")
    say(f"time: {report}")
    for reason, count in sorted(skipped.items()):
        meaning = SKIP_REASONS.get(reason, "a number that would be stored is NaN or infinite")  # type: ignore[call-overload]
        note(f"skipped: {count} x {reason}: {meaning}")
    if skipped:
        say(f"skipped rows are listed by pair id in {writer.store.path('skipped')}")
    if "unreachable" in skipped:
        note(
            "unreachable images are not asked for again: to make a shard with them anew, move its "
            f"{writer.store.path('commits')}/SHARD.json away and run again"
        )
    for what, count in sorted(counts.items()):
        note(f"counted: {count} x {what}")
    lacking = [task.name for task in tasks if task.name not in commits and task.name not in not_made.errors]
    if num_left_out:
        warn(f"input shards left out: {num_left_out}{'' if lacking else '; the others are done'}")
    made_before = sorted(not_made.of_left_out & commits.keys())
    if made_before:
        warn(
            f"{len(made_before)} shards of what is left out had been committed from this source and stay, "
            f"{made_before[0]} first: rows of two sources are in the cache under one name"
        )
    if lacking:
        warn(
            f"{len(lacking)} shards are not committed, {lacking[0]} first: another process moved or removed commits "
            "meanwhile; run the same command again"
        )
    if num_pairs == 0 and not commits:  # why has been said
        return 0, not lacking
    if num_pairs == 0:
        reasons = _reasons(writer, commits).lines({task.input_shard.name: task.input_shard for task in tasks}.values())
        what = "of this bucket" if work.title else "of this source"
        told = f"no pair was kept, so no shard that this run made {what} stays committed: {work.why_no_pair}"
        (warn if work.title else fail)("\n  ".join([told, *reasons]))  # the other buckets may have pairs
        return 0, not lacking
    say(f"next: {command('inspect', 'summary', writer.store.location)}")
    say(f"next: {next_command}")
    return num_pairs, not lacking


def _reasons(writer: CacheWriter, commits: Mapping[str, Commit]) -> Reasons:
    """Why no row of these shards gave a pair."""
    reasons = Reasons()
    for name, commit in commits.items():
        path = f"skipped/{name}/{commit.attempt}.jsonl"
        for row in skipped_rows(writer.store.get(path) or b"", writer.store.path(path)):
            reasons.add(row.reason, row.pair_id, row.detail)
    return reasons


def _take_back(writer: CacheWriter, tasks: list[ShardTask], earlier: set[str]) -> None:
    """Remove the commits of a source that gave no pair: a cache without pairs is none, and the same command is to look
    again when the images or the settings have been put right, which a committed shard would not. In a cache that has
    pairs of other rows, what was committed earlier stays."""
    has_pairs = any(commit.num_pairs for commit in open_cache(writer.store.address, allow_empty=True).commits.values())
    for task in tasks:
        if not has_pairs or task.name not in earlier:
            writer.store.remove(f"commits/{task.name}.json")
