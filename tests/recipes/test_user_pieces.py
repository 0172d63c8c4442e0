"""Pieces of a user's own: docs/how-to/own-rule.md does what it says, and what cannot be written down is refused."""

from __future__ import annotations

import contextlib
import pickle
import re
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

import peft
import pytest
import yaml

import perpetune as pt
from perpetune.cli import app as cli
from perpetune.heads import Head
from perpetune.operations import workers
from perpetune.operations.grid import in_turn
from perpetune.recipes.user_pieces import home
from perpetune.routers import KMeansRouter
from perpetune.tuners import Frozen, Tuner

PAGE = Path(__file__).resolve().parents[2] / "docs" / "how-to" / "own-rule.md"
RULE, HEAD, TUNER, LEARN, OPEN = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)


@pytest.fixture(scope="module")
def page(tiny_bert, word_stream, tmp_path_factory):
    """The page as it is read: its module written and imported, its recipe learned. The folder, and what it defines."""
    folder = tmp_path_factory.mktemp("page")
    (folder / "my_pieces.py").write_text(RULE + HEAD + TUNER)
    model = str(tiny_bert())
    code = LEARN.replace("sentence-transformers/all-MiniLM-L6-v2", model).replace("my_tasks/", str(word_stream))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.syspath_prepend(str(folder))
        defined: dict = {"stream": pt.load_stream(str(word_stream)), "model": model}
        exec(code, defined)
        yield folder, defined
    del sys.modules["my_pieces"]


def test_the_page_learns_and_opens_again(page):
    folder, defined = page
    assert [m.name for m in defined["recipe"].rules[0].guarantee()] == ["distance from the start"]
    assert {m["name"] for m in defined["result"].guarantees} >= {"distance from the start"}
    written = yaml.safe_load((folder / "runs/mine/run.yaml").read_text())["recipe"]
    assert written["rules"] == [{"type": "PullToStart", "module": "my_pieces", "strength": 0.1}]
    assert written["tuner"] == {"type": "ScaleConfig", "module": "my_pieces", "target_modules": ["dense"]}
    assert [h.get("module") for h in written["heads"]] == [None, "my_pieces"]
    exec(OPEN, defined)
    texts = defined["stream"].tasks[0].test["text"]
    by_import, by_recipe = pt.Learner.open("runs/mine"), pt.Learner.open("runs/mine", recipe=defined["recipe"])
    for head in ("linear", "euclid"):
        expected = defined["learner"].predict(texts, head=head)
        assert by_import.predict(texts, head=head) == by_recipe.predict(texts, head=head) == expected


def test_the_page_s_pieces_resume_to_the_bit(page):
    folder, defined = page
    stream, seen = defined["stream"], {}
    first = stream.tasks[:2]
    grown = replace(stream, tasks=first, labels=[stream.labels[c] for task in first for c in task.classes])
    for part in (grown, stream):
        learner = pt.Learner(defined["model"], recipe=defined["recipe"], run="runs/parts")
        learner.learn(part)
    for run in ("mine", "parts"):
        files = sorted(p for p in (folder / "runs" / run / "commits").rglob("*.safetensors") if "head" in p.name)
        seen[run] = [p.read_bytes() for p in files]
    assert seen["mine"] == seen["parts"] and len(seen["mine"]) > 2
    with pytest.raises(pt.RunError, match="strength"):
        other = pt.Recipe(
            defined["recipe"].tuner.config, [defined["PullToStart"](0.2)], head=defined["recipe"].heads,
            training={"learning_rate": 1e-2}, name="mine",
        )  # fmt: skip
        pt.Learner(defined["model"], recipe=other, run="runs/mine").learn(stream)


def call(monkeypatch, *arguments, code=2):
    monkeypatch.setattr(sys, "argv", ["perpetune", *map(str, arguments)])
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert (stop.value.code or 0) == code


def test_the_command_line_imports_what_it_is_told(page, elsewhere, tmp_path, monkeypatch, capsys):
    folder, _ = page
    source = str(Path(pt.__file__).parents[1])
    code = f"import os, sys\nos.chdir({str(folder)!r})\nsys.path.insert(0, {source!r})\n"
    code += "from perpetune.cli.app import main\nmain()"
    told = elsewhere(code, "diff", "runs/mine", "--import", "my_pieces")  # nothing is imported there
    assert "perpetune_scale_v" in told
    _, _, written = (folder / "runs/mine/run.yaml").read_text().partition("\n")  # its first line is a hash
    (tmp_path / "run.yaml").write_text(written.replace("my_pieces", "their_pieces"))
    call(monkeypatch, "export", tmp_path, "--out", tmp_path / "model")
    error = capsys.readouterr().err
    assert "their_pieces.ScaleConfig" in error and "--import their_pieces" in error and "recipe=..." in error


