"""What is installed, from sdist, wheel, Makefile or Dockerfile: one package, `inpo`, with every file that it needs,
beside whatever else a user has."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from email import message_from_bytes
from fnmatch import fnmatch
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
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made of a copy of the files under version control: a build leaves folders behind, and reads no others."""
    folder = tmp_path_factory.mktemp("sdist")
    source = folder / "source"
    for name in _tracked():
        if not name.startswith(("tests/", "docs/")) and os.path.lexists(ROOT / name):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, source / name, follow_symlinks=False)
    script = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
    subprocess.run([sys.executable, "-c", script, str(folder)], cwd=source, check=True, capture_output=True)
    return next(folder.glob("*.tar.gz"))


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the sdist, as an installer does that has no wheel."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*command, "--wheel-dir", str(folder), str(sdist)], check=True)
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


def test_the_sdist_holds_what_a_build_needs_and_no_tests(sdist: Path) -> None:
    with tarfile.open(sdist) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
    assert {"pyproject.toml", "README.md", "LICENSE", "THIRD_PARTY.md", "constraints.txt", "inpo/cli.py"} <= names
    assert not [name for name in names if name.startswith(("tests", "docs", "benchmarks"))]


def test_the_metadata_is_what_an_index_asks_for(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        metadata = message_from_bytes(archive.read(name))
        licences = {each for each in archive.namelist() if "/licenses/" in each}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert (metadata["Name"], metadata["Version"]) == (project["name"], project["version"])
    assert metadata["License-Expression"] == "Apache-2.0"
    assert {Path(each).name for each in licences} == set(metadata.get_all("License-File", []))
    assert metadata["Description-Content-Type"] == "text/markdown"
    payload = metadata.get_payload(decode=True)
    assert payload == (ROOT / "README.md").read_bytes()
    extras = set(metadata.get_all("Provides-Extra", []))
    assert extras == set(project["optional-dependencies"])
    assert len(metadata.get_all("Requires-Dist", [])) >= len(project["dependencies"])


def test_everything_in_the_wheel_that_is_no_code_is_in_the_list_of_its_origins(wheel: Path) -> None:
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in (ROOT / "THIRD_PARTY.md").read_text(encoding="utf-8").splitlines()
        if line.startswith("| `")
    ]
    patterns = [pattern for row in rows for pattern in re.findall(r"`([^`]+)`", row[0])]
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if not name.endswith(".py") and ".dist-info/" not in name]
    assert names
    assert [name for name in names if not any(fnmatch(name, pattern) for pattern in patterns)] == []
    assert [pattern for pattern in patterns if not any(fnmatch(name, pattern) for name in names)] == []


def _docker_instructions() -> list[tuple[str, str]]:
    """(instruction, arguments) of each line of the Dockerfile."""
    text = re.sub(r"\\\n", " ", (ROOT / "Dockerfile").read_text(encoding="utf-8"))
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    return [(line.split(maxsplit=1)[0], line.split(maxsplit=1)[1]) for line in lines]


def test_the_image_is_built_from_files_that_are_there_and_from_pinned_versions(tmp_path: Path) -> None:
    instructions = _docker_instructions()
    assert {name for name, _ in instructions} <= {"FROM", "ARG", "ENV", "WORKDIR", "COPY", "RUN", "ENTRYPOINT", "CMD"}
    assert instructions[0][0] == "FROM"
    assert ("ARG", "TORCH=cpu") in instructions
    copied: list[str] = []
    for name, arguments in instructions:
        if name == "COPY":
            *sources, target = arguments.split()
            for source in sources:
                assert os.path.lexists(ROOT / source), source
                copied.append(source)
                place = tmp_path / target if target != "./" else tmp_path / source
                if (ROOT / source).is_dir():
                    shutil.copytree(ROOT / source, place, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
                else:
                    shutil.copy2(ROOT / source, place)
    for name, arguments in instructions:
        if name == "RUN":
            assert arguments.startswith("pip install --constraint constraints.txt ")
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").split()
    assert ignored[0] == "*"
    assert {line[1:] for line in ignored if line.startswith("!")} == set(copied)
    # The same package comes of these files as of the whole repository.
    assert {f"inpo/{name}" for name in LINKED} == {f"inpo/{path.name}" for path in (tmp_path / "inpo").glob("*/")}
    script = "from setuptools import find_packages; print(*sorted(find_packages(include=['inpo*'])))"
    found = [
        subprocess.run([sys.executable, "-c", script], cwd=place, capture_output=True, text=True, check=True).stdout
        for place in (tmp_path, ROOT)
    ]
    assert found[0] == found[1]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (install,) = [each for name, each in instructions if name == "RUN" and "'.[" in each]
    wanted = list(project["dependencies"])
    for extra in re.findall(r"\.\[([\w,]+)\]", install)[0].split(","):
        wanted += project["optional-dependencies"][extra]
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = {_canonical(line.partition("==")[0]) for line in pins if "==" in line}
    assert {_canonical(Requirement(each).name) for each in wanted} - pinned == set()


@pytest.mark.parametrize("choice", ["cpu", "cu128", "rocm6.4"])
def test_make_install_takes_a_build_of_torch(choice: str, tmp_path: Path) -> None:
    def plan(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = ["make", "--dry-run", "--no-print-directory", "install", *arguments]
        environment = {name: value for name, value in os.environ.items() if name not in ("TORCH", "MAKEFLAGS")}
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)

    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy2(ROOT / name, tmp_path / name)
    wanted = f"--index-url https://download.pytorch.org/whl/{choice} torch"
    assert wanted in plan(f"TORCH={choice}").stdout
    assert "--index-url" not in plan().stdout  # pip's own choice
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv" / ".torch").write_text(f"{choice}\n")
    (tmp_path / ".venv" / ".installed").touch()
    assert "pip install" not in plan().stdout
    assert "pip install" not in plan(f"TORCH={choice}").stdout  # which is there
    assert "whl/cu999 torch" in plan("TORCH=cu999").stdout
    refused = plan("TORCH=cuda")
    assert refused.returncode != 0
    assert "TORCH=cuda is no build of torch: expected cpu, or one such as cu128" in refused.stderr


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
    script = "from importlib.metadata import entry_points as e; e(group='console_scripts')['inpo'].load()()"
    for command in (
        ["-m", "inpo", "--version"],
        ["-c", script, "--version"],
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
