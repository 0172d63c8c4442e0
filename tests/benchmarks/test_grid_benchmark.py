"""The benchmark of the grid, at its smallest."""

from __future__ import annotations

import pytest

from benchmarks import grid


@pytest.mark.processes
def test_a_killed_worker_changes_no_result(capsys, monkeypatch):
    monkeypatch.setattr(grid, "ROWS", [row for row in grid.ROWS if row[0] != "processes" or row[2]])
    sizes = ["--runs", "2", "--tasks", "2", "--steps", "1"]
    one, killed = grid.main([*sizes, "--where", "one process,processes"])
    assert (one["killed"], killed["killed"]) == (False, True)
    assert killed["same"] and one["learned"] == killed["learned"] == 4
    assert "| processes | 2 | yes | " in capsys.readouterr().out


def test_what_it_cannot_measure_is_refused(capsys):
    with pytest.raises(SystemExit):
        grid.main(["--where", "Ray,moon"])
    assert "and not moon" in capsys.readouterr().err