MAKE = """
import os, pickle, sys
sys.path[:] = {path!r}
os.chdir({folder!r})
assert "my_pieces" not in sys.modules
with open(sys.argv[1], "rb") as file:
    make, *given = pickle.load(file)
with open(sys.argv[2], "wb") as file:
    pickle.dump(make(*given), file)
"""


def test_a_configuration_with_a_piece_of_ones_own(page, word_stream, elsewhere, tmp_path, monkeypatch, capsys):
    """As it stands on the page; compared in a process of its own, which knows no more than what it is sent."""

    @contextlib.contextmanager
    def sent(make, environments, retries, progress):
        assert len(environments) == 2

        def made(job, wait):
            (tmp_path / "sent").write_bytes(pickle.dumps((make, job, wait)))
            elsewhere(MAKE.format(path=sys.path, folder=str(folder)), tmp_path / "sent", tmp_path / "told")
            return pickle.loads((tmp_path / "told").read_bytes())

        yield in_turn(made)

    monkeypatch.setattr(workers, "processes", sent)
    folder, defined = page
    monkeypatch.chdir(folder)
    (configuration,) = re.findall(r"```yaml\n(.*?)```", PAGE.read_text(), re.DOTALL)
    recipe = {"recipes": [yaml.safe_load(configuration)["recipe"]], "controls": False, "seeds": [0]}
    text = configuration.replace("sentence-transformers/all-MiniLM-L6-v2", defined["model"]).replace("runs/", "own/")
    (folder / "one.yaml").write_text(text)
    (folder / "many.yaml").write_text(yaml.safe_dump({"model": defined["model"], **recipe, "jobs": 2}))
    options = ["--stream", word_stream, "--tasks", "films", "--epochs", "1", "--import", "my_pieces"]
    for command in (["run", "one.yaml"], ["compare", "many.yaml", "--out", "many"]):
        call(monkeypatch, *command, *options, code=0)
    written = yaml.safe_load((folder / "own/mine/run.yaml").read_text())["recipe"]
    assert written["rules"] == [{"type": "PullToStart", "module": "my_pieces", "strength": 0.1}]
    assert len(list((folder / "many").glob("mine/seed-*/*/run.yaml"))) == 1


@pytest.mark.parametrize(
    "name",
    [["export", "runs/x", "--out", "y"], ["revert", "runs/x", "t"], ["tune-scale", "runs/x"], ["diff", "runs/x"]],
)
def test_a_module_that_is_not_there(name, monkeypatch, capsys):
    call(monkeypatch, *name, "--import", "not_a_module.of_mine")
    assert "no module `not_a_module.of_mine`" in capsys.readouterr().err


LORA = {"type": "LoraConfig", "r": 2, "target_modules": ["query"]}


@dataclass
class Pull(pt.Rule):
    strength: float = 0.1
    count: int = field(init=False, default=0)


@dataclass
class Mine(Frozen):
    depth: int = 1


@dataclass
class Kept(pt.Continue):
    much: float = 1.0


@dataclass
class MyRouter(KMeansRouter):
    extra: int = 0


class Told(Head):
    name = "told"

    def __init__(self, power=1.0):
        super().__init__()
        self.power = power

    def config(self):
        return {"power": self.power}


def test_every_slot_goes_to_plain_data_and_back():
    lora = peft.LoraConfig(r=2, target_modules=["query"])
    for recipe in (
        pt.Recipe(lora, [Pull(0.5), pt.ProductL1(0.1)], Kept(2.0), Told(3.0)),
        pt.Recipe(Mine(7), head=pt.PrototypeHead()),
        pt.Recipe(lora, consolidation=pt.PerTask(MyRouter(extra=3))),
    ):
        data = yaml.safe_load(yaml.safe_dump(recipe.to_dict()))
        again = pt.Recipe.from_dict(data)
        assert again.to_dict() == data
        assert type(again.consolidation) is type(recipe.consolidation) and again.rules == recipe.rules
    assert {"type": "Pull", "module": __name__, "strength": 0.5} == pt.Recipe(lora, [Pull(0.5)]).to_dict()["rules"][0]
    assert type(again.consolidation.router) is MyRouter and again.consolidation.router.extra == 3


