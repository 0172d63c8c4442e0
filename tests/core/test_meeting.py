"""Processes that train together: none waits for ever, and none decides by itself."""

from __future__ import annotations

import contextlib
import io
import os
import socket
import time
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from perpetune.cli import app
from perpetune.core import meeting, processes
from perpetune.core.errors import ConfigError, RunError
from perpetune.learning import retry
from perpetune.runs.directory import Run
from tests.core.together import LIMIT, Forked, free_port, there, together

pytestmark = [
    pytest.mark.processes,
    pytest.mark.skipif(not hasattr(os, "fork"), reason="forks the processes that meet"),
]
SHORT = 1.5  # seconds
FOLLOWS = "every finished task is safe, the same command for all of them goes on after it"


@pytest.fixture
def short(monkeypatch):
    """They wait no longer for one another."""
    monkeypatch.setenv(meeting.WAIT, str(SHORT / 60))


# ---- to meet ----


def alone(number: int, folder: Path, port: int) -> Any:
    return Forked(lambda: str(meeting.join("cpu")), folder / "found.json", number, port).answer()


@pytest.mark.parametrize("number", [0, 1])
def test_where_the_others_do_not_come_one_line_says_so(number, short, tmp_path):
    said = alone(number, tmp_path, port := free_port())
    assert said.startswith(f"LostProcess: process {number} of 2 has waited 0.00833 minutes at 127.0.0.1:{port}, and")
    assert "PERPETUNE_WAIT_MINUTES gives them longer" in said and "\n" not in said


