"""Generated configurations of `perpetune run`: each a run, or one line. Part of `faults`.

A valid configuration is changed in one to four places: settings get values of the right or another kind, names are
misspelled, recipes, heads and training settings drawn from all that there are, bytes of the YAML file changed; half of
the settings are given as options of the command line. Every configuration goes through the whole command up to the
first task; of those that come so far, one in `TRAINED` is trained for a step a task.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import resource
import shutil
import signal
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from .fault_trials import Trials

TRAINED = 25
BATCH = 100  # configurations that share a process
LIMIT = 30  # seconds of CPU for one
OPENED = 77  # exit code of a run that is stopped before its first task
MEMORY = 12 << 30
ODD: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 7, 10**12, 1e-3, 0.5, -0.5, 1e308, float("nan"), float("inf"), "", " ", "a", "1",
    "1e-4", "null", "yes", "ü\u0000", "x" * 3000, [], [1], ["a", "b"], [[]], {}, {"a": 1}, {1: 2}, {"name": "lora"},
)  # fmt: skip


@dataclass(frozen=True)
class Tried:
    seed: int
    became: str
    wrong: str


class Generator:
    """Draws configurations around a valid one."""

    def __init__(self, trials: Trials) -> None:
        import inspect

        from transformers import TrainingArguments

        from perpetune.heads import HEADS
        from perpetune.learning.config import RunConfig
        from perpetune.learning.settings import settings_of
        from perpetune.recipes import RECIPES, make_recipe

        training = {**trials.training, "num_train_epochs": 1}
        stream = {"source": str(trials.stream), "scenario": "class"}
        self.valid = {"model": str(trials.model), "stream": stream, "recipe": "lora", "training": training}
        self.settings = [s for s in settings_of(RunConfig, "run") if s.name != "out"]
        self.training = sorted(inspect.signature(TrainingArguments.__init__).parameters.keys() - {"self"})
        self.recipes = {name: make_recipe(name).to_dict() for name in RECIPES}
        self.heads = sorted(HEADS)

    def draw(self, seed: int) -> tuple[bytes, list[str]]:
        """The bytes of a YAML file, and options."""
        draw = random.Random(seed)
        config: dict[str, Any] = json.loads(json.dumps(self.valid))
        options: list[str] = []
        for _ in range(draw.randint(1, 4)):
            draw.choice([self._set, self._set, self._option, self._train, self._recipe, self._head, self._misspell])(
                draw, config, options
            )
        content = yaml.safe_dump(config, sort_keys=False, allow_unicode=True).encode()
        if draw.random() < 0.05:
            at = draw.randrange(len(content))
            content = (
                content[:at]
                + draw.choice([b"", b"\t", b": ", b"\xff", b"- [", b"&a *a ", b"!!python/x "])
                + content[at + 1 :]
            )
        return content, options

    def _value(self, draw: random.Random, setting: Any) -> Any:
        if draw.random() < 0.5 and setting.example:
            return yaml.safe_load(setting.example.strip("'")) if "=" not in setting.example else {"a": "b"}
        return draw.choice(ODD)

    def _set(self, draw: random.Random, config: dict[str, Any], options: list[str]) -> None:
        setting, place = draw.choice(self.settings), config
        for key in setting.path[:-1]:
            if not isinstance(place.get(key), dict):
                place[key] = {}
            place = place[key]
        if draw.random() < 0.1:
            place.pop(setting.path[-1], None)
        else:
            place[setting.path[-1]] = self._value(draw, setting)

    def _option(self, draw: random.Random, config: dict[str, Any], options: list[str]) -> None:
        setting = draw.choice([s for s in self.settings if s.option])
        if isinstance(setting.default, bool):
            options.append(setting.option)
            return
        value = setting.example.strip("'") if draw.random() < 0.5 and setting.example else draw.choice(ODD)
        if "=" in setting.option or isinstance(value, str) and "\0" in value:
            return
        options += [setting.option, str(value)]

    def _train(self, draw: random.Random, config: dict[str, Any], options: list[str]) -> None:
        name, value = draw.choice(self.training), draw.choice(ODD)
        if draw.random() < 0.5 or not isinstance(config.get("training"), dict):
            options += ["--set", f"{name}={json.dumps(value)}"]
        else:
            config["training"][name] = value

    def _recipe(self, draw: random.Random, config: dict[str, Any], options: list[str]) -> None:
        recipe = json.loads(json.dumps(self.recipes[draw.choice(sorted(self.recipes))]))
        if draw.random() < 0.4:
            config["recipe"] = recipe["name"]
            return
        parts = [recipe, *(p for p in recipe.values() if isinstance(p, dict))]
        parts += [p for ps in recipe.values() if isinstance(ps, list) for p in ps if isinstance(p, dict)]
        part = draw.choice([p for p in parts if p])
        part[draw.choice(sorted(part))] = draw.choice(ODD)
        config["recipe"] = recipe

    def _head(self, draw: random.Random, config: dict[str, Any], options: list[str]) -> None:
        names = draw.choices(self.heads, k=draw.randint(1, 2))
        config["heads"] = [draw.choice([name, {"type": name, draw.choice("ab"): 1}, name]) for name in names]

    def _misspell(self, draw: random.Random, config: dict[str, Any], options: list[str]) -> None:
        place = draw.choice([config, *(p for p in config.values() if isinstance(p, dict))])
        if place:
            key = draw.choice(sorted(map(str, place)))
            place[key + draw.choice("sx_")] = place.get(key)


def tried(trials: Trials, count: int, first: int) -> Iterator[Tried]:
    """What becomes of the configurations of these seeds."""
    folder = trials.new()
    folder.mkdir(parents=True)
    generator, end = Generator(trials), first + count
    while first < end:
        found = folder / "found.jsonl"
        found.unlink(missing_ok=True)
        seeds = range(first, min(end, first + BATCH))
        child = trials.start([], before=partial(_try, generator, seeds, folder, found))
        child.wait(10 * BATCH * LIMIT)
        made = [Tried(**json.loads(line)) for line in found.read_text(encoding="utf-8").splitlines()]
        yield from made
        if len(made) < len(seeds):  # it took its process along
            said = child.said.strip().splitlines()[-1:]
            made.append(Tried(seeds[len(made)], "died", f"exit code {child.code}: {said}"))
            yield made[-1]
        first += len(made)


def _try(generator: Generator, seeds: range, folder: Path, found: Path) -> None:
    from perpetune.learning.task_loop import TaskLoop

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    learn, trained = TaskLoop.learn_all, False

    def stopped(self: TaskLoop, *arguments: Any) -> bool:
        if not trained:
            self.run.close()
            raise SystemExit(OPENED)
        self.step_limit = 1
        return learn(self, *arguments)

    TaskLoop.learn_all = stopped  # type: ignore[method-assign]
    signal.signal(signal.SIGPROF, _late)
    os.chdir(folder)
    with open(found, "a", encoding="utf-8") as file:
        for seed in seeds:
            trained = seed % TRAINED == 0
            content, options = generator.draw(seed)
            became, wrong = _outcome(content, options, folder)
            file.write(json.dumps({"seed": seed, "became": became, "wrong": wrong}) + "\n")
            file.flush()
    os._exit(0)


def _late(*_: Any) -> None:
    raise TimeoutError(f"not done after {LIMIT} s")


def _outcome(content: bytes, options: list[str], folder: Path) -> tuple[str, str]:
    from perpetune.cli import main

    (folder / "c.yaml").write_bytes(content)
    out, err, code = io.StringIO(), io.StringIO(), 0
    signal.setitimer(signal.ITIMER_PROF, LIMIT)  # of its own time: the machine may be busy
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), warnings.catch_warnings():
            main(["run", "c.yaml", "--out", "run", *options])
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException as error:
        return "traceback", f"{type(error).__name__}: {error}"
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        shutil.rmtree(folder / "run", ignore_errors=True)
    if code in (0, OPENED):
        return ("learned" if code == 0 else "opened"), ""
    lines = [
        line for line in err.getvalue().splitlines() if line.startswith("perpetune: ") and "warning" not in line[:20]
    ]
    told = f"{options} {content!r}: " if code != 2 or len(lines) != 1 or "unforeseen" in lines[0] else ""
    if code != 2 or len(lines) != 1:
        return "refused", f"{told}exit code {code}, {len(lines)} lines: {err.getvalue()[-300:]}"
    return "refused", f"{told}{lines[0]}" if told else ""
