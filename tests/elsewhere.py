"""Programs in processes of their own in which perpetune was never imported.

They are forked, one after the other, from a process that has imported torch, transformers, peft and trl: that takes ten
seconds. A process of `make test`, which imports all this anyway, forks that one off before it imports perpetune; under
plain pytest it is started when a test asks for it.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import json
import os
import signal
import subprocess
import sys
import traceback
from pathlib import Path
from typing import IO, NoReturn

CLASSES = ("AutoImageProcessor", "AutoModelForSequenceClassification", "AutoTokenizer", "BertModel", "ViTModel")


class Server:
    """Asked for programs through one pipe, tells how they ended through another."""

    def __init__(self) -> None:
        if "perpetune" in sys.modules:
            line = [sys.executable, "-I", __file__]
            self.process = subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            assert self.process.stdin is not None and self.process.stdout is not None
            self.ask: IO[str] = self.process.stdin
            self.told: IO[str] = self.process.stdout
            self.number = self.process.pid
            return
        prepare()
        (asked, ask), (told, tell) = os.pipe(), os.pipe()
        self.number = os.fork()
        if not self.number:
            os.close(ask)
            os.close(told)
            serve(os.fdopen(asked, encoding="utf-8"), os.fdopen(tell, "w", encoding="utf-8"))
        os.close(asked)
        os.close(tell)
        self.ask, self.told = os.fdopen(ask, "w", encoding="utf-8"), os.fdopen(told, encoding="utf-8")

    def close(self) -> None:
        os.kill(self.number, signal.SIGKILL)
        os.waitpid(self.number, 0)


@functools.cache
def server() -> Server:
    return Server()


class Elsewhere:
    """Runs programs one after the other; `folder` is for what they print."""

    def __init__(self, folder: Path, server: Server) -> None:
        self.files, self.server = [folder / "stdout", folder / "stderr"], server

    def __call__(self, code: str, *arguments: object) -> str:
        """What a program prints that ends well, given these arguments."""
        done = self.run(code, *arguments)
        assert done.returncode == 0, done.stderr[-4000:]
        return done.stdout

    def run(self, code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
        """A program, given these arguments, however it ends."""
        program = {
            "code": code,
            "arguments": list(map(str, arguments)),
            "files": list(map(str, self.files)),
            "environment": dict(os.environ),
        }
        print(json.dumps(program), file=self.server.ask, flush=True)
        code_of_exit = int(self.server.told.readline())
        out, err = (file.read_text(encoding="utf-8") for file in self.files)
        return subprocess.CompletedProcess(program["arguments"], code_of_exit, out, err)


def prepare() -> None:
    """Import what programs import."""
    import peft  # noqa: F401
    import safetensors.torch  # noqa: F401
    import torch
    import transformers

    for name in CLASSES:
        getattr(transformers, name)
    with contextlib.suppress(ImportError):
        from trl import SFTTrainer  # noqa: F401
    torch.set_num_threads(1)


def serve(asked: IO[str], tell: IO[str]) -> NoReturn:
    gc.freeze()
    sys.modules.pop("conftest", None)  # of pytest
    try:
        for line in asked:
            child = os.fork()
            if not child:
                execute(**json.loads(line))
            print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), file=tell, flush=True)
    finally:
        os._exit(0)


def execute(code: str, arguments: list[str], files: list[str], environment: dict[str, str]) -> NoReturn:
    """Run a program, and end at once: to take all of torch apart takes a second."""
    os.environ.clear()
    os.environ.update(environment)
    for number, file in enumerate(files, 1):
        os.dup2(os.open(file, os.O_CREAT | os.O_TRUNC | os.O_WRONLY), number)
    sys.stdin = open(os.devnull, encoding="utf-8")
    sys.stdout, sys.stderr = (open(n, "w", encoding="utf-8", buffering=1, closefd=False) for n in (1, 2))
    sys.argv = ["-c", *arguments]
    ended = 0
    try:
        exec(code, {"__name__": "__main__"})
    except SystemExit as stop:
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
        ended = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
        ended = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(ended)


if __name__ == "__main__":
    prepare()
    serve(sys.stdin, sys.stdout)
