"""What commands say: to standard error and to a file, more by -v, less by -q, and completed by the shell."""

import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from inpo.cli import app
from inpo.common.errors import DataError, StorageError
from inpo.common.log import LOG_FILE, LOGGER, fail, log_file, note, say, set_level, warn
from inpo.common.progress import ProgressReport


@pytest.fixture(autouse=True)
def level(tmp_path: Path) -> Iterator[None]:
    before = set_level(logging.INFO)
    (tmp_path / "others").mkdir()
    with log_file(tmp_path / "others"):  # takes what other tests said
        pass
    yield
    set_level(before)


def everything() -> None:
    say("done with it")
    note("it was slow")
    warn("it may break")
    fail(DataError("It broke.", got="pieces", fix="mend it"))


def test_standard_error_has_as_much_as_is_wanted(capsys: pytest.CaptureFixture[str]) -> None:
    told = {}
    for level in (logging.WARNING, logging.INFO, logging.DEBUG):
        set_level(level)
        everything()
        out, told[level] = capsys.readouterr()
        assert out == ""
    plain = "note: it was slow\nwarning: it may break\nerror: It broke.\n  got:      pieces\n  to do:    mend it\n"
    assert told[logging.WARNING] == plain
    assert told[logging.INFO] == "done with it\n" + plain
    assert "traceback" in told[logging.DEBUG]
    assert told[logging.DEBUG].endswith(plain.partition("error")[2])
    error = DataError("It broke.", fix="mend it")
    error.__cause__ = ConnectionError("https://user:password@host/x?sig=abc did not answer")
    fail(error)
    told_why = capsys.readouterr().err
    assert "https://host/x?sig=*** did not answer" in told_why


def test_a_file_has_all_of_it_dated_and_without_secrets(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    set_level(logging.WARNING)
    say("before there is a folder")

    def run() -> None:
        with log_file(tmp_path):
            say("read s3://user:password@bucket/x?token=abc \x1b[31m")
            raise DataError("It broke.", fix="mend it")

    with pytest.raises(DataError):
        run()
    say("after the run")
    with log_file(tmp_path):
        say("the second run")
    text = (tmp_path / LOG_FILE).read_text()
    assert "password" not in text
    assert "abc" not in text
    assert "\x1b" not in text
    assert [line.split(" ", 2)[2] for line in text.splitlines() if " INFO " in line] == [
        "INFO before there is a folder",
        "INFO read s3://bucket/x?token=*** \\u001b[31m",
        "INFO after the run",
        "INFO the second run",
    ]
    assert "ERROR error: It broke." in text
    assert "Traceback (most recent call last)" in text
    assert capsys.readouterr() == ("", "")


def test_a_file_that_cannot_be_written_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(StorageError, match="open the log"), log_file(tmp_path / "nothing"):
        pass

    def run() -> None:
        with log_file(tmp_path):
            (handler,) = (each for each in LOGGER.handlers if getattr(each, "baseFilename", "").endswith(LOG_FILE))
            assert isinstance(handler, logging.FileHandler)
            handler.close()
            handler.stream = open("/dev/full", "w")
            say("one")
            say("two")
            raise StorageError("The disk is full.", fix="free some")

    with pytest.raises(StorageError, match="full"):
        run()
    said = capsys.readouterr().err
    assert said.count("cannot be written any more") == 1
    assert "two" in said


def test_of_several_processes_the_first_one_speaks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    with log_file(tmp_path):
        everything()
    assert capsys.readouterr().err == "error: It broke.\n  got:      pieces\n  to do:    mend it\n"
    assert not (tmp_path / LOG_FILE).exists()


def test_quiet_hides_progress_too(capsys: pytest.CaptureFixture[str]) -> None:
    for level, lines in ((logging.WARNING, 0), (logging.INFO, 1)):
        set_level(level)
        with ProgressReport("work", total=1, unit="things") as progress:
            progress.advance()
        assert capsys.readouterr().err.count("work: 1 of 1 things") == lines


def test_every_command_has_both_options(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[int] = []
    monkeypatch.setattr("inpo.common.loudness.set_level", found.append)
    for words in (["-q", "doctor", "--help"], ["train", "--quiet", "--help"], ["inspect", "summary", "-q", "--help"]):
        result = CliRunner().invoke(app, words)
        assert result.exit_code == 0, result.output
        assert "--quiet" in result.output
    assert CliRunner().invoke(app, ["evaluate", "--verbose", "--help"]).exit_code == 0
    assert found == [logging.WARNING] * 3 + [logging.DEBUG]


def test_the_shell_completes_commands_options_and_choices() -> None:
    def completed(words: str) -> list[str]:
        asked = {"_INPO_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(len(words.split(" ")) - 1)}
        code = "import sys; sys.argv[0] = 'inpo'; from inpo.cli import main; main()"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | asked)
        assert done.stderr == ""
        return done.stdout.split()

    assert completed("inpo eval") == ["evaluate"]
    assert completed("inpo train --optimizer adaf") == ["adafactor"]
    assert completed("inpo train --gradient-ch") == ["--gradient-checkpointing"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a system without /dev/full")
def test_standard_output_that_is_full_is_said() -> None:
    words = [sys.executable, "-m", "inpo", "doctor"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(words, stdout=full, stderr=subprocess.PIPE, text=True, check=False, timeout=280)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "No space left on device" in done.stderr


@pytest.mark.parametrize("words", [("doctor", "x" * 300), ("inspect", "summary", "x" * 300)], ids=" ".join)
def test_a_path_that_the_disk_refuses_is_said(words: tuple[str, ...]) -> None:
    """Asking whether it is there is refused already."""
    command = [sys.executable, "-m", "inpo", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=280)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "File name too long" in done.stderr
    assert "to do:" in done.stderr


def test_a_home_that_cannot_be_written_is_no_matter_of_matplotlibs(tmp_path: Path) -> None:
    """It has a temporary folder then; standard error is ours."""
    home = tmp_path / "file"
    home.touch()
    before = ("MPLCONFIGDIR", "XDG_CONFIG_HOME", "XDG_CACHE_HOME")  # which it looks at before the home
    named = {name: value for name, value in os.environ.items() if name not in before}
    code = "import inpo.cli, matplotlib; print(matplotlib.get_cachedir())"
    words = [sys.executable, "-c", code]
    done = subprocess.run(words, capture_output=True, text=True, check=True, env=named | {"HOME": str(home)})
    assert not done.stdout.startswith(str(home))
    assert done.stderr == ""
