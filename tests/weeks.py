"""Two weeks of conversations that a tiny language model learns, and a template for them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

WEEKS = {
    "faq": {"where is my parcel": "it is on the way", "can i pay later": "yes within thirty days"},
    "dates": {"monday the first": "01 06 2026", "friday the fifth": "05 06 2026"},
}
CHAT = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def prompted(prompt: str, response: str) -> dict[str, Any]:
    return {"prompt": prompt, "response": response}


def write(
    root: Path,
    tasks: Mapping[str, Mapping[str, str]],
    row: Callable[[str, str], dict[str, Any]] = prompted,
    train: int = 6,
) -> Path:
    """A folder stream of these conversations; `train`: how many training rows each makes, of three prompts."""
    for task, pairs in tasks.items():
        (root / task).mkdir(parents=True)
        for split, times in (("train", train), ("test", 1)):
            rows = [row(f"{p} {i % 3}", r) for i in range(times) for p, r in pairs.items()]
            (root / task / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return root
