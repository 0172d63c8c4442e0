from __future__ import annotations

import os
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest

from perpetune.core.errors import RunError
from perpetune.report import render, write_picture, write_report

VOID = {"meta", "br", "img", "link", "input", "hr"}
EVIL = '<script>alert("1")</script>&\'"'


class Page(HTMLParser):
    """Checks that tags are balanced, and gathers what tests look at."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.rows: list[tuple[str, str]] = []
        self.feed(text)
        self.close()
        assert self.open == [], f"not closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append((dict(attrs).get("class") or "", ""))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data
        if "tr" in self.open:
            kind, text = self.rows[-1]
            self.rows[-1] = (kind, text + data)

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.tags if name == tag]

    def text_of(self) -> str:
        return " ".join(self.text.split())


def test_first_screen_says_it_in_plain_words(result, page_of):
    # rows: 0.9 at first, then minus 0.2 per later task: final = (0.5 + 0.7 + 0.9) / 3 = 0.7
    page = Page(render(page_of([result("olora")])))
    assert (
        "After learning 3 tasks one after another, olora gets 70 of 100 test examples right on average "
        "and has forgotten 30 points on the earlier tasks." in page.text_of()
    )
    assert "Right after learning each task it got 90 of 100." in page.text_of()


def test_nothing_is_loaded_from_anywhere(result, page_of, promise):
    picture = "data:image/png;base64,iVBORw0KGgo="
    flips = [
        {"task": "a", "image": picture, "label": "x", "was": "x", "now": "y"},
        {"task": "a", "image": "https://example.org/x.png", "label": "x", "was": "x", "now": "y"},
        {"task": "a", "image": 'data:image/svg+xml,<svg onload="1"/>', "label": "x", "was": "x", "now": "y"},
    ]
    records = [result(r, guarantees=[promise(0.1, 1.0)]) for r in ("sequential", "olora", "joint")]
    text = render(page_of(records, flips=flips))
    page = Page(text)
    assert not re.search(r"https?:|//\w|@import|url\(", text)
    assert not {"script", "link", "iframe", "object", "embed"} & {tag for tag, _ in page.tags}
    assert [img["src"] for img in page.of("img")] == [picture]
    assert all(a["href"].startswith("#") for a in page.of("a"))
    targets = {attrs["id"] for _, attrs in page.tags if "id" in attrs}
    assert {a["href"][1:] for a in page.of("a")} <= targets
    assert any("default-src 'none'" in (m.get("content") or "") for m in page.of("meta"))


def test_everything_untrusted_is_escaped(result, page_of, promise):
    broken = promise(2.0, 1.0, name=EVIL, note=EVIL, unit=EVIL, source=EVIL, task=EVIL)
    records = [result(EVIL, tasks=(EVIL, "b"), head=EVIL, run=EVIL, guarantees=[broken]) for _ in range(2)]
    records.append(result("joint", tasks=(EVIL, "b"), head=EVIL, scenario=EVIL))
    flips = [{"task": EVIL, "text": EVIL, "label": EVIL, "was": EVIL, "now": EVIL}]
    data = page_of(
        records, title=EVIL, stream=EVIL, model=EVIL, command=EVIL, versions={EVIL: EVIL}, created=EVIL, flips=flips,
        labels={EVIL: [EVIL], "b": ["y"]}, formulas={"forgetting": EVIL},
    )  # fmt: skip
    text = render(data)
    page = Page(text)
    assert "<script" not in text and "script" not in {tag for tag, _ in page.tags}
    assert page.text.count(EVIL) > 10
    assert not any(name.startswith("on") for _, attrs in page.tags for name in attrs)


def test_undefined_is_a_dash_that_says_why_and_never_a_zero(result, page_of):
    page = Page(render(page_of([result("lora")])))
    dashes = [a["title"] for a in page.of("abbr") if a.get("class") == "none"]
    assert any("the head cannot name classes" in t for t in dashes)
    assert any("joint or single-task" in t for t in dashes)
    assert not {"None", "nan", "null"} & set(re.split(r"[^\w]+", page.text.replace("None of these recipes", "")))


def test_a_broken_promise_is_a_red_line(result, page_of, promise):
    guarantees = [
        promise(1e-7, 1e-5, name="kept one"),
        promise(4.2e-3, 1e-5, name="broken one", task="b"),
        promise(0.3, None, name="observed one"),
        promise(None, 1.0, name="missing one"),
        promise(float("nan"), 1.0, name="nan one"),
    ]
    page = Page(render(page_of([result("lora", guarantees=guarantees)])))
    kinds = {name: kind for kind, text in page.rows for name in ("kept", "broken", "observed") if f"{name} one" in text}
    assert kinds == {"kept": "kept", "broken": "broken", "observed": "observed"}
    assert {kind for kind, text in page.rows if "missing one" in text or "nan one" in text} == {"broken"}
    assert "3 promises were broken." in page.text_of()
    assert "lora, seed 0, task b: broken one is 0.0042, promised at most 1e−5" in page.text_of()
    clean = Page(render(page_of([result("lora", guarantees=guarantees[:1])])))
    assert "broken" not in clean.text


def test_the_parts_of_a_promise_can_be_unfolded(result, page_of, promise):
    parts = [["layer.0.query", 0.25, 0.5], ["layer.1.query", 0.125, None]]
    page = render(page_of([result(guarantees=[promise(0.25, 0.5, parts=parts)])]))
    assert "all 2 parts" in page and "layer.1.query" in page and "≤ 0.5" in page
    assert "parts</summary>" not in render(page_of([result(guarantees=[promise(0.25, 0.5)])]))


def test_a_promise_of_one_training_is_counted_once_over_its_readings(result, page_of, promise):
    records = [result("lora", head=head, guarantees=[promise(2.0, 1.0)]) for head in ("ridge", "linear")]
    assert "1 promise was broken." in Page(render(page_of(records))).text_of()


def test_single_task(result, page_of):
    page = Page(render(page_of([result("lora", tasks=("only",))])))
    assert "After a single task, lora gets 90 of 100 test examples right." in page.text_of()
    assert "With a single task there is nothing to forget yet." in page.text_of()
    assert "Every task over time" not in page.text


def test_joint_only(result, page_of):
    page = Page(render(page_of([result("joint")])))
    assert "Trained on all 3 tasks at once, joint gets 70 of 100" in page.text_of()
    assert "Every task over time" not in page.text and "Learned against kept" not in page.text
    assert "all at once" in page.text and "after 1 a" not in page.text


def test_a_joint_matrix_may_have_its_last_row_alone(result, page_of):
    whole = result("joint")
    alone = {**whole, "matrix": whole["matrix"][-1:]}
    assert render(page_of([whole])) == render(page_of([alone]))


def test_thirty_tasks(result, page_of):
    tasks = [f"alphabet {i:02d}" for i in range(30)]
    text = render(page_of([result("nlora", tasks=tasks)]))
    page = Page(text)
    assert all(t in page.text for t in tasks)
    assert len(text) < 400_000


def test_a_run_that_was_stopped_midway(result, page_of):
    record = result("lora")
    record["matrix"][2] = [None, None, None]
    page = Page(render(page_of([{**record, "final_accuracy": None, "forgetting": None}])))
    assert "The run has not reached the last task yet" in page.text_of()


def test_comparison_names_the_control_that_matches_and_the_bound(result, page_of):
    finals = {"sequential": 0.361, "olora": 0.577, "frozen_ridge": 0.841, "joint": 0.903}
    records = [result(r, final_accuracy=f + d, seed=s) for r, f in finals.items() for s, d in enumerate((-0.01, 0.01))]
    page = Page(render(page_of(records)))
    said = page.text_of()
    assert "sequential gets 36 of 100 test examples right on average and has forgotten 30 points" in said
    assert "; olora gets 58 and has forgotten 30." in said
    assert "But the control frozen_ridge (never trains the network) gets 84: more than every recipe" in said
    assert "Training on all tasks at once (joint), which is impossible when tasks arrive one by one, gets 90." in said
    assert "57.7 ± 1.4" in said  # 0.567 and 0.587: standard deviation with n - 1
    assert said.count("control") > 2 and "upper bound" in said


def test_evaluations_are_apart(result, page_of):
    heads = [("class", "ridge", 0.5), ("class", "linear", 0.1), ("task", "ridge", 0.9)]
    records = [
        result(r, scenario=s, head=h, final_accuracy=f) for r in ("sequential", "olora") for s, h, f in heads
    ]  # fmt: skip
    page = Page(render(page_of(records)))
    assert "Shown: class-incremental, ridge head" in page.text_of()
    assert "2 other evaluations of the same runs" in page.text_of()
    chosen = Page(render(page_of(records, headline=("task", "ridge"))))
    assert "Shown: task-incremental, ridge head" in chosen.text_of()


def test_command_versions_formulas_and_costs_are_there(result, page_of):
    page = Page(render(page_of([result("lora")])))
    said = page.text_of()
    for expected in ("perpetune run --recipe lora", "perpetune 0.1.0", "1 min 15 s", "12\u202f345", "6 MB", "300"):
        assert expected in page.text, expected
    assert "max over j ≤ i < T of a(i, j) − a(T, j)" in said
    assert any("max over j" in (a.get("title") or "") for a in page.of("abbr"))
    assert "peak memory" not in said  # measured nowhere: no column of dashes


def test_formulas_may_come_with_the_records(result, page_of):
    record = result("lora", formulas={"plasticity": "mean over j of a(j, j)"})
    assert "mean over j of a(j, j)" in Page(render(page_of([record], formulas={}))).text


def test_records_may_be_models(result, page_of):
    class Model:
        def model_dump(self):
            return result("lora")

    assert render(page_of([Model()], tasks=["a", "b", "c"])) == render(page_of([result("lora")]))


def test_page_does_not_depend_on_the_clock(result, page_of):
    assert render(page_of([result("lora")])) == render(page_of([result("lora")]))


def test_works_in_both_themes_and_without_script(result, page_of):
    text = render(page_of([result("lora")]))
    assert "prefers-color-scheme: dark" in text and 'name="viewport"' in text
    used = set(re.findall(r"var\(--([\w-]+)\)", text))
    light, dark = re.findall(r":root \{[^}]*?(--ground:[^}]*)\}", text)
    for block in (light, dark):
        assert used <= set(re.findall(r"--([\w-]+):", block))


def test_written_whole_to_a_file_or_a_folder(result, page_of, tmp_path):
    data = page_of([result("lora")])
    assert write_report(tmp_path / "x.html", data) == tmp_path / "x.html"
    assert write_report(tmp_path / "new" / "report", data) == tmp_path / "new" / "report" / "index.html"
    assert (tmp_path / "x.html").read_text(encoding="utf-8") == render(data)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["new", "x.html"]


def test_what_cannot_be_written_is_one_line(result, page_of, tmp_path, monkeypatch):
    (tmp_path / "old.html").write_text("old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(RunError, match=r"cannot write .*old.html: No space left on device"):
        write_report(tmp_path / "old.html", page_of([result("lora")]))
    assert [p.name for p in tmp_path.iterdir()] == ["old.html"] and (tmp_path / "old.html").read_text() == "old"


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([], "no results yet"),
        ([{"recipe": "lora", "tasks": ["a"]}], "result 0 has no `matrix`"),
        ([{"recipe": "lora", "tasks": ["a", "b"], "matrix": [[0.1], [0.2]]}], "2 x 1 does not fit 2 tasks"),
    ],
)
def test_malformed_results_are_refused(page_of, records, message):
    with pytest.raises(RunError, match=message):
        render(page_of(records, tasks=["a"]))


def test_picture_stands_alone(result, tmp_path):
    records = [
        result(r, final_accuracy=f) for r, f in ((EVIL, 0.3), ("joint", 0.9), ("sequential", 0.1), ("x\x00y", 0.2))
    ]
    path = write_picture(tmp_path / "picture.svg", records, title="Digits")
    text = path.read_text(encoding="utf-8")
    root = ElementTree.fromstring(text)
    assert root.tag == "{http://www.w3.org/2000/svg}svg" and "var(" not in text
    said = ["".join(e.itertext()) for e in root.iter("{http://www.w3.org/2000/svg}text")]
    order = [next(i for i, t in enumerate(said) if t.startswith(name)) for name in ("joint", EVIL[:20], "sequential")]
    assert order == sorted(order)
    assert "forgot 30" in said and "Digits" in said


def test_bars_of_one_seed_have_the_standard_error_of_their_test_sets(result, page_of):
    """a (1 - a) / n of 0.5 and 100 examples: 5 points. With seeds it is their spread."""
    one = render(page_of([result(tasks=["a", "b"], matrix=[[0.9, None], [0.5, 0.5]])]))
    assert "<small>± 5.0</small>" in one and "one standard error" in one and "<td>100</td>" in one
    matrices = [[[0.9, None], [0.4, 0.5]], [[0.9, None], [0.6, 0.5]]]
    several = render(page_of([result(tasks=["a", "b"], seed=s, matrix=m) for s, m in enumerate(matrices)]))
    assert "standard deviation over 2 seeds" in several and "<small>± 14.1</small>" in several
    assert "one standard error" not in several
