"""How tests start processes of `inpo`."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


def launch(*arguments: str, processes: int = 2) -> list[str]:
    """The command line of `accelerate launch -m inpo ...`.

    --multi_gpu starts so many processes, with gloo where there is no GPU; --cpu would start one.
    """
    options = ["--multi_gpu", "--num_processes", str(processes), "--num_machines", "1", "--mixed_precision", "no"]
    options += ["--dynamo_backend", "no", "--main_process_port", "0"]
    return [sys.executable, "-m", "accelerate.commands.launch", *options, "-m", "inpo", *arguments]


@dataclass
class Process:
    """A running command."""

    pid: int
    log: Path
    zygote: "Zygote"

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)

    def terminate(self) -> None:
        os.kill(self.pid, signal.SIGTERM)

    def wait(self) -> int:
        return self.zygote.ask(wait=self.pid)

    def text(self) -> str:
        return self.log.read_text() if self.log.exists() else ""


@dataclass
class Zygote:
    """Forks processes of `inpo`; see zygote.py."""

    process: "subprocess.Popen[str]"
    folder: Path
    started: int = 0

    def ask(self, **request: Any) -> int:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def start(self, arguments: Sequence[str], environment: dict[str, str] | None = None) -> Process:
        self.started += 1
        log = self.folder / f"{self.started}.log"
        pid = self.ask(arguments=list(arguments), environment=environment or {}, log=str(log))
        return Process(pid=pid, log=log, zygote=self)

    def run(self, arguments: Sequence[str], environment: dict[str, str] | None = None) -> str:
        """To the end; the output. Fails unless the exit code is 0."""
        process = self.start(arguments, environment)
        code = process.wait()
        assert code == 0, process.text()
        return process.text()


def ranks(count: int) -> list[dict[str, str]]:
    """The environment that a launcher gives each of its processes on CPUs."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return [
        {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(count),
            "LOCAL_WORLD_SIZE": str(count),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "ACCELERATE_USE_CPU": "true",
        }
        for rank in range(count)
    ]