def test_a_tuner_registered_with_peft_needs_no_module(page):
    config = pt.Recipe.from_dict({"tuner": {"type": "ScaleConfig", "start": 0.5}}).tuner.config
    assert type(config).__module__ == "my_pieces" and config.start == 0.5
    with pytest.raises(pt.ConfigError, match="did you mean `start`"):
        pt.Recipe.from_dict({"tuner": {"type": "ScaleConfig", "stat": 0.5}})


def test_nothing_is_imported_by_plain_data(tmp_path, monkeypatch):
    (tmp_path / "never_imported.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    for slot in ("tuner", "rules", "consolidation", "head"):
        piece = {"type": "Pull", "module": "never_imported"}
        data = {"tuner": LORA, slot: [piece] if slot == "rules" else piece}
        with pytest.raises(pt.ConfigError, match=r"`never_imported\.Pull`, .*import never_imported .*recipe=\.\.\."):
            pt.Recipe.from_dict(data)
    with pytest.raises(pt.ConfigError, match="define it first"):  # there, but without the piece
        pt.Recipe.from_dict({"tuner": LORA, "rules": [{"type": "Gone", "module": __name__}]})
    with pytest.raises(pt.ConfigError, match="no rule is called `Pull`"):  # no module is named
        pt.Recipe.from_dict({"tuner": LORA, "rules": [{"type": "Pull"}]})


def test_of_pieces_defined_anew_the_newest_is_taken():
    made = [dataclass(type("Twice", (pt.Rule,), {"__module__": __name__})) for _ in range(2)]
    (rule,) = pt.Recipe.from_dict({"tuner": LORA, "rules": [{"type": "Twice", "module": __name__}]}).rules
    assert type(rule) is made[1]


def test_a_script_goes_by_the_name_of_its_file(tmp_path, monkeypatch):
    """Whether it is run or imported."""
    kind = type("Here", (), {"__module__": "__main__"})
    main = type(sys)("__main__")
    monkeypatch.setitem(sys.modules, "__main__", main)
    main.__spec__ = None
    assert home(kind) == "__main__"  # a notebook
    main.__file__ = str(tmp_path / "train.py")
    assert home(kind) == "train"
    main.__spec__ = type(sys)("spec")
    main.__spec__.name = "jobs.train"  # python -m jobs.train
    assert home(kind) == "jobs.train"


class NoDataclass(pt.Rule):
    def __init__(self, strength):
        self.strength = strength


class NoFields(Pull):
    def __init__(self, strength, more):
        super().__init__(strength)


@dataclass
class FixedConfig(peft.LoraConfig):
    def __init__(self, mine=1, **settings):
        super().__init__(**settings)


class PlainTuner(Tuner):
    pass


@dataclass
class Typed(pt.Rule):
    module: str = "x"


class Silent(Told):
    def config(self):
        return {}


@pytest.mark.parametrize(
    ("pieces", "message"),
    [
        ({"rules": [NoDataclass(0.1)]}, "NoDataclass .*make it a dataclass"),
        ({"rules": [NoFields(0.1, 2)]}, "NoFields .*make it a dataclass"),
        ({"tuner": FixedConfig()}, "FixedConfig .*make it a dataclass"),
        ({"tuner": PlainTuner()}, "PlainTuner .*make it a dataclass"),
        ({"rules": [Typed()]}, "setting `module`"),
        ({"head": Silent(2.0)}, r"Silent takes `power`, which its config\(\)"),
    ],
)
def test_settings_that_would_be_lost_are_refused(pieces, message):
    with pytest.raises(pt.ConfigError, match=message):
        pt.Recipe(**{"tuner": peft.LoraConfig(r=2), **pieces})


def test_numbers_that_yaml_reads_as_text_are_one_recipe():
    read = yaml.safe_load("{learning_rate: 2e-3, warmup_steps: 10, lr_scheduler_type: linear}")
    assert read["learning_rate"] == "2e-3"
    recipes = [pt.Recipe.from_dict({"tuner": LORA, "training": {**read, "learning_rate": v}}) for v in ("2e-3", 0.002)]
    assert recipes[0].to_dict() == recipes[1].to_dict()
    assert recipes[0].training == {"learning_rate": 0.002, "warmup_steps": 10, "lr_scheduler_type": "linear"}
    assert isinstance(recipes[0].training["warmup_steps"], int)


def test_settings_that_peft_refuses_are_one_line():
    recipe = {**pt.make_recipe("lora").to_dict(), "tuner": {"type": "LoraConfig", "target_modules": [[]]}}
    with pytest.raises(pt.ConfigError, match=r"peft refuses the settings of LoraConfig \(unhashable type: 'list'\)"):
        pt.make_recipe(recipe)
