"""The page and the picture that `benchmarks.certificate` writes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from markupsafe import Markup

from perpetune.report.svg import standalone, tag

if TYPE_CHECKING:
    from benchmarks.certificate import Found, Row

TEXT = """\
# What subspace projection certifies, over {tasks:,} tasks

```
{command}
```

One linear layer of 128 inputs and 32 outputs learns {tasks:,} tasks of about 200 tokens, four steps of AdamW with weight
decay each, towards another random target every time. *shared*: the inputs lie in 24 directions that all tasks share, with
a little noise in all 128. *fresh*: the inputs of every task lie in 6 directions of its own, so that 128 are used up after
22 tasks. Memory: C, C with at most half of the directions protected (*cap 0.5*), or a *sketch* (Frequent Directions, 48
rows). The rule keeps nothing else; this benchmark keeps all tokens, and the drifts below are measured on them.

## What is certified, and what is not

**Drift above its bound: {violations} of {number:,} tasks, in {runs} runs.** Promises that the rule itself found broken: {broken}.

Certified is what **one task** changes: |dW X| / |X| over all tokens X of all earlier tasks, which count alike. **Changes
add up over the tasks, and the certificate of one task says nothing of that.** What follows for all of them together is no
more than the sum of their bounds: |sum dW X| <= sum |dW X|. The three columns *all tasks* hold what became of the outputs
for old tokens, from the end of their own task to the end of the last one: the drift in the same unit, that sum of bounds,
and the change relative to the outputs as they were. Where the rule leaves directions unprotected (energy below 1, a cap,
a sketch that is full), every single task keeps its bound, and the old outputs are worn down all the same: on *shared*,
by {worn} in the end with energy 0.99, by {kept} with energy 1, and by {plain} without the rule.

| stream | memory | energy | bits | above its bound | drift of a task, largest | share of its bound, largest | all tasks: drift | sum of bounds | of the outputs |
| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |
{guarantee}

With energy 1 noise counts like anything else: *shared* is full after one task, and nothing is learned any more. A sketch
protects at most as many directions as it has rows; what it has lost stands in its bound.

## What it costs

State after {points} tasks; times after {later} tasks over those after {first}, medians, the states taken in turns. *step*
is the rule's own part of an optimizer step. It grows with the directions in use, k / d, up to 1. The *end of a task* finds
the eigenvectors of C, which is quicker as long as the inputs had few directions. The number of tasks as such costs nothing.

| stream | memory | energy | bits | state, bytes | k / d | step, ratio | end of a task, ratio |
| --- | --- | --- | --- | --- | --- | --- | --- |
{cost}

![Share of input directions in use against the number of tasks](capacity.svg)
"""  # noqa: E501


def page(found: Sequence[tuple[Row, Found]], tasks: int, command: str) -> str:
    """The text of certificate.md; every row must have been measured with as many tasks."""
    ruled = [f for row, f in found if row.memory != "none"]
    points = sorted(ruled[0].size)
    guarantee, cost = [], []
    for row, f in found:
        energy = "" if row.memory == "none" else f"{row.energy:g}"
        head = [row.stream, row.memory, energy, str(row.dtype).removeprefix("torch.float")]
        certified = [str(f.violations), f"{f.nearest:.4f}", f"{f.total_bound:.1e}"] if f.bound else [""] * 3
        drifts = [certified[0], f"{max(f.drift):.1e}", certified[1], f"{f.total:.1e}", certified[2], change(f)]
        guarantee.append(line(*head, *drifts))
        if f.bound:
            size = [f"{f.size[at]:,}" for at in points]
            used = [f"{f.used[min(at, tasks - 1) - 1]:.2f}" for at in points]
            times = [[f"{f.slower[at][which]:.2f}" for at in points[1:]] for which in (0, 1)]
            cost.append(line(*head, *(" / ".join(cells) for cells in (size, used, *times))))
    shared = {(row.memory, row.energy): change(f) for row, f in reversed(found) if row.stream == "shared"}
    return TEXT.format(
        tasks=tasks,
        command=command,
        violations=sum(f.violations for f in ruled),
        broken=sum(f.broken for f in ruled),
        number=sum(len(f.drift) for f in ruled),
        runs=len(ruled),
        points=" / ".join(map(str, points)),
        later=" / ".join(map(str, points[1:])),
        first=points[0],
        worn=shared["C", 0.99],
        kept=shared["C", 1],
        plain=shared["none", 1],
        guarantee="\n".join(guarantee),
        cost="\n".join(cost),
    )


def change(f: Found) -> str:
    return f"{f.outputs:.1%}" if f.outputs > 1e-3 else f"{f.outputs:.1e}"


def line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def capacity(lines: Sequence[tuple[str, Sequence[float]]]) -> str:
    """k / d after 1, 2, ... tasks, on a logarithmic axis: the text of an .svg file."""
    width, height, left, right, top, bottom = 660, 300, 48, 450, 16, 250
    last = max(len(used) for _, used in lines)

    def x(tasks: int) -> float:
        return left + (right - left) * math.log10(tasks) / math.log10(last)

    def y(used: float) -> float:
        return bottom - (bottom - top) * used

    marks: list[Markup] = []
    for level in (0, 25, 50, 75, 100):
        at = y(level / 100)
        marks.append(tag("line", class_="grid", x1=left, x2=right, y1=at, y2=at))
        marks.append(tag("text", f"{level} %", class_="soft small end", x=left - 6, y=at + 4))
    for tasks in (10**power for power in range(4) if 10**power <= last + 1):
        marks.append(tag("text", f"{tasks:,}", class_="soft small mid", x=x(min(tasks, last)), y=bottom + 16))
    title = "input directions in use, k / d, against the number of tasks"
    marks.append(tag("text", title, class_="soft small mid", x=(left + right) / 2, y=bottom + 36))
    for i, (name, used) in enumerate(lines):
        bends = [n for n in range(1, len(used) - 1) if not used[n - 1] == used[n] == used[n + 1]]
        path = " ".join(f"{x(n + 1):.1f},{y(used[n]):.1f}" for n in [0, *bends, len(used) - 1])
        marks.append(tag("polyline", tag("title", name), class_="line", points=path, stroke=f"var(--task-{i})"))
        marks.append(tag("text", name, class_="small", x=right + 8, y=y(used[-1]) + 4))
    return standalone(Markup("").join(marks), width, height, title)
