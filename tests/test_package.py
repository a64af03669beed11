"""What is installed: one package, `inpo`, with every file that it needs, beside whatever else a user has."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
LINKED = sorted(entry.name for entry in (ROOT / "inpo").iterdir() if entry.is_symlink())


def _tracked() -> list[str]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [name for name in listed.split("\0") if name]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of the files under version control: a build leaves folders behind, and reads no others."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    for name in _tracked():
        if not name.startswith(("tests/", "docs/")) and os.path.lexists(ROOT / name):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, source / name, follow_symlinks=False)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*command, "--wheel-dir", str(folder), str(source)], check=True)
    return next(folder.glob("*.whl"))


def test_the_wheel_holds_inpo_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"inpo"}
    # Code, pictures' styles, recipes, the small model: every file of a linked folder travels.
    tracked = [name for name in _tracked() if name.split("/")[0] in LINKED and not name.endswith(".gitignore")]
    wanted = {f"inpo/{name}" for name in tracked} | {"inpo/py.typed", "inpo/cli.py"}
    assert wanted - set(names) == set()


def test_every_folder_with_code_is_linked_and_named_after_itself() -> None:
    holds_code = {name.split("/")[0] for name in _tracked() if name.endswith(".py") and "/" in name}
    assert holds_code - {"inpo", "tests", "benchmarks"} | {"recipes"} == set(LINKED)
    assert all((ROOT / "inpo" / name).resolve() == ROOT / name for name in LINKED)


def test_it_runs_beside_files_and_packages_of_the_same_names(wheel: Path, tmp_path: Path) -> None:
    site, project = tmp_path / "site", tmp_path / "project"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    for name in ("train", "evaluation", "common"):  # other distributions, installed beside ours
        (site / name).mkdir()
        (site / name / "__init__.py").write_text("raise ImportError('somebody else's package')")
    project.mkdir()
    (project / "train.py").write_text("raise SystemExit('my own trainer')")
    (project / "common").mkdir()
    (project / "common" / "errors.py").write_text("")
    environment = os.environ | {"PYTHONPATH": str(site), "HF_HUB_OFFLINE": "1"}
    for command in (
        ["-m", "inpo", "--version"],
        ["-m", "inpo", "train", "--help"],
        ["-m", "accelerate.commands.launch", "--num_processes", "1", "--cpu", "-m", "inpo", "precompute", "--help"],
    ):
        done = subprocess.run(
            [sys.executable, *command], cwd=project, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr[-2000:]
    where = subprocess.run(
        [sys.executable, "-c", "import inpo.train.cli as m; print(m.__file__)"],
        cwd=project,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert Path(where.stdout.strip()).is_relative_to(site)


OPTIONAL = {"ImageReward", "bitsandbytes", "datasets", "open_clip", "ray", "torchao", "xarray"}
"""What a user installs for one option, and is told to."""


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _installed_for(requirements: list[str]) -> set[str]:
    """Distributions that pip installs for these, here."""
    found: set[str] = set()
    todo = list(map(Requirement, requirements))
    while todo:
        requirement = todo.pop()
        name = _canonical(requirement.name)
        if name in found or (requirement.marker and not requirement.marker.evaluate({"extra": ""})):
            continue
        found.add(name)
        try:
            todo += map(Requirement, requires(name) or [])
        except PackageNotFoundError:  # of another system
            continue
    return found


def _imports(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module)
    return {name.split(".")[0] for name in names}


def test_it_imports_nothing_that_only_the_tests_install() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    installed = _installed_for(project["dependencies"])
    product = [name for name in _tracked() if name.endswith(".py") and name.split("/")[0] in {"inpo", *LINKED}]
    imported = set.union(*(_imports(ROOT / name) for name in product)) - sys.stdlib_module_names - {"inpo"}
    distributions = packages_distributions()
    missing = {name for name in imported if installed.isdisjoint(map(_canonical, distributions.get(name, [name])))}
    assert missing == OPTIONAL
    assert {"torch", "webdataset"} <= imported
