from __future__ import annotations

import math
from xml.etree import ElementTree

import pytest
import torch

from benchmarks import certificate
from benchmarks.certificate import Found, Row
from benchmarks.certificate_page import capacity

TASKS = 24


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[list[tuple[Row, Found]], str, str]:
    """What was found of every row, the page and the picture."""
    folder = tmp_path_factory.mktemp("results")
    threads = torch.get_num_threads()
    try:
        found = certificate.main(["--tasks", str(TASKS), "--rounds", "1", "--out", str(folder)])
    finally:
        torch.set_num_threads(threads)
    return found, (folder / "certificate.md").read_text(), (folder / "capacity.svg").read_text()


def test_drift_is_that_of_the_tokens():
    """|dW_t X| / |X| over the tokens of all tasks before t, and of all changes together, tasks counting alike."""
    torch.manual_seed(0)
    X = [torch.randn(n, 5, dtype=torch.float64) * n for n in (3, 7, 4)]
    W = torch.randn(3, 2, 5, dtype=torch.float64)
    found = Found(bound=[0.1, 0.2])
    certificate.old_outputs(found, X, W)
    first, second = ((x / x.norm()).mT for x in X[:2])
    for t, old in ((1, first), (2, torch.cat([first, second], 1))):
        assert found.drift[t - 1] == pytest.approx(((W[t] - W[t - 1]) @ old).norm().item() / math.sqrt(t), rel=1e-12)
    changed = torch.cat([(W[2] - W[0]) @ first, (W[2] - W[1]) @ second], 1).norm()
    assert found.total == pytest.approx(changed.item() / math.sqrt(2), rel=1e-12)
    then = torch.cat([W[0] @ first, W[1] @ second], 1).norm()
    assert found.outputs == pytest.approx((changed / then).item(), rel=1e-12)
    assert found.total_bound == pytest.approx((0.1 + 0.2 * math.sqrt(2)) / math.sqrt(2), rel=1e-12)


def test_no_drift_is_above_what_is_certified(run):
    for row, found in run[0]:
        if row.memory == "none":
            assert max(found.drift) > 0.1 and found.outputs > 1  # the tasks do forget
            continue
        assert len(found.drift) == len(found.bound) == TASKS - 1
        assert found.violations == found.broken == 0, row
        assert found.total <= found.total_bound
        for drift, claimed in zip(found.drift, found.claimed, strict=True):
            if row.memory == "sketch":
                assert drift <= claimed + 1e-7  # what is not in the sketch is added
            elif row.energy < 1:
                assert drift**2 == pytest.approx(claimed**2, rel=1e-4, abs=1e-8)  # C is summed in fp32
    exact = [f for row, f in run[0] if (row.memory, row.energy, row.dtype) == ("C", 1, torch.float64)]
    assert len(exact) == 2 and all(f.total < 1e-13 for f in exact)


def test_a_drift_above_its_bound_is_counted():
    assert Found(drift=[0.1, 0.3, math.nan], bound=[0.2, 0.2, 0.2]).violations == 2
    assert Found(drift=[0.1], bound=[math.nan]).violations == 1


def test_state_does_not_grow_and_directions_run_out(run):
    used = {}
    for row, found in run[0]:
        if row.memory != "none":
            assert found.size.keys() == {10, TASKS} and found.size[10] == found.size[TASKS]
            used[row.stream, row.memory, row.energy] = found.used
    assert set(used["shared", "C", 0.99]) == {24 / 128}
    assert set(used["shared", "C", 1]) == {1.0}
    assert [round(128 * share) for share in used["fresh", "C", 1]] == [min(6 * t, 128) for t in range(1, TASKS)]
    assert max(used["fresh", "cap 0.5", 1]) == 0.5
    assert max(used["fresh", "sketch", 1]) == certificate.SKETCH / 128


def test_page_and_picture(run):
    found, page, picture = run
    assert f"Drift above its bound: 0 of {11 * (TASKS - 1) - (TASKS - 1)} tasks, in 10 runs" in page
    assert f"python -m benchmarks.certificate --tasks {TASKS}" in page
    assert len([row for row in page.splitlines() if row.startswith(("| shared", "| fresh"))]) == 12 + 10
    lines = [e for e in ElementTree.fromstring(picture).iter() if e.tag.endswith("polyline")]
    assert [e[0].text for e in lines] == [row.line for row, _ in found if row.line]
    again = certificate.measure(certificate.ROWS[1], TASKS, rounds=1)
    assert capacity([("", again.used)]) == capacity([("", dict(found)[certificate.ROWS[1]].used)])


def test_too_few_tasks_are_refused(capsys):
    with pytest.raises(SystemExit):
        certificate.main(["--tasks", "10"])
    assert "--tasks must be 11 or more" in capsys.readouterr().err
