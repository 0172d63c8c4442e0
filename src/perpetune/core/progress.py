"""Progress of long work: tasks, steps, time left. Silent unless a display is asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


class Progress:
    """Shows nothing; the display for programs."""

    @contextmanager
    def bar(self, title: str, total: int) -> Iterator[Callable[[int], None]]:
        """A bar for one piece of work; yields the function that advances it."""
        yield lambda n: None

    def say(self, text: str) -> None:
        """One line that stays."""

    def note(self, text: str) -> None:
        """A few words beside the newest bar, in place of those before; a line where bars are not shown."""

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        pass


class RichProgress(Progress):
    """A live display on stderr; plain lines where that is no terminal."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as Display

        self.console = Console(stderr=True)
        self.bars: list[tuple[Any, str]] = []
        self.display: Any = Display(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=self.console,
            transient=True,
            disable=not self.console.is_terminal,
        )

    def __enter__(self) -> Progress:
        self.display.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.display.stop()

    @contextmanager
    def bar(self, title: str, total: int) -> Iterator[Callable[[int], None]]:
        from rich.markup import escape

        identifier = self.display.add_task(escape(title), total=total, note="")
        self.bars.append((identifier, title))
        try:
            yield lambda n: self.display.advance(identifier, n)
        finally:
            self.bars.remove((identifier, title))
            self.display.remove_task(identifier)

    def note(self, text: str) -> None:
        from rich.markup import escape

        if not self.bars:
            return
        identifier, title = self.bars[-1]
        if self.console.is_terminal:
            self.display.update(identifier, note=escape(text))
        else:
            self.say(f"{title}: {text}")

    def say(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False)
