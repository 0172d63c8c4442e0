"""Programs in processes of their own in which perpetune was never imported.

They are forked from one process that has imported torch, transformers and peft: that takes five seconds, and once is
enough.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SERVER = """
import json, os, sys
import peft, torch, transformers, safetensors.torch
for name in ("AutoImageProcessor", "AutoModelForSequenceClassification", "AutoTokenizer", "BertModel", "ViTModel"):
    getattr(transformers, name)
torch.set_num_threads(1)
for line in sys.stdin:
    program = json.loads(line)
    child = os.fork()
    if not child:
        for number, file in enumerate(program["files"], 1):
            os.dup2(os.open(file, os.O_CREAT | os.O_TRUNC | os.O_WRONLY), number)
        sys.argv = ["-c", *program["arguments"]]
        exec(program["code"], {"__name__": "__main__"})
        sys.exit()
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Elsewhere:
    """Runs programs one after the other; `folder` is for what they print."""

    def __init__(self, folder: Path) -> None:
        self.files = [folder / "stdout", folder / "stderr"]
        line = [sys.executable, "-I", "-c", SERVER]
        self.server = subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __call__(self, code: str, *arguments: object) -> str:
        """What a program prints that ends well, given these arguments."""
        done = self.run(code, *arguments)
        assert done.returncode == 0, done.stderr[-4000:]
        return done.stdout

    def run(self, code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
        """A program, given these arguments, however it ends."""
        assert self.server.stdin is not None and self.server.stdout is not None
        program = {"code": code, "arguments": list(map(str, arguments)), "files": list(map(str, self.files))}
        self.server.stdin.write(json.dumps(program) + "\n")
        self.server.stdin.flush()
        code_of_exit = int(self.server.stdout.readline())
        out, err = (file.read_text(encoding="utf-8") for file in self.files)
        return subprocess.CompletedProcess(program["arguments"], code_of_exit, out, err)

    def close(self) -> None:
        assert self.server.stdin is not None
        self.server.stdin.close()
        self.server.wait()
