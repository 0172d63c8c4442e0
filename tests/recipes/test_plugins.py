"""What installed packages add: found by name, listed, opened again without --import; and nothing else of theirs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import perpetune as pt
from perpetune.core.plugins import PIECES, RECIPES, installed
from perpetune.heads import make_head
from perpetune.recipes import make_recipe
from perpetune.routers import make_router
from tests.calling import call

PROJECT = """
[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"

[project]
name = "pull-pieces"
version = "1.2"

[tool.setuptools]
packages = ["pull_pieces"]

[project.entry-points."perpetune.recipes"]
pulled = "pull_pieces.recipes:pulled"

[project.entry-points."perpetune.pieces"]
pull = "pull_pieces:Pull"
euclid = "pull_pieces:EuclidHead"
gentle_merge = "pull_pieces:GentleMerge"
first_known = "pull_pieces:FirstKnown"
still = "pull_pieces:Still"
small_lora = "pull_pieces:SmallLoraConfig"
"""
PIECES_FILE = '''
from dataclasses import dataclass

import peft

import perpetune as pt


@dataclass
class Pull(pt.Rule):
    """Pulls weights towards zero."""

    strength: float = 0.1

    def begin_task(self, task):
        self.weights = [p for p in task.model.parameters() if p.requires_grad]

    def on_gradient(self):
        for w in self.weights:
            if w.grad is not None:
                w.grad.add_(w.detach(), alpha=self.strength)


class EuclidHead(pt.PrototypeHead):
    """Class means under another name."""

    name = "euclid"

    def __init__(self, power: float = 1.0):
        super().__init__()
        self.power = power

    def config(self):
        return {"power": self.power}


@dataclass
class GentleMerge(pt.Merge):
    """Merges, gently."""


@dataclass
class FirstKnown(pt.KMeansRouter):
    """Routes by centres."""


@dataclass
class Still(pt.Frozen):
    """Trains nothing."""


@dataclass
class SmallLoraConfig(peft.LoraConfig):
    """A LoRA."""
'''
RECIPES_FILE = '''
import peft

import perpetune as pt

from . import Pull


def pulled(rank: int = 2, strength: float = 0.5):
    """A LoRA that is pulled towards zero (nobody et al., 2027)."""
    lora = peft.LoraConfig(r=rank, target_modules=["query", "value"])
    return pt.Recipe(lora, [Pull(strength)], pt.Merge(), pt.LinearHead())
'''


@pytest.fixture(scope="module")
def package(tmp_path_factory) -> Path:
    """The folder in which a package of somebody else's is installed, by pip."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("target")
    (source / "pull_pieces").mkdir()
    (source / "pyproject.toml").write_text(PROJECT, encoding="utf-8")
    (source / "pull_pieces" / "__init__.py").write_text("from .pieces import *\n", encoding="utf-8")
    (source / "pull_pieces" / "pieces.py").write_text(PIECES_FILE, encoding="utf-8")
    (source / "pull_pieces" / "recipes.py").write_text(RECIPES_FILE, encoding="utf-8")
    (source / "pull_pieces" / "evil.py").write_text("raise SystemExit('imported')\n", encoding="utf-8")
    options = ["--no-index", "--no-deps", "--no-build-isolation", "--disable-pip-version-check", "-q"]
    line = [sys.executable, "-m", "pip", "install", *options, "--target", str(target), str(source)]
    made = subprocess.run(line, capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stderr
    return target


@pytest.fixture
def new_process(elsewhere, package, tmp_path):
    """`new_process(code)`: what Python prints where the package is installed too, in `tmp_path`."""
    path = list(map(str, [package, *(p or os.getcwd() for p in sys.path)]))
    start = f"import os, sys\nos.chdir({str(tmp_path)!r})\nos.environ['COLUMNS'] = '300'\nsys.path[:] = {path!r}\n"
    return lambda code: elsewhere(start + code)


LINES = """
import json, sys
from perpetune.cli import main
for line in json.loads({lines!r}):
    try: main(line)
    except SystemExit as stop:
        assert not stop.code, (line, stop.code)
"""


AGAIN = """
import perpetune as pt
print([pt.Learner.open(run).predict(["good film"], head="euclid") for run in ("named", "spelled")])
lora = {"type": "LoraConfig", "r": 2, "target_modules": ["query"]}
for data in (
    {"tuner": {"type": "still"}, "head": "ncm"},
    {"tuner": lora, "consolidation": {"type": "PerTask", "router": {"type": "first_known", "centres": 3}}},
):
    recipe = pt.Recipe.from_dict(data)
    again = pt.Recipe.from_dict(recipe.to_dict())
    assert again.to_dict() == recipe.to_dict()
    print(type(again.tuner).__name__, getattr(again.consolidation, "router", None))
try:
    pt.Recipe.from_dict({"tuner": lora, "rules": [{"type": "Evil", "module": "pull_pieces.evil"}]})
except pt.ConfigError as error:
    print(error)
"""


def test_an_installed_package_is_listed_learned_with_and_opened_again(new_process, tiny_bert, word_stream, tmp_path):
    small = ["--model", str(tiny_bert()), "--stream", str(word_stream), "--tasks", "films", "--epochs", "1"]
    spelled = {
        "tuner": {"type": "small_lora", "r": 2, "target_modules": ["query"]},
        "rules": [{"type": "pull", "strength": 0.25}],
        "consolidation": "gentle_merge",
        "heads": ["linear", {"type": "euclid", "power": 2.0}],
    }
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({"recipe": spelled, "out": "spelled"}), encoding="utf-8")
    kinds = ("recipes", "rules", "heads", "consolidations", "routers", "tuners")
    lines = [["list", kind] for kind in kinds]
    lines += [["run", "--recipe", "pulled", "--heads", "linear,euclid", "--out", "named", *small]]
    lines += [["run", "c.yaml", *small]]
    found = new_process(LINES.format(lines=json.dumps(lines)))
    assert found.count("(from the package pull-pieces)") == 7
    assert "A LoRA that is pulled towards zero" in found and "rank=2, strength=0.5" in found
    named, written = (yaml.safe_load((tmp_path / n / "run.yaml").read_text())["recipe"] for n in ("named", "spelled"))
    assert named["name"] == "pulled"
    assert named["rules"] == [{"type": "Pull", "module": "pull_pieces.pieces", "strength": 0.5}]
    assert written["rules"] == [{"type": "Pull", "module": "pull_pieces.pieces", "strength": 0.25}]
    assert written["consolidation"]["type"] == "GentleMerge"
    assert written["tuner"]["type"] == "SmallLoraConfig" and written["heads"][1]["power"] == 2.0

    predicted, still, routed, evil = new_process(AGAIN).splitlines()
    assert predicted.count("[") == 3
    assert still.startswith("Still") and "FirstKnown(centres=3" in routed
    assert "`pull_pieces.evil.Evil`, which is not there" in evil  # nothing but entry points is imported
    with pytest.raises(pt.ConfigError, match="`pull_pieces.pieces.SmallLoraConfig`, which is not there: import pull"):
        pt.Learner.open(tmp_path / "spelled")  # here it is not installed


@pytest.fixture
def install(tmp_path, monkeypatch):
    """`install(name, module_text, recipes={...}, pieces={...})`: what pip writes for a package, written by hand."""

    def made(name: str, text: str, **groups: dict[str, str]) -> None:
        folder = tmp_path / name
        (folder / f"{name}-1.0.dist-info").mkdir(parents=True)
        (folder / f"{name}.py").write_text(text, encoding="utf-8")
        (folder / f"{name}-1.0.dist-info" / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n"
        )
        points = "".join(
            f"[perpetune.{group}]\n" + "".join(f"{key} = {name}:{value}\n" for key, value in named.items())
            for group, named in groups.items()
        )
        (folder / f"{name}-1.0.dist-info" / "entry_points.txt").write_text(points, encoding="utf-8")
        monkeypatch.syspath_prepend(str(folder))

    return made


MODULE = """
import dataclasses
import perpetune as pt
@dataclasses.dataclass
class Tug(pt.Rule):
    strength: float = 0.1
def tugged(rank: int = 2):
    "Tugs."
    return make(rank)
def make(rank):
    from perpetune.recipes import make_recipe
    return make_recipe({"name": "lora", "rank": rank})
def nothing():
    return 3
number = 3
"""


def test_names_that_two_packages_have_are_refused(install, monkeypatch, capsys):
    install("their_a", MODULE, recipes={"nlora": "tugged", "tugged": "tugged"}, pieces={"ridge": "Tug", "tug": "Tug"})
    install("their_b", MODULE, recipes={"tugged": "tugged"}, pieces={"KMeansRouter": "Tug", "LoraConfig": "Tug"})
    for recipe, owners in (
        ("nlora", "perpetune and in their_a"),
        ("tugged", "their_a and in their_b|their_b and in their_a"),
    ):
        with pytest.raises(pt.ConfigError) as error:
            make_recipe(recipe)
        assert any(o in str(error.value) for o in owners.split("|")), error.value
    for make, name in ((make_head, "ridge"), (make_router, "KMeansRouter")):
        with pytest.raises(pt.ConfigError, match=f"`{name}` stands for something in perpetune and in their_"):
            make(name)
    with pytest.raises(pt.ConfigError, match="`LoraConfig` stands for something in perpetune and in their_b"):
        pt.Recipe.from_dict({"tuner": {"type": "LoraConfig", "r": 2}})
    assert make_recipe("lora").name == "lora"  # all else goes on
    monkeypatch.setenv("COLUMNS", "300")
    code, out, _ = call(monkeypatch, capsys, "list", "recipes")
    assert code == 0 and out.count("stands for something in") == 3 and "olora" in out


def test_a_package_that_cannot_be_imported_is_named_when_it_is_asked_for(install, monkeypatch, capsys):
    install("broken_c", "import no_such_module\n", recipes={"worn": "worn"}, pieces={"torn": "Torn"})
    install("broken_d", "raise SystemExit('bye')\n", pieces={"gone": "Gone"})
    line = "`worn` of the package broken_c cannot be loaded from broken_c:worn (ModuleNotFoundError: No module named "
    with pytest.raises(pt.ConfigError) as error:
        make_recipe("worn")
    assert line in str(error.value) and "\n" not in str(error.value)
    lora = {"type": "LoraConfig", "r": 2, "target_modules": ["query"]}
    with pytest.raises(pt.ConfigError, match="`torn` of the package broken_c"):
        pt.Recipe.from_dict({"tuner": lora, "rules": ["torn"]})
    with pytest.raises(pt.ConfigError, match="`gone` of the package broken_d .*SystemExit: bye"):
        make_head("gone")
    assert make_recipe("lora") and make_head("ridge") and make_router("RidgeRouter")
    with pytest.raises(pt.ConfigError, match="no recipe is called `wornn`: did you mean `worn`"):
        make_recipe("wornn")
    monkeypatch.setenv("COLUMNS", "300")
    code, out, err = call(monkeypatch, capsys, "list", "rules")
    assert code == 0 and "product_l1" in out and "`torn` of the package broken_c cannot be loaded" in out, err
    code, _, err = call(monkeypatch, capsys, "run", "--stream", "digits", "--recipe", "worn")
    assert code == 2 and line in err and err.count("\n") == 1


def test_what_is_no_recipe_and_no_piece_of_the_slot_is_refused(install):
    install("their_e", MODULE, recipes={"nothing": "nothing", "number": "number"}, pieces={"tug": "Tug"})
    with pytest.raises(pt.ConfigError, match="`nothing` returns int, and not a Recipe"):
        make_recipe("nothing")
    with pytest.raises(pt.ConfigError, match="`number` is no function that returns a Recipe, but 3"):
        make_recipe("number")
    with pytest.raises(pt.ConfigError, match="no head is called `tug`"):
        make_head("tug")  # it is a rule
    lora = {"type": "LoraConfig", "r": 2, "target_modules": ["query"]}
    (rule,) = pt.Recipe.from_dict({"tuner": lora, "rules": [{"type": "tug", "strength": 0.5}]}).rules
    assert type(rule).__name__ == "Tug" and rule.strength == 0.5
    with pytest.raises(pt.ConfigError, match="did you mean `strength`"):
        pt.Recipe.from_dict({"tuner": lora, "rules": [{"type": "tug", "strenght": 0.5}]})
    assert {p.name for p in installed(PIECES)} >= {"tug"} and {p.name for p in installed(RECIPES)} >= {"nothing"}


def test_the_bases_of_all_slots_are_public():
    for name in ("Rule", "Head", "Consolidation", "Router", "Tuner"):
        assert isinstance(getattr(pt, name), type) and name in pt.__all__


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = (", "SyntaxError: .* \\(mine.py, line 1\\)"),
        ("\nx = unknown", "NameError: .* \\(mine.py, line 2\\)"),
        ("import no_such_module", "ModuleNotFoundError: .*no_such_module"),
    ],
)
def test_a_module_of_ones_own_that_fails_is_told_with_its_line(text, message, tmp_path, monkeypatch):
    from perpetune.recipes.user_pieces import import_modules

    (tmp_path / "mine.py").write_text(text, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(pt.ConfigError, match=f"your module `mine` cannot be imported: {message}"):
        import_modules(["mine"])
    assert "mine" not in sys.modules
