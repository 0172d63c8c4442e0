"""What a report costs with many tasks: work that grows like the T x T figures, a page that grows like the T tasks."""

from __future__ import annotations

import base64
import io
import re
import sys

import numpy as np
import pytest
from PIL import Image

from perpetune.report import render
from perpetune.report.charts import lines_svg
from perpetune.report.heat_maps import MOST_CELLS, confusion_svg, matrix_svg


def calls(function, *args) -> int:
    """Python and C functions that are called: a measure of work that does not depend on the machine."""
    count = 0

    def counted(frame, event, arg):
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(counted)
    try:
        function(*args)
    finally:
        sys.setprofile(None)
    return count


@pytest.mark.parametrize("seeds", [1, 2])
def test_work_grows_at_most_like_the_figures(result, page_of, seeds):
    def data(size):
        tasks = [f"t{i}" for i in range(size)]
        routes = [
            {
                "recipe": "lora",
                "tasks": tasks,
                "confusion": np.eye(size, dtype=int).tolist(),
                "accuracy": 1.0,
                "accuracy_micro": 1.0,
                "asked": 1.0,
            }
        ]
        return page_of([result("lora", tasks=tasks, seed=s) for s in range(seeds)], routes=routes * seeds)

    render(data(2))  # the template is compiled once
    small, large = calls(render, data(25)), calls(render, data(100))
    assert large < 16 * small


def test_a_page_of_very_many_tasks_stays_readable(result, page_of):
    small, large = (len(render(page_of([result(tasks=[f"t{i:03}" for i in range(n)])]))) for n in (150, 600))
    assert large < 4.2 * small < 4e6
    page = render(page_of([result(tasks=[f"t{i:03}" for i in range(150)])]))
    assert "Drawn is one task in 3." in page and "t149" in page and "one pixel" in page.lower()


def test_a_heat_map_of_very_many_tasks_has_one_pixel_for_each_value():
    size = MOST_CELLS + 1
    matrix = [[0.5 if j <= i else None for j in range(size)] for i in range(size)]
    drawn = str(matrix_svg(matrix, [f"t{i}" for i in range(size)], "m", [1.0] * size))
    encoded = re.search(r'href="data:image/png;base64,([^"]+)"', drawn)[1]
    alpha = np.array(Image.open(io.BytesIO(base64.b64decode(encoded))))[..., 3]
    assert alpha.shape == (size + 1, size)
    assert (alpha[0] == 255).all() and alpha[1, 0] == round(255 * (0.04 + 0.96 * 0.5)) and alpha[1, 1] == 0
    assert 'class="cell' not in drawn and ">101</text>" not in drawn


def test_lines_of_very_many_tasks_start_where_their_task_is_learned():
    size = 301
    matrix = [[0.5 if j <= i else None for j in range(size)] for i in range(size)]
    drawn = str(lines_svg(matrix, [f"t{i}" for i in range(size)], "m"))
    assert drawn.count('class="line"') == 43 and "task 8, t7<" in drawn and "task 2, t1<" not in drawn


def test_up_to_a_hundred_tasks_every_figure_is_written():
    shares = np.full((MOST_CELLS, MOST_CELLS), 0.01).tolist()
    assert str(confusion_svg(shares, ["t"] * MOST_CELLS, "c")).count("cell light") == MOST_CELLS**2
