"""The wheel, installed alone in an environment of its own: its command runs, and the data that it reads is there."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def told(*command: object, cwd: Path, **environment: str) -> str:
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "COVERAGE"))}
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, capture_output=True, text=True, env={**plain, **environment}, check=False
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the commands of an environment that has the wheel, and what it depends on from the environment of
    the tests. Only the latter's folder is taken: the .pth files in it, the editable perpetune among them, are not."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"  # a copy: setuptools writes beside what it builds, and takes what lies in build/
    shutil.copytree(ROOT / "src", source / "src", ignore=shutil.ignore_patterns("*.egg-info", "__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check")
    told(*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, source, cwd=folder)
    told(sys.executable, "-m", "venv", "--without-pip", folder / "venv", cwd=folder)
    python = folder / "venv" / "bin" / "python"
    (wheel,) = folder.glob("*.whl")
    told(*pip, "--python", python, "install", "--no-deps", "--no-index", wheel, cwd=folder)
    (packages,) = (folder / "venv" / "lib").glob("python*/site-packages")
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    shutil.rmtree(source)
    return python.parent


def test_the_data_that_the_package_reads_is_in_it(scripts: Path, tmp_path: Path) -> None:
    code = "import perpetune, pathlib; print(pathlib.Path(perpetune.__file__).parent)"
    package = Path(told(scripts / "python", "-c", code, cwd=tmp_path).strip())
    assert package.is_relative_to(scripts.parent)
    inside = {p.relative_to(package).as_posix() for p in package.rglob("*") if p.is_file() and p.suffix != ".pyc"}
    files = [p for p in (ROOT / "src/perpetune").rglob("*") if p.is_file() and p.suffix != ".pyc"]
    ours = {p.relative_to(ROOT / "src/perpetune").as_posix() for p in files}
    assert {"py.typed", "learning/passages.txt", "report/report.html.j2"} < ours <= inside


# in a process that has imported torch, transformers and peft, which takes seconds; perpetune is that of the wheel
RUN = """
import os, sys
folder, packages, *line = sys.argv[1:]
sys.path.insert(0, packages)
os.chdir(folder)
import perpetune.cli
assert perpetune.__file__.startswith(packages)
sys.argv = ["perpetune", *line]
perpetune.cli.main()
"""


def test_the_command_is_there_and_learns(scripts: Path, tiny_lm, word_stream: Path, tmp_path: Path, elsewhere) -> None:
    """A language model: its run reads the passages, its report the templates."""
    assert "--jobs" in told(scripts / "perpetune", "demo", "--help", cwd=tmp_path)
    line = "run --recipe lora --pose instruction --epochs 1 --train-limit 8 --test-limit 4 --tasks films --out runs/it"
    line += " --trainer perpetune"  # TRL takes seconds to import
    (packages,) = (scripts.parent / "lib").glob("python*/site-packages")
    model = ("--model", tiny_lm("llama"), "--stream", word_stream)
    assert "final accuracy" in elsewhere(RUN, tmp_path, packages, *line.split(), *model)
    assert (tmp_path / "runs/it/report/index.html").stat().st_size > 10_000
    assert "films" in told(scripts / "perpetune", "log", "runs/it", cwd=tmp_path)
