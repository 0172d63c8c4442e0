"""What is lost when processes are killed, disks fill up, files are damaged and settings are wrong: nothing.

    python -m benchmarks.faults --kills 200 --places 1000 --configurations 10000

Every trial is a run of a micro BERT on three tasks in a forked process. `instants`: SIGKILL at a random instant;
`operations`: right before every single operation on a file; `ranks`: one or both of two processes that train together;
`commands`: as `operations`, while a task is learned again or taken out, or a run repaired. `full`: from a random
operation on no file grows beyond a random number of bytes. `places`: a byte flipped, or the file cut, at a random place
of a finished run. `clock`: it jumps by up to ten years, and the run is killed. `two`: two processes on one directory,
and one that reads. `settings`: see `fault_settings`.

After each: commits are those of a run that nothing happened to, in its bits; started again, it ends in the same bits;
damage is seen by `verify`; whatever was refused, was so in one line. A trial for which that does not hold is printed
with its seed, and makes the exit code 1.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import shutil
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from .command import Benchmark, Option
from .fault_settings import tried
from .fault_trials import Trials, at_file_operation, contents, die, jumping_clock, no_room

SAMPLED = 10  # one damaged run in so many is repaired and learned to its end


@dataclass(frozen=True)
class Trial:
    """`became`: in a few words; `wrong`: what should not be, empty where all is well."""

    kind: str
    seed: int
    became: str
    wrong: str = ""


class Faults:
    """Each method makes one trial from its seed.

    Attributes:
        whole: the commits of a run that nothing happened to, of one process and of two.
    """

    def __init__(self, trials: Trials) -> None:
        self.trials = trials
        self.run = trials.new()
        begun = time.monotonic()
        self._well(["run"], trials.start(trials.command(self.run)))
        self.seconds = time.monotonic() - begun
        self.whole = {1: contents(self.run)}

    def _well(self, what: list[str], *children: Any) -> None:
        for child in children:
            if child.wait():
                raise RuntimeError(f"{' '.join(what)}: {child.said}")

    # ---- what must hold ----

    def _kept(self, run: Path, ranks: int = 1) -> str:
        from perpetune import RunError
        from perpetune.operations.verify import verify

        there, whole = contents(run), self.whole[ranks]
        if any(whole.get(name) != content for name, content in there.items()):
            return "a commit has other bits than that of a run that nothing happened to"
        folders = {Path(name).parts[0] for name in there}
        if any(Path(name).parts[0] in folders and name not in there for name in whole):
            return "a commit lacks a file"
        try:
            found = verify(run)
        except RunError as error:
            return f"verify: {error}" if there else ""
        return "" if found.passed else f"verify: {found.damages}"

    def _ends(self, run: Path, ranks: int = 1) -> str:
        """Started again, it ends as the run that nothing happened to."""
        command = self.trials.command(run, ranks=ranks)
        children = [self.trials.start(command)] if ranks == 1 else self.trials.together(command)
        try:
            codes = [child.wait() for child in children]
        except TimeoutError as error:
            found = f"{error}; of the others: {[child.said[-300:] for child in children if child.code is not None]}"
            for child in children:
                child.signal(signal.SIGKILL)
            return found
        if any(codes):
            return f"does not go on: {[child.said[-300:] for child in children if child.code]}"
        return "" if contents(run) == self.whole[ranks] else "ends in other bits"

    def _after(self, kind: str, seed: int, run: Path, wrong: str = "", ranks: int = 1) -> Trial:
        tasks = len({Path(name).parts[0] for name in contents(run)})
        became = f"{max(0, tasks - 1)} tasks kept"
        wrong = wrong or self._kept(run, ranks) or self._ends(run, ranks)
        return Trial(kind, seed, became, wrong)

    # ---- processes die ----

    def instant(self, seed: int) -> Trial:
        run = self.trials.new()
        child = self.trials.start(self.trials.command(run))
        time.sleep(random.Random(seed).uniform(0, self.seconds))
        child.signal(signal.SIGKILL)
        child.wait()
        return self._after("instants", seed, run)

    def ranks(self, seed: int) -> Trial:
        if 2 not in self.whole:
            run, begun = self.trials.new(), time.monotonic()
            self._well(["two ranks"], *self.trials.together(self.trials.command(run, ranks=2)))
            self.whole[2], self.seconds_of_two = contents(run), time.monotonic() - begun
        draw, run = random.Random(seed), self.trials.new()
        children = self.trials.together(self.trials.command(run, ranks=2))
        time.sleep(draw.uniform(0, self.seconds_of_two))
        killed = draw.choice([children, children[:1], children[1:]])
        for child in killed:
            child.signal(signal.SIGKILL)
        wrong = ""
        for child in killed:
            child.wait()
        for child in children:
            if child not in killed:
                try:
                    child.wait(2.0)  # it finds out by itself, or is told to stop, as torchrun does
                except TimeoutError:
                    pass
                wrong = wrong or (child.told() if child.code is not None and child.code >= 0 else "")
        return self._after("ranks", seed, run, wrong, ranks=2)

    def operations(self, first: int, count: int) -> Iterator[Trial]:
        """Killed right before every operation on a file, one after the other."""
        for number in range(first, first + count):
            run = self.trials.new()
            child = self.trials.start(self.trials.command(run), at_file_operation(number, die, run))
            if not child.wait():
                return
            yield self._after("operations", number, run)

    def commands(self, first: int, count: int) -> Iterator[Trial]:
        """The same, while something else than learning is done; then the command is given again."""
        from perpetune.operations.verify import verify

        for name, prepared, arguments in self._other_commands():
            expected: dict[str, bytes] | None = None
            for number in (None, *range(first, first + count)):
                run = Path(shutil.copytree(prepared, self.trials.new()))
                given = [part.replace("RUN", str(run)) for part in arguments]
                if number is None:
                    self._well(given, self.trials.start(given))
                    expected = contents(run)
                    continue
                child = self.trials.start(given, at_file_operation(number, die, run))
                if not child.wait():
                    break
                again = self.trials.start(given)
                again.wait()
                wrong = again.told()
                if again.code and name != "retry":  # where it was done before the process died
                    wrong = wrong or ("" if contents(run) == expected else again.said[-300:])
                found = verify(run)
                wrong = wrong or ("" if found.passed else f"verify: {found.damages}")
                if again.code == 0:
                    wrong = wrong or ("" if self._same(contents(run), expected, name) else "ends in other bits")
                yield Trial("commands", number, f"{name} again: {'done' if not again.code else 'was done'}", wrong)

    def _other_commands(self) -> Iterator[tuple[str, Path, list[str]]]:
        damaged = Path(shutil.copytree(self.run, self.trials.new()))
        file = sorted(damaged.glob("commits/0002-*/predictions.safetensors"))[0]
        file.write_bytes(file.read_bytes()[:-1])
        yield "repair", damaged, ["verify", "RUN", "--repair"]
        yield "revert", self.run, ["revert", "RUN", "task-0001"]
        # with --retry, --set is for the task alone: the settings of the run stand in a file
        settings = self.trials.folder / "retry.yaml"
        settings.write_text(json.dumps({"training": self.trials.training}), encoding="utf-8")
        given = self.trials.command(Path("RUN"))[1:]
        options = [part for part in given if part != "--set" and not part.startswith(tuple(self.trials.training))]
        yield "retry", self.run, ["run", str(settings), *options, "--retry", "task-0002"]
        yield "export", self.run, ["export", "RUN", "--out", "RUN/exported"]

    @staticmethod
    def _same(found: dict[str, bytes], expected: dict[str, bytes] | None, name: str) -> bool:
        if name != "retry":
            return found == expected
        # a task may have been thrown away twice: the weights of the last try are those of the first
        last = [
            {k.split("/")[1]: v for k, v in of.items() if k.startswith(sorted(of)[-1].split("/")[0])}
            for of in (found, expected or {})
        ]
        return all(last[0][k] == v for k, v in last[1].items() if k != "commit.json")

    # ---- disks, files, clocks, others ----

    def full(self, seed: int) -> Trial:
        draw, run = random.Random(seed), self.trials.new()
        room = int(10 ** draw.uniform(0, 5.5))
        child = self.trials.start(
            self.trials.command(run), at_file_operation(draw.randrange(40), partial(no_room, room), self.trials.folder)
        )
        child.wait()
        trial = self._after("full", seed, run, child.told())
        return Trial("full", seed, "refused" if child.code else "enough room", trial.wrong)

    def place(self, seed: int) -> Trial:
        from perpetune import PerpetuneError, Result
        from perpetune.operations.verify import verify

        draw, run = random.Random(seed), Path(shutil.copytree(self.run, self.trials.new()))
        files = sorted(p for p in run.rglob("*") if p.is_file() and p.name != ".lock" and p.stat().st_size)
        by_size = draw.random() < 0.5
        file = draw.choices(files, [p.stat().st_size if by_size else 1 for p in files])[0]
        content, at = file.read_bytes(), draw.randrange(file.stat().st_size)
        if draw.random() < 0.3:
            change, content = "cut", content[:at]
        else:
            change, content = (
                "flipped",
                content[:at] + bytes([content[at] ^ 1 << draw.randrange(8)]) + content[at + 1 :],
            )
        file.write_bytes(content)
        name = str(file.relative_to(run))
        covered = name.startswith("commits") or name == "run.yaml"
        seen, wrong = False, ""
        try:
            found = verify(run)
            seen = not found.passed
            result = Result(run)
            [result.records(), result.summary(), result.promises()]
        except PerpetuneError as error:
            wrong = f"{len(str(error).splitlines())} lines: {error}" if "\n" in str(error) else ""
        except Exception as error:
            wrong = f"{type(error).__name__}: {error}"
        if covered and not seen:
            wrong = wrong or "verify does not see it"
        became = "seen" if seen else "is no part of what was learned" if not covered else "not seen"
        if seed % SAMPLED == 0:
            repaired, told = self._repaired(run)
            became, wrong = (f"{became}, {repaired}", wrong or told)
        shutil.rmtree(run)
        return Trial("places", seed, became, wrong and f"{name}, {change} at {at}: {wrong}")

    def _repaired(self, run: Path) -> tuple[str, str]:
        for command in (["report", str(run)], ["log", str(run)]):
            child = self.trials.start(command)
            child.wait()
            if child.told():
                return "", f"{command[0]}: {child.told()}"
        child = self.trials.start(["verify", str(run), "--repair"])
        child.wait()
        if child.told():
            return "", f"repair: {child.told()}"
        if child.code:
            return "needs a copy", ""
        return "learned again to the same bits", self._ends(run)

    def clock(self, seed: int) -> Trial:
        draw, run = random.Random(seed), self.trials.new()
        for _ in range(2):
            child = self.trials.start(self.trials.command(run), jumping_clock(draw.randrange(2**32)))
            time.sleep(draw.uniform(0, 2 * self.seconds))
            child.signal(signal.SIGKILL)
            child.wait()
            if child.code not in (0, -signal.SIGKILL):
                return Trial("clock", seed, "refused", child.told() or child.said[-300:])
        child = self.trials.start(self.trials.command(run), jumping_clock(seed))
        wrong = "" if not child.wait() else f"does not go on: {child.said[-300:]}"
        return self._after("clock", seed, run, wrong)

    def two(self, seed: int) -> Trial:
        draw, run = random.Random(seed), self.trials.new()
        children = [self.trials.start(self.trials.command(run))]
        time.sleep(draw.uniform(0, self.seconds / 2))
        children.append(self.trials.start(self.trials.command(run)))
        time.sleep(draw.uniform(0, self.seconds / 2))
        command = draw.choice([["report"], ["log"], ["verify"], ["verify", "--repair"]])
        reader = self.trials.start([command[0], str(run), *command[1:]])
        codes = [child.wait() for child in [*children, reader]]
        wrong = children[0].told() or children[1].told() or reader.told()
        if 0 not in codes[:2]:
            wrong = wrong or f"neither went on: {children[1].said[-300:]}"
        if codes[2] == 1:
            wrong = wrong or f"verify: {reader.said}"
        return self._after("two", seed, run, wrong)


def summarised(trials: list[Trial]) -> list[dict[str, Any]]:
    """One record for every kind and what became of it."""
    counts = Counter((t.kind, t.became) for t in trials)
    wrong = Counter((t.kind, t.became) for t in trials if t.wrong)
    return [
        {"kind": kind, "became": became, "trials": count, "wrong": wrong[kind, became]}
        for (kind, became), count in sorted(counts.items())
    ]


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    made: list[Trial] = []

    def keep(trial: Trial) -> None:
        made.append(trial)
        if trial.wrong:
            print(f"{trial.kind}, seed {trial.seed}: {trial.wrong}", flush=True)

    with tempfile.TemporaryDirectory() as name:
        trials = Trials(Path(name))
        gc.collect()
        gc.freeze()
        faults = Faults(trials)
        kinds: dict[str, tuple[int, Callable[[int], Trial]]] = {
            "instants": (options.kills, faults.instant),
            "ranks": (options.kills, faults.ranks),
            "full": (options.kills, faults.full),
            "clock": (options.kills // 5, faults.clock),
            "two": (options.kills // 5, faults.two),
            "places": (options.places, faults.place),
        }
        chosen = options.kinds.split(",") if options.kinds else [*kinds, "operations", "commands", "settings"]
        for kind in chosen:
            begun = time.monotonic()
            if kind in kinds:
                count, trial = kinds[kind]
                for seed in range(options.first, options.first + count):
                    keep(trial(seed))
                    shutil.rmtree(trials.folder / "runs" / "gone", ignore_errors=True)
            elif kind == "settings":
                for each in tried(trials, options.configurations, options.first):
                    keep(Trial("settings", each.seed, each.became, each.wrong))
            else:
                for found in getattr(faults, kind)(options.first, options.kills):
                    keep(found)
            print(f"{kind}: {time.monotonic() - begun:.0f} s", flush=True)
    return summarised(made)


def show(records: list[dict[str, Any]]) -> None:
    from .command import table

    table({name: lambda r, name=name: r[name] for name in ("kind", "became", "trials", "wrong")})(records)
    if any(record["wrong"] for record in records):
        raise SystemExit(1)


OPTIONS = (
    Option("--kills", 200, "of one process, of two, and as many full disks; a fifth of jumping clocks and of pairs"),
    Option("--places", 1000, "damaged bytes"),
    Option("--configurations", 10_000, "of `perpetune run`"),
    Option("--first", 0, "the first seed"),
    Option("--kinds", "", "names, with commas; by default all"),
)
main = Benchmark("faults", __doc__, OPTIONS, measure, show).main

if __name__ == "__main__":
    main()
