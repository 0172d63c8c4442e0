"""The command line with which vLLM serves the adapters of an export.

Options and limits are those of vLLM's documentation (Features: LoRA Adapters) and of the checks in its sources
(`vllm/lora/peft_helper.py`, `vllm/config/lora.py`).
"""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

from ..core.errors import ConfigError
from ..learning.lora_factors import CONFIG, WEIGHTS
from ..learning.routes import ROUTES

RANKS = (8, 16, 32, 64, 128, 256, 512)  # values of --max-lora-rank that every version takes
MOST_AT_ONCE = 8  # adapters in one batch; the others wait in the CPU's memory
FOLDER = "adapters"


def vllm_command(run: str | Path, folder: str | Path | None = None, model: str | None = None) -> list[str]:
    """The words of `vllm serve BASE --enable-lora ...` for an export of adapters.

    Args:
        run: a run directory.
        folder: what `export --format adapters` wrote; None for `adapters` in the run directory.
        model: the base model as the server finds it, if not as the export names it.

    Raises:
        ConfigError: no such export, or an adapter that vLLM refuses.
    """
    where = Path(folder) if folder is not None else Path(run) / FOLDER
    told = _read(where / ROUTES, f"perpetune export {run} --format adapters --out {where}")
    if told.get("modality") != "language":
        raise ConfigError(f"vLLM generates text, and {where} is of an encoder: load its adapters with peft (README.md)")
    base = model or told.get("base_model")
    if not base:
        raise ConfigError(f"{where / ROUTES} names no base model: say where the server finds it (--model)")
    configs = {each["name"]: where / each["folder"] for each in told["adapters"]}
    ranks = [_servable(name, path) for name, path in configs.items()]
    at_once = min(len(configs), MOST_AT_ONCE)
    words = ["vllm", "serve", str(base), "--enable-lora"]
    words += ["--max-lora-rank", str(next(rank for rank in RANKS if rank >= max(ranks)))]
    words += ["--max-loras", str(at_once)]
    if len(configs) > at_once:
        words += ["--max-cpu-loras", str(len(configs))]
    return [*words, "--lora-modules", *(_module(name, path.resolve()) for name, path in configs.items())]


def as_shell(words: list[str]) -> str:
    """The words as a line of a shell, broken before each option and adapter."""
    lines: list[list[str]] = [words[:3]]
    listed = words.index("--lora-modules")
    for i, word in enumerate(words[3:], start=3):
        if word.startswith("--") or i > listed:
            lines.append([])
        lines[-1].append(word)
    return " \\\n    ".join(shlex.join(line) for line in lines)


def _read(path: Path, advice: str) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path} is not there: write the adapters first ({advice})") from None
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{path} cannot be read ({type(error).__name__}): write the adapters anew ({advice})"
        ) from error


def _servable(name: str, folder: Path) -> int:
    """The rank of an adapter.

    Raises:
        ConfigError: vLLM would refuse it, or read it otherwise than peft.
    """
    config = _read(folder / CONFIG, "perpetune export")
    if not (folder / WEIGHTS).is_file():
        raise ConfigError(f"{folder / WEIGHTS} is not there: write the adapters anew (perpetune export)")
    why = next((key for key in ("modules_to_save", "use_dora", "lora_bias") if config.get(key)), None)
    if config.get("peft_type") != "LORA" or config.get("bias", "none") != "none" or why:
        raise ConfigError(f"vLLM does not serve adapter `{name}` ({why or config.get('peft_type')}): write it anew")
    if config.get("task_type") == "SEQ_2_SEQ_LM":
        raise ConfigError("vLLM serves no LoRA of an encoder-decoder model: load the adapters with peft (README.md)")
    if config["r"] > RANKS[-1]:
        raise ConfigError(
            f"adapter `{name}` has rank {config['r']}, and vLLM serves at most {RANKS[-1]}: serve the folder of export "
            "--format merged"
        )
    return int(config["r"])


def _module(name: str, path: Path) -> str:
    """NAME=PATH; as JSON where the path has signs that vLLM would take for a separator."""
    if "=" in str(path) or "," in str(path):
        return json.dumps({"name": name, "path": str(path)}, ensure_ascii=False)
    return f"{name}={path}"
