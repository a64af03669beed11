"""Runs commands of `inpo` in processes of their own, a few jobs at a time, and never twice."""

import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

import inpo.cli
import inpo.evaluation.generate  # (seconds of imports that every command shares)
import inpo.evaluation.picture
import inpo.precompute.run
import inpo.train.run
from inpo.common.errors import InpoError

Step = list[str] | Callable[[], object]
"""A command of `inpo`, or a function."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """Steps in order. Done when its folder has its mark, which holds its
    seconds."""

    name: str
    folder: Path
    steps: Sequence[Step]

    @property
    def mark(self) -> Path:
        return self.folder / f"{self.name}.done"


def run_jobs(title: str, jobs: Sequence[Job], *, at_once: int) -> None:
    """Do what is not done yet; ends the program at the first job that fails, naming its log."""
    waiting = [job for job in jobs if not job.mark.exists()]
    if not waiting:
        return
    total, start = len(waiting), time.perf_counter()
    running: dict[int, Job] = {}
    while waiting or running:
        while waiting and len(running) < at_once:
            job = waiting.pop(0)
            job.folder.mkdir(parents=True, exist_ok=True)
            running[_fork(lambda job=job: _work(job))] = job
        pid, status = os.wait()
        job = running.pop(pid)
        if status:
            sys.exit(f"error: {title}: {job.name} failed; see {_log(job)}")
        done = total - len(waiting) - len(running)
        left = (time.perf_counter() - start) / done * (total - done) / 60
        print(f"{title}: {done} of {total}, {left:.0f} min left ({job.folder.name})", flush=True)


def _log(job: Job) -> Path:
    return job.folder / f"{job.name}.log"


def _fork(work: Callable[[], None]) -> int:
    """A child that does `work` and exits with 0, or with 1 after a traceback."""
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        work()
        code = 0
    except InpoError as error:
        print(f"error: {error}", flush=True)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _work(job: Job) -> None:
    """Each step gets a process of its own: libraries keep one state per process."""
    log = os.open(_log(job), os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    commands, start = [], time.perf_counter()
    for step in job.steps:
        if isinstance(step, list):
            commands.append("inpo " + " ".join(step))
            print(f"$ {commands[-1]}", flush=True)
        pid = _fork(lambda step=step: _step(step))
        if os.waitpid(pid, 0)[1]:
            raise SystemExit(1)
    (job.folder / f"{job.name}.commands.txt").write_text("\n".join(commands) + "\n")
    job.mark.write_text(f"{time.perf_counter() - start:.1f}\n")


def _step(step: Step) -> None:
    torch.set_num_threads(1)
    if not isinstance(step, list):
        step()
    elif inpo.cli.app(step, standalone_mode=False):
        raise SystemExit(1)
