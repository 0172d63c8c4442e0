"""Is a run as it was written? Hashes, parents, what can still be had, and the way back to the last whole commit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.errors import ConfigError, PerpetuneError, RunError, first_line
from ..core.files import file_digest, write_text
from ..runs.commit import MANIFEST, Commit
from ..runs.config_file import CONFIG, TWIN, read_config
from ..runs.directory import COMMITS, set_aside

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class Damage:
    """One thing that is not as it was written: of a commit's folder (or `run.yaml`), a file, and what is wrong."""

    where: str
    file: str
    what: str


@dataclass(frozen=True)
class Verification:
    """
    Attributes:
        run: its directory; checked: how many files were read.
        damages: in the order of commits; empty: all is as it was written.
        whole: the last commit before the first damage, None where there is none.
        tasks: learned there; lost: learned in commits after it.
        apart: commits after the first damage whose own files are as they were written: their adapters and predictions
            can be read, the run cannot go on from them.
    """

    run: Path
    checked: int
    damages: tuple[Damage, ...]
    whole: str | None
    tasks: tuple[str, ...]
    lost: tuple[str, ...]
    apart: tuple[str, ...]

    @property
    def passed(self) -> bool:
        return not self.damages

    def to_dict(self) -> dict[str, Any]:
        return {
            "run": str(self.run),
            "passed": self.passed,
            "checked": self.checked,
            "damages": [vars(damage) for damage in self.damages],
            "whole": self.whole,
            "tasks": list(self.tasks),
            "lost": list(self.lost),
            "apart": list(self.apart),
        }

    def table(self) -> Table:
        from rich.table import Table

        table = Table(title=f"{self.run}: {self.checked} files read", caption=self.summary())
        for column in ("where", "file", "what"):
            table.add_column(column)
        for damage in self.damages:
            table.add_row(damage.where, damage.file, damage.what)
        return table

    def summary(self) -> str:
        """What can still be had, in a sentence or two."""
        if self.passed:
            return f"all is as it was written, after {', '.join(self.tasks) or 'no task'}"
        back = f"; `perpetune verify {self.run} --repair` goes back there and deletes nothing"
        config = {damage.where for damage in self.damages} & {CONFIG, TWIN}
        if config == {CONFIG, TWIN} or config == {CONFIG} and not (self.run / TWIN).is_file():
            return f"without {CONFIG} the run does not open: restore it from a copy; commits can be read by themselves"
        if all(damage.where in config for damage in self.damages):
            return f"can still be had: all{back}"
        kept = f"the run after {', '.join(self.tasks) or 'no task'}" if self.whole else "no state of the run"
        lost = f"; {', '.join(self.lost)} would be learned again" if self.lost else ""
        apart = f"; files that are whole by themselves: {', '.join(self.apart)}" if self.apart else ""
        return f"can still be had: {kept}{lost}{apart}{back if self.whole else ''}"


def verify(run: str | Path) -> Verification:
    """Read every file of a run and compare it with what was written.

    Raises:
        RunError: there is no run.
    """
    path = Path(run)
    damages, checked, whole, tasks = list(_config(path)), 1, None, ()
    learned: list[str] = []
    apart: list[str] = []
    before: str | None = None
    for index, folder in enumerate(_folders(path)):
        found, own, commit = [], [], None
        try:
            commit = Commit.read(folder)
        except RunError:
            found.append(Damage(folder.name, MANIFEST, "missing or damaged"))
        if commit is not None:
            learned += [str(commit.manifest["task"])] if index else []  # the first is of the untouched model
            if commit.manifest["index"] != index or commit.manifest.get("parent") != before:
                found.append(Damage(folder.name, MANIFEST, "does not follow the commit before it"))
            own = list(_files(commit))
            checked += 1 + len(commit.manifest["files"])
        before = commit.digest if commit is not None else ""
        damages += [*found, *own]
        if all(damage.where in (CONFIG, TWIN) for damage in damages):
            whole, tasks = folder.name, tuple(commit.manifest.get("learned", ()))  # type: ignore[union-attr]
        elif commit is not None and not own:
            apart.append(folder.name)
    lost = tuple(task for task in learned if task not in tasks and not task.startswith(("revert-", "undo-")))
    return Verification(path, checked, tuple(damages), whole, tasks, lost, tuple(apart))


def repair(run: str | Path) -> tuple[Verification, Path | None]:
    """Set the first damaged commit and all later ones aside, so that the run opens, and goes on, after the last whole
    one: what was found, and the folder in which they lie (None: nothing was damaged). A damaged run.yaml is set aside
    too, and written again from its copy. Nothing is deleted.

    Raises:
        ConfigError: no commit is whole, or run.yaml is damaged and so is its copy.
        RunError: there is no run, or another process uses it.
    """
    found = verify(run)
    if found.passed:
        return found, None
    bad = [name for name in (CONFIG, TWIN) if any(damage.where == name for damage in found.damages)]
    whole = [name for name in (CONFIG, TWIN) if name not in bad and (found.run / name).is_file()]
    if found.whole is None and _folders(found.run) or not whole:
        raise ConfigError(f"{found.run} cannot be repaired: {found.summary()}")
    later = [folder for folder in _folders(found.run) if folder.name > (found.whole or "")]
    there = [found.run / name for name in bad if (found.run / name).exists()]
    folder = set_aside(found.run, [*there, *later])
    for name in bad:
        write_text(found.run / name, (found.run / whole[0]).read_text(encoding="utf-8"))
    return found, folder


def check_base(run: str | Path, model: str | None = None) -> None:
    """Load the base model of a run and compare its weights with those that the run was made with.

    Raises:
        RunError: they are others now.
    """
    from ..learning.learner import Learner

    config = read_config(Path(run))
    setup = Learner.described(run, model=model).setup
    setup.load_base(config["model"]["modality"], config["model"]["fingerprint"])


def _folders(path: Path) -> list[Path]:
    folder = path / COMMITS
    return sorted(p for p in folder.iterdir() if not p.name.startswith(".")) if folder.is_dir() else []


def _config(path: Path) -> Iterator[Damage]:
    if not path.is_dir() or not (path / CONFIG).exists() and not _folders(path):
        raise RunError(f"{path} is no run: it holds no {CONFIG}")
    for name in (CONFIG, TWIN) if (path / TWIN).exists() else (CONFIG,):
        try:
            read_config(path, name)
        except PerpetuneError as error:
            yield Damage(name, name, first_line(error).split(":")[0] if name == TWIN else first_line(error))


def _files(commit: Commit) -> Iterator[Damage]:
    for name, digest in sorted(commit.manifest["files"].items()):
        file = commit.path / name
        state = "missing"
        with suppress(OSError):
            state = "" if file_digest(file) == digest else "truncated, or changed since it was written"
        if state:
            yield Damage(commit.path.name, name, state)
