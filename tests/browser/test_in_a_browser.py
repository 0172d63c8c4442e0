"""The report and the documentation as a reader sees them: in a real browser, wide and narrow, light and dark."""

from __future__ import annotations

import base64
import functools
import io
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from perpetune import Learner, load_stream
from perpetune.metrics.boundaries import boundary_figures
from perpetune.report import ReportData, write_report
from perpetune.report.collect import report_data
from tests.conftest import REPOSITORY
from tests.report.conftest import promise, result

pytestmark = [pytest.mark.browser, pytest.mark.usefixtures("chromium")]

WIDTHS = (1280, 390)
GROUND = ["rgb(255, 255, 255)", "rgb(20, 23, 28)"]  # light and dark
SITE = Path(os.environ.get("PERPETUNE_SITE", REPOSITORY / "site"))  # where `make docs` puts it


def check(seen):
    assert not seen.complaints
    assert seen.scrolls <= 0, seen.wide
    for summary, closed, opened in seen.folds:
        assert opened > 10, f"nothing is inside `{summary}`"
        assert closed is None or closed == 0, f"`{summary}` shows what it should hide"


@pytest.fixture(scope="module")
def trained(word_stream, tiny_bert, tmp_path_factory):
    """The reports of a small run, and of a comparison of two."""
    folder = tmp_path_factory.mktemp("trained")
    stream = load_stream(word_stream, tasks=["films", "news", "mood"], train_limit=8, test_limit=6)
    training = {"num_train_epochs": 2, "per_device_train_batch_size": 8, "learning_rate": 0.01}
    runs = {
        recipe: Learner(tiny_bert(), recipe, folder / recipe, heads=["linear", "ncm"], training=training).learn(stream)
        for recipe in ("lora", "routed")
    }
    records = {recipe: run.records() for recipe, run in runs.items()}
    return {
        "run": write_report(folder / "run", report_data([runs["routed"]], records["routed"], "run")),
        "comparison": write_report(folder / "both", report_data([], [*records["lora"], *records["routed"]], "compare")),
    }


def everything(size: int) -> ReportData:
    """A comparison that has whatever a page can show, with names that are long and hard to break."""
    tasks = [f"task_with_a_name_that_does_not_break_{i}" for i in range(size)]
    buffer = io.BytesIO()
    Image.new("RGB", (28, 28), "grey").save(buffer, "PNG")
    picture = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    flips = [{"task": tasks[0], "image": picture, "label": "a", "was": "a", "now": "b"}] * 5
    flips += [{"task": tasks[0], "text": "unbreakable" * 30, "label": "a", "was": "a", "now": "b"}] * 5
    parts = [[f"encoder.layer.{i}.attention.self.query", 0.1 * i, 1.0] for i in range(12)]
    broken = [promise(2.0, 1.0, name=f"drift of the outputs of {t}", task=t, parts=parts) for t in tasks[:8]]
    kept = [promise(0.1, 1.0, name="leak", source="SubspaceProjection", task=t, note="relative") for t in tasks]
    records = [
        result(recipe, tasks=tasks, seed=seed, head=head, final_accuracy=final, guarantees=broken + kept)
        for recipe, final in (("sequential", 0.3), ("pegp_lora_fresh", 0.6), ("frozen_ridge", 0.7), ("joint", 0.9))
        for seed in (0, 1)
        for head in ("linear", "ridge")
    ]  # fmt: skip
    shares = np.eye(size, dtype=int) * 7 + np.roll(np.eye(size, dtype=int), 1, axis=1) * 3
    routed = {"tasks": tasks, "confusion": shares.tolist(), "accuracy": 0.7, "accuracy_micro": 0.7, "asked": 1.5}
    true = [{"start": 100 * i, "stop": 100 * i + 100, "task": t} for i, t in enumerate(tasks)]
    found = [{"start": 100 * i, "stop": 100 * i + 100, "task": i, "detected_at": 100 * i + 9} for i in range(size)]
    figures = boundary_figures(found, np.repeat(np.arange(size), 100), 64)
    return ReportData(
        title="A comparison of everything", kind="compare", records=records, stream="words", scenario="class",
        tasks=tasks, labels={t: ["yes", "no"] for t in tasks}, model="a/model-with-a-long-name", reverted=tasks[:1],
        command="perpetune compare " + "--an-option-that-is-long /a/folder/with/a/long/name " * 6,
        versions={"perpetune": "0.1.0", "torch": "2.8"}, formulas={"forgetting": "mean over j < T of a(i, j)" * 4},
        flips=flips, routes=[{**routed, "recipe": name} for name in ("color", "routed")],
        drift={"true": true, "parts": found, "figures": figures, "told": False, "window": 64},
    )  # fmt: skip


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """`large(size)`: the page of `everything`, written once."""
    return functools.cache(lambda size: write_report(tmp_path_factory.mktemp("large") / "report", everything(size)))


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", ["run", "comparison"])
def test_the_report_of_what_was_trained(name, width, trained, pages, look):
    (address,) = pages(trained[name])
    for seen, ground in zip(look(address, width), GROUND, strict=True):
        check(seen)
        assert seen.ground == ground and seen.folds
        assert "of 100 test examples right" in seen.text and "What the metrics mean" in seen.text


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("size", [1, 9, 101])
def test_a_page_with_everything_on_it(size, width, large, pages, look):
    (address,) = pages(large(size))
    for seen in look(address, width):
        check(seen)
        assert len(seen.folds) > 10 and "encoder.layer.11.attention" in seen.text


@pytest.mark.parametrize("width", WIDTHS)
def test_the_documentation(width, pages, look):
    if not (SITE / "index.html").is_file():
        pytest.skip("the documentation is not built: make docs")
    for address in pages(SITE):
        for seen in look(address, width):
            check(seen)
            assert len(seen.text) > 100, address


def test_what_is_wrong_with_a_page_is_seen(tmp_path, pages, look):
    """The checks themselves: each of these faults is found, and a folder is served file by file."""
    faults = {
        "elsewhere.html": '<img src="http://example.invalid/x.png">',
        "exception.html": "<script>nobody()</script>",
        "wide.html": '<div style="width:2000px">wide</div>',
        "empty.html": "<details><summary>more</summary></details>",
        "missing/index.html": '<script src="not_there.js"></script>',
        "right.html": "<details><summary>more</summary><p>something</p></details>",
    }
    for name, body in faults.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"<!DOCTYPE html><meta charset=utf-8><link rel=icon href=data:,><body>{body}")
    passed = []
    for address in pages(tmp_path):
        try:
            for seen in look(address, 390):
                check(seen)
            passed.append(address.rpartition("/")[2])
        except AssertionError:
            continue
    assert passed == ["right.html"]


def test_a_machine_without_a_browser_skips(monkeypatch, request):
    from tests.browser import conftest

    monkeypatch.setattr(conftest, "shutil", SimpleNamespace(which=lambda name: None))
    with pytest.raises(pytest.skip.Exception, match="no Chromium: install"):
        next(conftest.chromium.__wrapped__())
