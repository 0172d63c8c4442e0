"""The command line as a user meets it, for tests of every room."""

from __future__ import annotations

import sys

import pytest

from perpetune.cli import main


def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, *arguments: object) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of `perpetune arguments…`, in this process."""
    monkeypatch.setattr(sys, "argv", ["perpetune", *map(str, arguments)])
    code = 0
    try:
        main()
    except SystemExit as stop:
        code = int(stop.code or 0)
    out, err = capsys.readouterr()
    return code, out, err
