"""A path that nothing can have is one line, wherever it is given."""

from __future__ import annotations

import pytest

from perpetune import ConfigError, load_stream
from perpetune.core.paths import LONGEST, local_path
from perpetune.learning.config import RunConfig, load_config
from tests.calling import call

IMPOSSIBLE = {"x" * 3000: "File name too long", "ü\0": "null", "loop": "symbolic links", "~nobody-here/x": "home"}


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loop").symlink_to("loop")


@pytest.mark.parametrize("given", IMPOSSIBLE)
def test_what_nothing_can_be_called_is_refused(given):
    with pytest.raises(ConfigError, match=IMPOSSIBLE[given]) as told:
        local_path(given)
    assert "\0" not in str(told.value) and "give another path" in str(told.value)
    assert len(str(told.value)) < LONGEST + 100


def test_what_is_not_there_is_left_to_whoever_reads_it(tmp_path):
    (tmp_path / "file").touch()
    for given in ("nowhere", "file", "file/below", "."):
        assert str(local_path(given)) == given
    assert local_path("~/x").is_absolute()


@pytest.mark.parametrize("given", IMPOSSIBLE)
@pytest.mark.parametrize("key", ["model", "out", "general", "gguf_file"])
def test_settings_are_refused_at_the_door(key, given):
    with pytest.raises(ConfigError, match=IMPOSSIBLE[given]):
        load_config(None, RunConfig, {"stream": {"source": "x"}, key: given})


@pytest.mark.parametrize("given", IMPOSSIBLE)
def test_a_stream_is_refused_by_the_loader(given):
    for paths in ({"source": given}, {"source": "x", "data": given}):
        with pytest.raises(ConfigError, match=IMPOSSIBLE[given]):
            load_stream(**paths)


@pytest.mark.parametrize("command", ["report", "verify", "log", "gate", "generate"])
def test_commands_say_it_in_one_line(monkeypatch, capsys, command):
    more = ("--input", "x" * 3000) if command == "generate" else ()
    code, _, err = call(monkeypatch, capsys, command, "x" * 3000, *more)
    assert code == 2 and err.count("\n") == 1 and len(err) < 400
    assert "unforeseen" not in err
