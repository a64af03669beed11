"""docs/data.md is true: its examples run in order, and its table of reasons is the code's."""

import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from inpo.common.pairs import SKIP_REASONS
from inpo.common.pairs.images import MAX_PIXELS
from inpo.data.cli import app

TEXT = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")


def test_examples_run_as_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    outputs = []
    for language, code in re.findall(r"```(python|bash)\n(.*?)```", TEXT, flags=re.DOTALL):
        if language == "python":
            exec(code, names)
            continue
        for line in code.splitlines():
            command = shlex.split(line)
            if command[:2] == ["inpo", "data"]:
                here = ["--decode-workers", "0"] if command[2] == "check" else []
                result = CliRunner().invoke(app, [*command[2:], *here])
                assert result.exit_code == 0, (line, result.output)
                outputs.append((line, result.stdout))
    pairs = [
        re.search(r"pairs\W+(\d+)", output)[1]  # type: ignore[index]
        for _, output in outputs
    ]
    assert list(zip([line.split(" --")[0] for line, _ in outputs], pairs, strict=True)) == [
        ("inpo data check sets/hpdv3.json", "1"),
        ("inpo data check sets/hpdv3pp.json", "1"),
        ("inpo data check sets/rapidata.parquet", "1"),
        ("inpo data check sets/hpdv2.json", "3"),
        ("inpo data check sets/imagereward.parquet", "1"),
        ("inpo data check sets/chosen.parquet", "1"),
        ("inpo data check packed/train_aes.json", "1"),
        ("inpo data check cubes", "2"),
        ("inpo data pack cubes cubes-tars", "2"),
        ("inpo data check cubes-tars", "2"),
        ("inpo data pack cubes cubes-grouped", "2"),
        ("inpo data check mine-0000.tar", "1"),
        ("inpo data check pick.parquet", "2"),
        ("inpo data pack pick.parquet pick-tars", "2"),
    ]
    assert re.search(r"skipped: tie\W+1", outputs[7][1])


def test_the_table_of_reasons_is_the_codes() -> None:
    section = TEXT.split("## What gives no pair")[1].split("\n## ")[0]
    assert dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", section, flags=re.MULTILINE)) == SKIP_REASONS


def test_the_pixel_limit_is_the_codes() -> None:
    assert f"{MAX_PIXELS:,} pixels" in TEXT