def test_a_port_that_is_taken_is_named(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        said = alone(0, tmp_path, port := taken.getsockname()[1])
    assert said.startswith("ConfigError: another program") and f"has the port {port} on which" in said


def test_whoever_listens_there_and_says_nothing_is_not_waited_for_for_ever(short, tmp_path):
    with socket.socket() as stranger:
        stranger.bind(("127.0.0.1", 0))
        stranger.listen()
        assert alone(1, tmp_path, stranger.getsockname()[1]).startswith("LostProcess: process 1 of 2 has waited")


def test_a_process_of_an_earlier_start_takes_no_place(tmp_path):
    """It has been retrying to meet since its own start was killed, and comes to the next one at the same port."""
    port, end = free_port(), tmp_path / "end"

    def joins(mark: str) -> Any:
        def work() -> str:
            meeting.join("cpu")
            (tmp_path / mark).touch()
            there(end)
            return "joined"

        return work

    kept = [Forked(joins("first"), tmp_path / "0.json", 0, port), Forked(joins("old"), tmp_path / "1.json", 1, port)]
    there(tmp_path / "old")
    said = Forked(joins("new"), tmp_path / "2.json", 1, port).answer()
    end.touch()
    assert said.startswith("ConfigError: there are two processes of number 1 at 127.0.0.1") and "pid" in said
    assert [each.answer() for each in kept] == ["joined", "joined"]


def test_what_is_missing_in_the_environment_is_named(monkeypatch):
    for name, value in {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(ConfigError, match="2 processes cannot meet: .*MASTER_ADDR expected.*torchrun"):
        meeting.join("cpu")


def test_one_that_ends_while_they_meet_is_not_waited_for_for_ever(tmp_path, monkeypatch):
    """The first has seen it come, and waits for where it can be reached."""
    monkeypatch.setenv(meeting.WAIT, "0.2")  # four seconds to meet
    port = free_port()
    comes = Forked(lambda: meeting._found(timedelta(seconds=LIMIT))[1:], tmp_path / "1.json", 1, port)
    said = Forked(lambda: str(meeting.join("cpu")), tmp_path / "0.json", 0, port).answer()
    assert comes.answer() == [1, 2] and said.startswith("LostProcess: process 0 of 2 has waited")


@pytest.mark.parametrize("given", ["soon", "0", "-1", "nan", "inf"])
def test_minutes_are_a_number(given, monkeypatch):
    monkeypatch.setenv(meeting.WAIT, given)
    with pytest.raises(ConfigError, match=f"PERPETUNE_WAIT_MINUTES must be a number of minutes above 0, not '{given}'"):
        meeting.minutes()


# ---- afterwards ----


def test_a_process_that_hangs_is_waited_for_for_a_stated_time(short, tmp_path):
    end = tmp_path / "0.json"
    said, _ = together(tmp_path, lambda: processes.from_all(0), lambda: there(end))
    assert said.startswith("LostProcess: another of the processes that were started together has not come for 0.025 ")
    assert FOLLOWS in said and "\n" not in said


def test_a_process_that_has_ended_is_not_waited_for(tmp_path):
    said, _ = together(tmp_path, lambda: processes.from_all(0), lambda: None)
    assert said.startswith("LostProcess: another of the processes that were started together has ended")


def test_work_of_the_first_for_all_may_take_longer(short, tmp_path):
    def works() -> str:
        with meeting.patient():
            processes.by_first(lambda: time.sleep(2 * SHORT))
        return "done"

    assert together(tmp_path, works, works) == ["done", "done"]


def test_a_longer_wait_ends_with_that_work(short, tmp_path):
    def works() -> None:
        with meeting.patient():
            processes.from_first(0)
        processes.from_all(0)

    end = tmp_path / "0.json"

    def hangs() -> None:
        with meeting.patient():
            processes.from_first(0)
        there(end)

    assert together(tmp_path, works, hangs)[0].startswith("LostProcess: another of the processes")


# ---- nobody decides alone ----


def test_the_first_writes_when_all_have_read(tmp_path):
    """Else one that is slower finds what the first has written since, and goes another way."""
    file = tmp_path / "written"

    def quick() -> bool:
        processes.by_first(file.touch)
        return False

    def slow() -> bool:
        time.sleep(0.5)
        seen = file.exists()
        processes.by_first(file.touch)
        return seen

    assert together(tmp_path, quick, slow) == [False, False]


@pytest.mark.parametrize("judge", ["the first", "the second"])
def test_a_task_is_thrown_away_by_all_or_none(judge, tmp_path, monkeypatch):
    monkeypatch.setattr(retry, "Result", lambda path: path)
    undone: list[Any] = []
    run: Any = SimpleNamespace(path=tmp_path, undo=undone.append)

    def judged(mine: str) -> Any:
        def work() -> list[Any]:
            stays = retry.kept(run, lambda result: ("too much is forgotten",) if mine == judge else ())
            return [stays, processes.from_all(len(undone))]

        return work

    same = [False, [1, 1]] if judge == "the first" else [True, [0, 0]]
    assert together(tmp_path, judged("the first"), judged("the second")) == [same, same]


def test_a_folder_that_not_all_see_is_refused_on_all(tmp_path):
    def opens(folder: str) -> Any:
        return lambda: Run.open(tmp_path / folder, {"seed": 0})

    said = together(tmp_path, opens("one"), opens("other"))
    assert said[0] == said[1].replace("other", "one")
    assert said[0].startswith("RunError: ") and "is not the same folder on every machine" in said[0]


def test_what_keeps_the_first_from_its_work_is_raised_on_all(tmp_path):
    def refuses() -> None:
        raise RunError("the disk is full")

    work = lambda: processes.by_first(refuses)  # noqa: E731
    assert together(tmp_path, work, work) == ["RunError: the disk is full"] * 2


def test_other_data_is_refused_on_all(tmp_path):
    """They would make other collective calls: of more rows, more batches."""

    def rows(*counts: int) -> Any:
        return lambda: processes.agree({"seed": 0, "data": counts})

    said = together(tmp_path, rows(8, 8), rows(8, 7))
    assert said[0] == said[1]
    assert said[0].startswith("ConfigError: process 1 was started with another data than the first: start all")
    assert together(tmp_path, rows(8), rows(8)) == [None, None]


# ---- who speaks ----


def ends(error: Exception | None, wait_for: Path | None = None, listens: float = LIMIT) -> Any:
    """A command that ends in an error: what it says."""

    def fails(**_: Any) -> None:
        if error is not None:
            raise error

    def work() -> str:
        app.app, meeting.TOLD = fails, listens
        with contextlib.redirect_stderr(io.StringIO()) as said, contextlib.suppress(SystemExit):
            app.main([])
        if wait_for is not None:
            there(wait_for)  # who keeps the words stays
        return said.getvalue()

    return work


def test_an_error_of_all_is_told_once(tmp_path):
    error, end = ConfigError("it is wrong"), tmp_path / "1.json"
    assert together(tmp_path, ends(error, end), ends(error)) == ["perpetune: it is wrong\n", ""]


def test_an_error_of_one_is_told_by_it(tmp_path):
    error, end = ConfigError("it is wrong here"), tmp_path / "1.json"
    assert together(tmp_path, ends(None, end), ends(error, listens=SHORT)) == ["", "perpetune: it is wrong here\n"]
    end.unlink()
    said = together(tmp_path, ends(RunError("it is wrong there"), end), ends(error, listens=SHORT))
    assert said == ["perpetune: it is wrong there\n", "perpetune: it is wrong here\n"]


def test_a_device_that_is_none_is_refused():
    with pytest.raises(ConfigError, match="there is no device `1`: give cpu, cuda or cuda:1"):
        meeting.join("1")
