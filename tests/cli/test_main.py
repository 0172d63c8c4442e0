"""How the command line starts and ends: help without torch, one line for every error, codes that a script can use."""

from __future__ import annotations

import errno
import shutil
import subprocess
import sys

import pydantic
import pytest
import yaml

from perpetune import __version__
from perpetune.cli import app as cli
from perpetune.cli import kinds
from tests.calling import call

HEAVY = "{'torch', 'transformers', 'peft', 'datasets', 'sklearn', 'pandas', 'numpy'}"


@pytest.fixture
def perpetune(monkeypatch, capsys):
    return lambda *arguments: call(monkeypatch, capsys, *arguments)


def test_help_imports_nothing_heavy():
    code = (
        "import sys\nfrom perpetune.cli import main\n"
        "for line in ('--help', 'run --help', 'compare --help', 'list --help', 'gate -h', '--version', ''):\n"
        "    try: main(line.split())\n"
        "    except SystemExit as stop: print('CODE', line, stop.code)\n"
        f"print('HEAVY', sorted({HEAVY} & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "HEAVY []" in found.stdout and "perpetune demo" in found.stdout
    assert found.stdout.count(" 0\n") == 6 and "CODE  2" in found.stdout


@pytest.mark.parametrize(
    "command",
    "demo run compare recommend report list log diff gate predict export revert tune-scale verify".split(),
)
def test_every_command_has_help(perpetune, command):
    code, out, _ = perpetune(command, "--help")
    assert code == 0 and "Usage: perpetune" in out


def test_help_is_grouped_and_teaches(perpetune, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    code, out, _ = perpetune("run", "--help")
    panels = ["Model", "Data", "Data without boundaries", "Recipe", "Training", "Evaluation", "Output"]
    places = [out.index(f"─ {panel} ─") for panel in panels]
    assert code == 0 and places == sorted(places)
    assert "Example: agnews,amazon,yelp" in out and "Default: 0.2" in out and "Comparison" not in out
    assert "--controls" in perpetune("compare", "--help")[1]
    listed = perpetune("list", "--help")[1]
    assert all(name in listed and kind.about[:30] in " ".join(listed.split()) for name, kind in kinds.KINDS.items())


def test_the_version(perpetune):
    code, out, _ = perpetune("--version")
    assert (
        code == 0 and out.startswith(f"perpetune {__version__} (python 3.") and "torch" in out and out.count("\n") == 1
    )


def test_it_runs_as_a_module(tmp_path):
    command = [sys.executable, "-m", "perpetune.cli", "run", "--stream"]
    found = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert found.returncode == 2 and found.stderr == "perpetune: Option '--stream' requires an argument.\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["rum"], "No such command 'rum'"),
        (["run", "--steam", "x"], "No such option: --steam"),
        (["run", "--seed", "x"], "'--seed'"),
        (["gate"], "Missing argument"),
        (["log", "a", "b"], "b"),
    ],
)
def test_a_line_that_cannot_be_parsed_is_one_line(perpetune, arguments, message):
    code, out, err = perpetune(*arguments)
    assert (code, out) == (2, "") and message in err and err.count("\n") == 1 and err.startswith("perpetune: ")


class Wrong(pydantic.BaseModel):
    size: int


def _pydantic():
    Wrong(size="many")


def _yaml():
    yaml.safe_load("a: [")


def _full():
    raise OSError(errno.ENOSPC, "No space left on device", "runs/x")


def _fault():
    raise ValueError("first line\nsecond line")


@pytest.mark.parametrize(
    ("fault", "message"),
    [(_pydantic, "size Input should be a valid integer"), (_yaml, "while parsing"), (_full, "No space left"),
     (_fault, "ValueError: first line (")],
)  # fmt: skip
def test_errors_that_nobody_foresaw_are_one_line_too(perpetune, monkeypatch, fault, message):
    """And no exit code of a gate: 1 would say that the newest task may not stay."""
    monkeypatch.setattr("perpetune.runs.result.Result.__init__", lambda *_: fault())
    code, _, err = perpetune("gate", "runs/x")
    assert code == 2 and message in err and err.count("\n") == 1 and "PERPETUNE_TRACEBACK=1" in err
    monkeypatch.setenv("PERPETUNE_TRACEBACK", "1")
    with pytest.raises((ValueError, OSError, yaml.YAMLError)):
        perpetune("gate", "runs/x")


def test_ctrl_c_is_one_line(perpetune, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("perpetune.runs.result.Result.__init__", interrupted)
    code, _, err = perpetune("log", "runs/x")
    assert code == 130 and err.strip().count("\n") == 0 and "interrupted" in err
    monkeypatch.setattr(cli, "app", interrupted)  # before a command began
    assert perpetune("log", "runs/x")[0] == 130


def test_a_list_of_everything_begins_with_what_the_kinds_are(perpetune, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    code, out, _ = perpetune("list")
    assert code == 0 and all(kind.about in out for kind in kinds.KINDS.values())
    assert "nlora" in out and "--recipe nlora" in out


def test_a_warning_is_one_line_without_a_place_in_the_code(perpetune, word_stream, tmp_path):
    data = shutil.copytree(word_stream, tmp_path / "data")
    (data / "next_week").mkdir()
    code, _, err = perpetune("run", "--model", tmp_path / "nowhere", "--stream", data, "--out", tmp_path / "run")
    told, refused = err.splitlines()
    assert code == 2 and told.startswith(f"perpetune: warning: {data / 'next_week'} is empty, and no task")
    assert refused.startswith("perpetune: cannot load")
