from __future__ import annotations

from xml.etree import ElementTree

import pytest

from perpetune.report import render
from perpetune.report.heat_maps import confusion_svg
from perpetune.report.routes import MOST_TASKS, routes

EVIL = '<script>&"'


def found(recipe="color", tasks=("a", "b", "c"), confusion=((8, 2, 0), (1, 7, 2), (0, 0, 10)), **changes):
    given = {"recipe": recipe, "tasks": list(tasks), "confusion": [list(row) for row in confusion]}
    return {**given, "accuracy": 25 / 30, "accuracy_micro": 0.8, "asked": 1.0, **changes}


def test_seeds_are_averaged_and_recipes_ranked():
    same = found(confusion=((4, 6, 0), (1, 7, 2), (0, 0, 10)), accuracy=0.7)
    other = found(tasks=("b", "a", "c"), accuracy=0.9)
    (color,) = routes([found(), same, other])
    assert color.shares[0] == pytest.approx((0.6, 0.4, 0.0))  # the seed with another order has another matrix
    assert color.accuracy.mean == pytest.approx((25 / 30 + 0.7 + 0.9) / 3) and color.accuracy.count == 3
    assert [r.recipe for r in routes([found("color"), found("routed", accuracy=0.99)])] == ["routed", "color"]


def test_each_task_says_where_most_of_the_others_go():
    lines = routes([found()])[0].lines
    assert [(line.task, line.own, line.instead, line.share) for line in lines] == [
        ("a", 0.8, "b", 0.2),
        ("b", 0.7, "c", 0.2),
        ("c", 1.0, None, 0.0),
    ]


def test_the_picture_holds_what_is_sent_somewhere_and_outlines_the_right_ones():
    root = ElementTree.fromstring(str(confusion_svg(((0.8, 0.2, 0.0), (0.0, 1.0, 0.0), (0.25, 0.25, 0.5)), "abc", "t")))
    cells = [e.text for e in root.iter("text") if "cell" in (e.get("class") or "")]
    assert cells == ["80", "20", "100", "25", "25", "50"]
    assert len([e for e in root.iter("rect") if e.get("class") == "just"]) == 3
    assert "sent to task" in "".join(root.itertext())


def test_a_page_has_the_section_where_there_are_routes(result, page_of):
    assert 'id="routes"' not in render(page_of([result("lora")]))
    page = render(page_of([result("color", routing_accuracy=0.83)], routes=[found()]))
    assert 'id="routes"' in page and "<b>83.3</b> of 100 test examples to their own task" in page
    assert "1 adapter runs per input" in page and "the test examples of each task (row)" in page
    assert "routing accuracy</abbr>" in page and "routing accuracy</abbr>" not in render(page_of([result()]))


def test_a_comparison_has_a_line_for_every_recipe_that_routes(result, page_of):
    records = [result("color"), result("routed"), result("lora")]
    page = render(page_of(records, routes=[found("color"), found("routed", accuracy=0.9, asked=None)]))
    section = page[page.index('id="routes"') : page.index('id="promises"')]
    assert section.index("<code>routed</code>") < section.index("<code>color</code>")
    assert "90.0" in section and "not stored" in section and section.count("<details>") == 2
    assert "lora" not in section


def test_with_very_many_tasks_the_picture_is_left_out(result, page_of):
    size = MOST_TASKS + 1
    many = found(
        tasks=[f"t{i}" for i in range(size)], confusion=[[int(i == j) for j in range(size)] for i in range(size)]
    )
    page = render(page_of([result()], routes=[many]))
    assert "examples of each task (row)" not in page and "t30" in page


def test_names_are_escaped(result, page_of):
    page = render(page_of([result()], routes=[found(EVIL, tasks=(EVIL, "b", "c"))]))
    assert "<script" not in page
