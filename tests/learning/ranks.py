"""`torchrun --nproc-per-node 2 -m tests.learning.ranks FOUND COMMANDS.json`: commands of perpetune, one after another,
in processes that are started once; writes the exit code of each, and what the process said."""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
from pathlib import Path


def main(found: Path, commands: list[list[str]]) -> None:
    from perpetune.cli import main as perpetune

    told = []
    for command in commands:
        out, err = io.StringIO(), io.StringIO()
        code: object = 0
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                perpetune(command)
            except SystemExit as end:
                code = end.code
        told.append({"code": code, "out": out.getvalue(), "err": err.getvalue()})
    found.with_name(f"{found.name}.{os.environ.get('RANK', 0)}").write_text(json.dumps(told), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text(encoding="utf-8")))
