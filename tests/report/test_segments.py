from __future__ import annotations

from xml.etree import ElementTree

import numpy as np

from perpetune.metrics.boundaries import boundary_figures
from perpetune.report import render
from perpetune.report.segments import strips_svg

EVIL = '<script>&"'
TRUTH = np.repeat([0, 1, 0], [100, 50, 50])


def drift(name="news", **changes):
    true = [(0, 100, name), (100, 150, "films"), (150, 200, name)]
    found = [(0, 101, 0, 0), (101, 150, 1, 120), (150, 200, 0, 170)]
    parts = [dict(zip(("start", "stop", "task", "detected_at"), part, strict=True)) for part in found]
    segments = [dict(zip(("start", "stop", "task"), segment, strict=True)) for segment in true]
    figures = boundary_figures(parts, TRUTH, 64)
    return {"true": segments, "parts": parts, "figures": figures, "told": False, "window": 64, **changes}


def test_a_found_segment_has_the_colour_of_its_task_and_a_tick():
    root = ElementTree.fromstring(str(strips_svg(drift())))
    fills = [e.get("fill") for e in root.iter("rect")]
    assert fills[:3] == fills[3:] and fills[0] == fills[2] != fills[1]
    assert len(list(root.iter("path"))) == 2  # the first segment was not noticed
    assert {"news", "films", "task 1", "task 2"} <= {e.text for e in root.iter("text")}


def test_names_are_escaped():
    assert "<script" not in str(strips_svg(drift(EVIL)))


def test_a_page_has_the_section_where_boundaries_were_found(result, page_of):
    assert 'id="boundaries"' not in render(page_of([result()]))
    page = render(page_of([result()], drift=drift()))
    assert 'id="boundaries"' in page and "2 of 2" in page and "20 examples" in page
    none = drift(told=True, figures=boundary_figures(drift()["parts"][:1], TRUTH[:101] * 0, 64))
    page = render(page_of([result()], drift=none))
    assert "The learner was told" in page and "–" in page[page.index('id="boundaries"') :]
