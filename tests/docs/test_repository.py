"""The repository itself: pins, targets, and nothing that belongs to one machine."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]
TEXT = {".py", ".md", ".toml", ".txt", ".yaml", ".yml", ".json", ".j2", ".html", ".cfg", ".sh", ".svg", ""}
ROOMS = ("src", "tests", "examples", "benchmarks", "docs", ".ci")
# home folders, temporary folders and the like: nothing that is written down may point there
MACHINE = re.compile(r"(?<![\w.~$}-])/(?:home|Users|root|work|opt|tmp|private|mnt|workspace)/\w")


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


EXTRAS = ("rouge", "language", "quantized", "ray", "lm-eval")  # what users may install besides


def pins() -> dict[str, Requirement]:
    lines = [line.split("#")[0].strip() for line in (ROOT / "constraints.txt").read_text().splitlines()]
    return {canonicalize_name(r.name): r for r in map(Requirement, filter(None, lines))}


def written() -> list[Path]:
    inside = (p for room in ROOMS for p in (ROOT / room).rglob("*") if p.is_file())
    files = [*(p for p in ROOT.iterdir() if p.is_file() and p.name != ".git"), *inside]  # .git: of a worktree
    return [p for p in files if p.suffix in TEXT and "__pycache__" not in p.parts and ".egg-info" not in str(p)]


@pytest.mark.parametrize("group", ["dependencies", *EXTRAS, "dev", "docs"])
def test_every_dependency_is_pinned_within_its_range(group):
    declared = project()["project"]
    names = declared["dependencies"] if group == "dependencies" else declared["optional-dependencies"][group]
    for requirement in map(Requirement, names):
        if requirement.name == "perpetune":  # its own extras are pinned where they stand
            continue
        pin = pins().get(canonicalize_name(requirement.name))
        assert pin is not None, f"{requirement.name} has no pin in constraints.txt"
        (exact,) = pin.specifier
        assert exact.operator == "==" and "+" not in exact.version, f"{pin}: pin a plain version"
        assert requirement.specifier.contains(exact.version), f"{pin} is outside of {requirement}"


def test_what_the_package_imports_is_declared():
    files = [p for p in written() if ROOT / "src" in p.parents and p.suffix == ".py"]
    imported = set()
    for node in (node for path in files for node in ast.walk(ast.parse(path.read_text()))):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            imported.add(str(node.module).split(".")[0])
    called = {"sklearn": "scikit-learn", "yaml": "pyyaml", "PIL": "pillow"}
    own = {"perpetune", *sys.stdlib_module_names}
    needed = {canonicalize_name(called.get(name, name)) for name in imported - own}
    known = project()["project"]
    extras = known["optional-dependencies"]
    required = [*known["dependencies"], *(r for group in EXTRAS for r in extras[group])]
    declared = {canonicalize_name(Requirement(r).name) for r in required}
    missing = needed - declared
    assert not missing, f"imported but not declared in pyproject.toml: {', '.join(sorted(missing))}"
    assert "torch" in needed and "transformers" in needed


def test_no_machine_path_is_written_down():
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()[:80]}"
        for path in written()
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1)
        if MACHINE.search(line)
    ]
    assert not found, "\n".join(found)


def test_the_search_for_machine_paths_finds_them():
    assert MACHINE.search("open('/" + "home/someone/x')") and MACHINE.search('"/' + 'tmp/x"')
    assert not MACHINE.search("../shared/streams") and not MACHINE.search("src/work/x")


@pytest.mark.parametrize("target", ["demo", "test", "lint", "docs", "venv", "clean"])
def test_make_knows_its_targets(target):
    shown = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    commands = {
        "demo": ["perpetune demo"],
        "test": ["pytest"],
        "lint": ["ruff check", "ruff format --check", "mypy", "lint-imports"],
        "docs": ["zensical build --strict"],
        "clean": ["rm -rf"],
        "venv": [],
    }
    assert all(command in shown.stdout for command in commands[target])


def test_ci_runs_what_people_run():
    script = ROOT / ".ci" / "run"
    assert "make lint test" in script.read_text() and script.stat().st_mode & 0o111


def test_licence_is_whole():
    text = (ROOT / "LICENSE").read_text()
    assert (
        "Apache License" in text and "END OF TERMS AND CONDITIONS" in text and "limitations under the License." in text
    )
    assert project()["project"]["license"] == "Apache-2.0"


PACKAGE = ROOT / "src" / "perpetune"


def test_the_root_of_the_package_holds_rooms_alone():
    assert [p.name for p in PACKAGE.glob("*.py")] == ["__init__.py"]
    rooms = [p for p in PACKAGE.iterdir() if p.is_dir() and p.name != "__pycache__"]
    assert len(rooms) > 10 and all((room / "__init__.py").is_file() for room in rooms)


def test_no_file_is_longer_than_300_lines():
    lengths = {p.relative_to(PACKAGE).as_posix(): len(p.read_text().splitlines()) for p in PACKAGE.rglob("*.py")}
    assert not {name: n for name, n in lengths.items() if n > 300}


def contract(folder: Path) -> subprocess.CompletedProcess[str]:
    """`lint-imports` on the copy of the package in `folder`."""
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command as main; main()", "--no-cache"]
    return subprocess.run(
        command, cwd=folder, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": "src"}, check=False
    )


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {
            "core/errors.py": "from ..learning import config",
            "rules/base.py": "import perpetune.recipes.recipe",
            "heads/linear.py": "def late():\n    from ..tuners import QUERY_VALUE",
        },
        {"loose.py": ""},
    ],
    ids=["as it is", "the lowest layer, from outside, and in a function from a neighbour", "a module in no room"],
)
def test_a_broken_layer_fails_the_contract(changes, tmp_path):
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    shutil.copytree(PACKAGE, tmp_path / "src" / "perpetune", ignore=shutil.ignore_patterns("__pycache__"))
    for module, line in changes.items():
        with (tmp_path / "src" / "perpetune" / module).open("a") as file:
            file.write(f"\n{line}\n")
    found = contract(tmp_path)
    assert found.returncode == bool(changes), found.stdout + found.stderr
    assert changes or "KEPT" in found.stdout
    for module in changes:
        name = module.removesuffix(".py").replace("/", ".")
        assert f"perpetune.{name}" in found.stdout + found.stderr, found.stdout
