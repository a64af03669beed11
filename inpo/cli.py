"""The front door: one Typer app, `inpo` (also `python -m inpo`), that mounts the stages' apps."""

import errno
import gc
import json
import logging
import os
import shlex
import sys
import time
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import NoReturn

# Hub clients and tokenizers print bars and warnings of their own unless told otherwise before they are imported.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import typer

from inpo.common.errors import InpoError
from inpo.common.foreign import Command
from inpo.common.log import LOGGER, fail
from inpo.common.loudness import Root
from inpo.common.terminal import escape_streams
from inpo.data.cli import app as data_app
from inpo.doctor import doctor
from inpo.evaluation.cli import app as evaluate_app
from inpo.evaluation.cli import relabel
from inpo.inspection.cli import app as inspect_app
from inpo.plan import plan
from inpo.precompute.cli import precompute
from inpo.rounds.cli import round_command, sample
from inpo.toyworld.cli import app as toyworld_app
from inpo.train.cli import export, push, train

# matplotlib takes a temporary folder by itself where its own cannot be written, and says so beside our log.
logging.getLogger("matplotlib").setLevel(logging.ERROR)

app = typer.Typer(
    name="inpo",
    cls=Root,
    help="Preference alignment of text-to-image diffusion models: invert once, train many times.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.command(cls=Command)(precompute)
app.command(cls=Command)(sample)
app.command("round", cls=Command)(round_command)
app.command(cls=Command)(train)
app.command(cls=Command)(export)
app.command(cls=Command)(push)
app.command(cls=Command)(plan)
app.command(cls=Command)(relabel)
app.command()(doctor)
app.add_typer(inspect_app, name="inspect")
app.add_typer(evaluate_app, name="evaluate")
app.add_typer(data_app, name="data")
app.add_typer(toyworld_app, name="toyworld")


def _version(wanted: bool) -> bool:
    if wanted:
        print(f"inpo {version('inpo-cache')}")
        raise typer.Exit
    return wanted


@app.callback()
def _options(
    _: bool = typer.Option(False, "--version", help="print the version and end", is_eager=True, callback=_version),
) -> None:
    pass


def main() -> None:
    """Run the command line. A user's mistake ends in its message and exit code, without a traceback."""
    # Importing torch and diffusers makes a million objects that stay: looking through them again and again for garbage
    # takes a tenth of a command's start.
    gc.set_threshold(10_000)
    escape_streams()
    LOGGER.debug("inpo %s: %s", version("inpo-cache"), shlex.join(sys.argv[1:]))
    try:
        app()
    except InpoError as error:
        _end(error)
    except OSError as error:  # a disk has words of its own
        if error.filename is None and error.errno != errno.ENOSPC:
            raise
        from inpo.common.durable import storage_errors  # an object store's client

        try:
            with storage_errors("read or write", error.filename or "standard output"):
                raise
        except InpoError as refused:
            _end(refused)
    except (MemoryError, RuntimeError):
        from inpo.common.batch_size import memory_in_words  # torch

        try:
            with memory_in_words(None, otherwise="take less at a time, or a machine or device with more memory"):
                raise
        except InpoError as error:
            _end(error)


def _end(error: InpoError) -> NoReturn:
    fail(error)
    _tell_launcher(str(error))
    sys.exit(error.exit_code)


def _tell_launcher(message: str) -> None:
    """Leave the message where torch's launcher looks for it: it ends with it, in place of "to enable traceback"."""
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file:
        document = {"message": {"message": message, "extraInfo": {"timestamp": str(int(time.time()))}}}
        with suppress(OSError):
            Path(file).write_text(json.dumps(document))
