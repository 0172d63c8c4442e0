"""Code on pages: found, and run in a folder with the files and models that the pages name."""

from __future__ import annotations

import re
import runpy
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from perpetune.cli import app

FENCE = re.compile(
    r"(?:<!-- (?P<mark>[^>]*?) -->\n)?^```(?P<language>\w*)(?: title=\"(?P<title>[^\"]+)\")?\n(?P<code>.*?)^```$",
    re.DOTALL | re.MULTILINE,
)
PAGE_MARK = re.compile(r"\A<!-- page not run here: (.+) -->\n")


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, the file that it is (or ""), its text, and why it is not run (or "")."""

    language: str
    title: str
    code: str
    not_run: str


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    whole = PAGE_MARK.match(text)
    found = []
    for m in FENCE.finditer(text):
        mark = m["mark"] or ""
        reason = whole[1] if whole else mark.removeprefix("not run: ") if mark.startswith("not run: ") else ""
        found.append(Block(m["language"], m["title"] or "", m["code"], reason))
    return found


def commands(code: str) -> Iterator[str]:
    """The lines that a console block types in, without the prompt; the others are what is printed."""
    for line in code.replace("\\\n", " ").splitlines():
        if line.startswith("$ "):
            yield line[2:]


def call(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A command line of `perpetune`, or a script of the page, in this process. The verdict of `gate` on a tiny model is
    not the page's: 1 will do there as well."""
    words = shlex.split(command)
    if words[0] == "python" and words[1].endswith(".py"):
        with monkeypatch.context() as patch:
            patch.setattr("sys.argv", words[1:])
            runpy.run_path(words[1], run_name="__main__")
        return
    assert words[0] == "perpetune", f"not a command of perpetune, so mark it `not run`: {command}"
    with monkeypatch.context() as patch:
        patch.setattr("sys.argv", words)
        try:
            app.main()
            code = 0
        except SystemExit as stop:
            code = stop.code or 0  # type: ignore[assignment]
    assert code in ((0, 1) if words[1] == "gate" else (0,)), f"exit code {code}: {command}"


class Reader:
    """Somebody who does what a page says, top to bottom, in the current folder.

    Args:
        models: what the page calls a model -> the folder of a tiny one.
    """

    def __init__(self, models: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
        self.models, self.monkeypatch = models, monkeypatch
        self.names: dict = {"__name__": "page"}
        self.done: list[str] = []

    def follow(self, block: Block) -> None:
        if block.not_run:
            return
        code = block.code
        for name, folder in self.models.items():
            code = code.replace(name, str(folder))
        if block.title:
            path = Path(block.title)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(code, encoding="utf-8")
            if path.parts[0] == ".github":
                self._work(yaml.safe_load(code))
        elif block.language == "python":
            exec(compile(code, "page", "exec"), self.names)
        elif block.language == "console":
            for command in commands(code):
                call(command, self.monkeypatch)
        else:
            return
        self.done.append(block.language)

    def _work(self, workflow: dict) -> None:
        """The steps of a CI file that call perpetune; the others belong to the CI and the bucket."""
        steps = [step["run"] for job in workflow["jobs"].values() for step in job["steps"] if "run" in step]
        ours = [step for step in steps if step.startswith("perpetune ")]
        assert len(ours) >= 2
        for command in ours:
            call(command, self.monkeypatch)
