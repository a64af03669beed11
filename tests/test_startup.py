"""What a command imports before its work: nothing that it does not use, because every start waits for it."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

MODELS = {"torch", "diffusers", "transformers", "accelerate", "peft", "scipy", "matplotlib"}
ARRAYS = {"numpy", "zarr", "pyarrow", "PIL", "jaxtyping"}


def imported(*arguments: str) -> set[str]:
    """The top-level modules that `inpo ARGUMENTS` imports."""
    code = "import sys; from inpo.cli import main\ntry: main()\nexcept SystemExit as end: assert not end.code\n"
    code += "finally: print(*{name.split('.')[0] for name in sys.modules}, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return set(done.stderr.splitlines()[-1].split())


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["--version"],
        ["precompute", "--help"],
        ["train", "--help"],
        ["evaluate", "generate", "--help"],
        ["inspect", "--help"],
        ["toyworld", "pairs", "--help"],
    ],
    ids=" ".join,
)
def test_help_waits_for_no_library_of_arrays_or_models(arguments: list[str]) -> None:
    assert not imported(*arguments) & (MODELS | ARRAYS)


@pytest.mark.parametrize("command", ["summary", "clean"])
def test_looking_at_a_cache_waits_for_no_library_of_models(command: str, tmp_path: Path) -> None:
    golden = sorted((Path(__file__).parent / "cache" / "golden").rglob("manifest.json"))[-1].parent
    found = imported("inspect", command, str(shutil.copytree(golden, tmp_path / "cache")))
    assert "zarr" in found
    assert not found & MODELS


def test_shapes_are_checked_also_where_one_folder_of_tests_is_run_alone() -> None:
    """Whose conftest.py imports modules that annotate shapes before pytest is configured."""
    code = """
import pytest
assert not pytest.main(["--collect-only", "-qq", "tests/cache/test_writer.py"])
import jaxtyping, numpy as np, torch
from inpo.common.levels import Levels
from inpo.train.order import OrderedShard
for make in (
    lambda: Levels.from_alphas_cumprod(torch.ones(2, 2)),
    lambda: OrderedShard(group=np.ones((2, 2), int), num_records=1),
):
    with pytest.raises(jaxtyping.TypeCheckError):
        make()
print("both refused")
"""
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=120)
    assert done.stdout.endswith("both refused\n"), done.stdout + done.stderr
