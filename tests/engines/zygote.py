"""Starts precompute processes fast: imports everything once, then forks one child per request.

    -> {"arguments": [...], "environment": {...}, "log": path}   <- pid
    -> {"wait": pid}                                             <- exit code, -9 if killed

Each child runs the real command in a process of its own, from its signal handlers to its exit code.
"""

import json
import os
import sys
import traceback

import typer

import inpo.precompute.run  # noqa: F401  (seconds of imports that the children share)
from inpo.common.errors import InpoError
from inpo.precompute.cli import precompute as command


def run(arguments: list[str]) -> int:
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(command)
    try:
        app(arguments)
    except InpoError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def child(request: dict) -> None:
    code = 70
    try:
        log = os.open(request["log"], os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.environ.update(request["environment"])
        code = run(request["arguments"])
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    print("ready", flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            answer = os.waitstatus_to_exitcode(os.waitpid(request["wait"], 0)[1])
        else:
            answer = os.fork()
            if answer == 0:
                child(request)
        print(answer, flush=True)
