"""The command line that all benchmarks share."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass

import pytest

from benchmarks.command import Benchmark, Option, WrongOption, figure, in_turns, ratio, table


@dataclass
class Row:
    steps: int


def measured(options) -> list[Row]:
    if options.steps == 7:
        raise WrongOption("--steps 7 does not fit")
    return [Row(options.steps)]


def benchmark(shown: list) -> Benchmark:
    return Benchmark(
        "mine", "What it costs.\n\nMore.", [Option("--steps", 15, "steps", least=2)], measured, shown.extend
    )


def test_it_measures_shows_and_writes_records(tmp_path):
    shown, file = [], tmp_path / "records.json"
    assert benchmark(shown).main(["--json", str(file)]) == shown == [Row(15)]
    assert json.loads(file.read_text(encoding="utf-8")) == [{"steps": 15}]


@pytest.mark.parametrize(("steps", "says"), [("1", "--steps must be 2 or more"), ("7", "--steps 7 does not fit")])
def test_what_does_not_fit_is_refused_before_anything_is_shown(steps, says, capsys):
    shown: list = []
    with pytest.raises(SystemExit):
        benchmark(shown).main(["--steps", steps])
    assert says in capsys.readouterr().err and not shown


def test_help_is_of_the_module(capsys):
    with pytest.raises(SystemExit):
        benchmark([]).main(["--help"])
    out = capsys.readouterr().out
    assert "python -m benchmarks.mine" in out and "What it costs." in out and "(default: 15)" in out


def test_works_take_turns_and_the_first_round_does_not_count():
    done = []
    works = {name: lambda name=name: done.append(name) for name in "abc"}
    taken = in_turns(works, 20, lambda work: work() or float(len(done)))
    assert all(sorted(done[i : i + 3]) == ["a", "b", "c"] for i in range(0, len(done), 3)) and len(done) == 63
    assert len({tuple(done[i : i + 3]) for i in range(0, len(done), 3)}) > 1
    assert [len(seconds) for seconds in taken.values()] == [20] * 3 and min(map(min, taken.values())) > 3


def test_a_table_leaves_out_what_a_record_lacks_and_marks_what_is_late(capsys):
    show = table({"what": figure("name", "s"), "ratio": ratio(".2f"), "at most": figure("target", ".1f")})
    show([{"name": "slow", "ratio": 2.0, "target": 1.5}, {"name": "plain", "ratio": None, "target": None}])
    out = capsys.readouterr().out
    assert "slow" in out and "2.00" in out and "1.5" in out and "None" not in out
    assert ratio(".1f")({"ratio": 2.0, "target": 1.5}) == "[red]2.0[/red]"
    assert ratio(".1f")({"ratio": 1.0, "target": 1.5}) == "1.0" and math.isclose(float(figure("x", "g")({"x": 3.0})), 3)
