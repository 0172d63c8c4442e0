"""What the how-to pages say can be done: every python and console block is run, with tiny models in place of the named
ones, and streams made on the spot."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from pages import Block, Reader, blocks, call, commands
from PIL import Image

DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGES = sorted([*(DOCS / "how-to").glob("*.md"), DOCS / "tutorial.md", DOCS / "index.md"])
RUN = [page for page in PAGES if any(b.language in ("python", "console") and not b.not_run for b in blocks(page))]


def rows(path: Path, lines: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")


def pictures(folder: Path, count: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(len(str(folder.name)))
    for i in range(count):
        Image.fromarray(generator.integers(0, 255, (8, 8, 3), dtype=np.uint8)).save(folder / f"{i}.png")


def texts(folder: Path) -> None:
    """Three weeks of support tickets, two labels each, as JSONL."""
    weeks = {"01": ["refund", "delivery"], "02": ["invoice", "login"], "03": ["size", "colour"]}
    for week, labels in weeks.items():
        for split, count in (("train", 4), ("test", 2)):
            lines = [{"text": f"{label} of order {split}{i}", "label": label} for label in labels for i in range(count)]
            rows(folder / f"2026-week-{week}" / f"{split}.jsonl", lines)


@pytest.fixture(scope="module")
def models(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made: Callable[[str], Callable[..., Path]] = request.getfixturevalue
    return {
        "sentence-transformers/all-MiniLM-L6-v2": made("tiny_bert")(layers=1),
        "google/vit-base-patch16-224-in21k": made("tiny_vit")(layers=1),
        "openai/clip-vit-base-patch16": made("tiny_clip")("clip"),
        "llava-hf/llava-1.5-7b-hf": made("tiny_llava")(),
        "Qwen/Qwen2.5-0.5B": made("tiny_lm")("qwen2", ends=True, layers=1),
    }


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder with every stream that a page names."""
    texts(tmp_path / "my_tasks")
    (tmp_path / "questions.csv").write_text("number,text\n7,refund of order 12\n8,login of order 3\n")
    shops = [
        {"text": f"{c} {i}", "label": c, "shop": "ab"[i % 2]} for c in ("red", "blue", "old", "new") for i in range(8)
    ]
    rows(tmp_path / "tickets.jsonl", shops)
    for week in ("2026-w48", "2026-w49"):
        for split in ("train", "test"):
            asked = [{"prompt": f"{week}: capital {n}?", "completion": f" {'ab'[n % 2]}"} for n in range(4)]
            rows(tmp_path / "weeks" / week / f"{split}.jsonl", asked)
    rows(tmp_path / "generic.jsonl", [{"text": f"what everybody knows {n}"} for n in range(5)])
    for i in "ab":
        pairs = [{"prompt": f"{i}: capital number {n}", "response": "ab"[n % 2]} for n in range(4)]
        for split in ("train", "test"):
            rows(tmp_path / "notes" / i / f"{split}.jsonl", [{"text": f"note {n} of {i}"} for n in range(4)])
            rows(tmp_path / "prompts" / i / f"{split}.jsonl", pairs)
            for label in (f"stop {i}", f"go {i}"):
                pictures(tmp_path / "signs" / i / split / label, 3)
            pictures(tmp_path / "questions" / i / "images", 4)
            asked = [
                {"image": f"images/{n}.png", "question": "which sign?", "answer": f"{i} {n % 2}"} for n in range(4)
            ]
            rows(tmp_path / "questions" / i / f"{split}.jsonl", asked)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)  # files that a page writes are imported from the current folder
    return tmp_path


@pytest.mark.parametrize("page", RUN, ids=lambda p: p.stem)
def test_the_page_works(page, folder, models, monkeypatch, capsys):
    reader = Reader(models, monkeypatch)
    for block in blocks(page):
        if page.name == "weekly.md" and block.title.startswith(".github"):
            shutil.rmtree(folder / "runs")  # a CI begins with the bucket's run, or none
        reader.follow(block)
    assert reader.done


def test_no_block_is_left_out_without_a_reason():
    """A block without a language is a listing, and has no command in it."""
    seen = 0
    for page in PAGES:
        for block in blocks(page):
            seen += 1
            assert block.language or not re.search(r"^(\$ |import |from )", block.code, re.MULTILINE), (page, block)
            if block.language == "console":
                assert list(commands(block.code)), f"{page.name}: a console block without a line that begins with $"
    assert seen > 40


def test_every_page_but_the_listed_is_run():
    """own-rule.md by tests/recipes/test_user_pieces.py; the others have no code that runs here."""
    assert {page.stem for page in PAGES} - {page.stem for page in RUN} == {
        "own-rule",
        "benchmarks",
        "several-processes",
    }


def test_a_page_that_is_wrong_fails(folder, models, monkeypatch):
    reader = Reader(models, monkeypatch)
    with pytest.raises(AssertionError, match="exit code 2"):
        reader.follow(Block("console", "", "$ perpetune run --recipe no_such --stream my_tasks/\n", ""))
    with pytest.raises(AssertionError, match="not a command of perpetune"):
        call("rm -r runs", monkeypatch)
    with pytest.raises(NameError):
        reader.follow(Block("python", "", "learner.learn()\n", ""))
