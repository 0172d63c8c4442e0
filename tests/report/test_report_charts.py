from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perpetune.report import Bar, Point, bar_svg, lines_svg, matrix_svg, scatter_svg
from perpetune.report.charts import _spread, change_svg
from perpetune.report.heat_maps import heat
from perpetune.report.svg import DARK, LIGHT, tag

SHARES = st.floats(0, 1)


def parse(markup) -> ElementTree.Element:
    return ElementTree.fromstring(str(markup))


def rects(root: ElementTree.Element, kind: str) -> list[dict[str, str]]:
    return [e.attrib for e in root.iter("rect") if e.get("class") == kind]


def test_a_bar_is_as_long_as_its_figure():
    root = parse(bar_svg(Bar("lora", now=0.361, learned=0.92, spread=0.02), guess=0.1))
    assert [r["width"] for r in rects(root, "method")] == ["36.10%"]
    assert [r["width"] for r in rects(root, "lost")] == ["92.00%"]
    assert [e.get("x1") for e in root.iter("line") if e.get("class") == "guess"] == ["10.00%"]
    assert root.find("title").text == "lora: 36.1 of 100 right, right after learning 92.0"


def test_a_bar_without_a_figure_is_empty():
    root = parse(bar_svg(Bar("lora", now=None, learned=0.5)))
    assert not rects(root, "method") and not rects(root, "lost") and "not measured" in root.find("title").text


def test_what_later_tasks_improved_is_drawn_to_the_left():
    gained = rects(parse(change_svg("a", -0.1, low=-0.1, high=0.3)), "good")
    lost = rects(parse(change_svg("a", 0.3, low=-0.1, high=0.3)), "fall")
    assert [(r["x"], r["width"]) for r in gained] == [("0.00%", "25.00%")]
    assert [(r["x"], r["width"]) for r in lost] == [("25.00%", "75.00%")]


def test_heat_map_shows_every_measured_cell_and_no_other():
    root = parse(matrix_svg(((0.931, None), (0.5, 1.0)), ["a", "b"], "m", baseline=(0.1, None)))
    cells = [e.text for e in root.iter("text") if "cell" in (e.get("class") or "")]
    assert cells == ["10", "93", "50", "100"]
    assert len(rects(root, "just")) == 2
    assert "untouched model" in "".join(root.itertext())


def test_a_line_starts_where_its_task_is_learned_and_stops_where_nothing_was_measured():
    matrix = ((0.9, 0.4, 0.4), (0.5, 0.8, 0.4), (None, None, None))
    root = parse(lines_svg(matrix, ["a", "b", "c"], "m"))
    lines = [e for e in root.iter("polyline") if e.get("class").startswith("line")]
    assert [len(e.get("points").split()) for e in lines] == [2, 1]
    mean = next(e for e in root.iter("polyline") if e.get("class") == "mean")
    (_, y1), (_, y2) = (map(float, p.split(",")) for p in mean.get("points").split())
    # 0.9, then (0.5 + 0.8) / 2 = 0.65, on an axis of 170 points
    assert y2 - y1 == pytest.approx(0.25 * 170, abs=0.11)


@settings(max_examples=30)
@given(st.lists(st.tuples(SHARES, SHARES), min_size=1, max_size=30), st.none() | SHARES)
def test_scatter_keeps_every_mark_inside_and_labels_apart(pairs, bound):
    root = parse(scatter_svg([Point(f"p{i}", a, b) for i, (a, b) in enumerate(pairs)], "s", bound))
    marks = [(float(e.get("cx")), float(e.get("cy"))) for e in root.iter("circle")]
    assert len(marks) == len(pairs)
    assert all(40 - 0.1 <= x <= 340.1 and 14 - 0.1 <= y <= 314.1 for x, y in marks)
    labels = [float(e.get("y")) for e in root.iter("text") if (e.text or "").startswith("p")]
    assert all(b - a > 10 for a, b in zip(labels, labels[1:], strict=False))


@given(st.lists(st.floats(0, 100), min_size=1, max_size=12))
def test_labels_stay_in_order_inside_and_apart(wanted):
    placed = _spread(sorted(wanted), 0, 100)
    gap = min(14, 100 / max(len(wanted) - 1, 1))
    assert all(b - a >= gap - 1e-9 for a, b in zip(placed, placed[1:], strict=False))
    assert placed[0] >= 0 and placed[-1] <= 100 + 1e-9


# a small alphabet: markup, controls, what XML forbids, other scripts
@given(st.text(st.sampled_from("<>&'\"\x00\x07\x1b\t\n\r\ufffe\ud800 aé漢😀];/-")))
def test_any_text_is_well_formed_and_comes_back(text):
    root = parse(tag("g", tag("title", text), aria_label=text))
    expected = re.sub("[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff\ufffe\uffff]", "\ufffd", text).replace("\r\n", "\n")
    assert (root.find("title").text or "") == expected.replace("\r", "\n")


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", [LIGHT, DARK], ids=["light", "dark"])
def test_colours_are_readable(theme):
    ground = theme["ground"]
    for key in ("ink", "soft", "method", "bad", "good", "fall"):  # text and links
        assert contrast(theme[key], ground) >= 4.5, key
    assert contrast(theme["bad"], theme["bad-tint"]) >= 4.5
    for key in ("control", "bound", "heat", *(f"task-{i}" for i in range(6))):  # marks
        assert contrast(theme[key], ground) >= 3, key
    assert LIGHT.keys() == DARK.keys()


@pytest.mark.parametrize("theme", [LIGHT, DARK], ids=["light", "dark"])
def test_figures_on_the_heat_map_are_readable_at_every_value(theme):
    worst = 99.0
    for percent in range(101):
        value = percent / 100
        opacity, weight = heat(value)
        mix = [
            round(int(theme["heat"][i : i + 2], 16) * opacity + int(theme["ground"][i : i + 2], 16) * (1 - opacity))
            for i in (1, 3, 5)
        ]
        worst = min(worst, contrast("#{:02x}{:02x}{:02x}".format(*mix), theme[f"on-{weight}"]))
    assert worst >= 4
