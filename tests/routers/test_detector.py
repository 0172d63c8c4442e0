from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from perpetune.core.errors import ConfigError
from perpetune.routers import RouterError
from perpetune.routers.detector import Detector, Moments, fit

WIDTH = 24


def gauss(generator, task, count):
    """Examples around a mean of the task's own, more spread in some directions than in others."""
    spread = 1 / torch.arange(1, WIDTH + 1, dtype=torch.float64).sqrt()
    mean = torch.zeros(WIDTH, dtype=torch.float64)
    mean[[0, task + 1]] = torch.tensor([4.0, 1.5], dtype=torch.float64)
    return mean + spread * torch.randn(count, WIDTH, generator=generator, dtype=torch.float64)


def stream(order, seed=0):
    """Features of segments (task, count), one after the other."""
    generator = torch.Generator().manual_seed(seed)
    return torch.cat([gauss(generator, task, count) for task, count in order])


ORDER = [(0, 150), (1, 130), (0, 90), (2, 160), (1, 70), (2, 100)]
STARTS = [0, 150, 280, 370, 530, 600]


def test_the_statistic_and_its_three_moments():
    x = stream([(0, 40)])
    h, window = x[:30], x[30:]
    S = np.cov(h.numpy().T)
    v, n, w = 29, 30, 10
    t = [np.trace(np.linalg.matrix_power(S, k)) for k in (1, 2, 3)]
    c2 = v**2 / ((v - 1) * (v + 2)) * (t[1] - t[0] ** 2 / v)
    c3 = v**4 / ((v - 1) * (v - 2) * (v + 2) * (v + 4)) * (t[2] - 3 / v * t[1] * t[0] + 2 / v**2 * t[0] ** 3)
    T = ((window.mean(0) - h.mean(0)) ** 2).sum().item() / (1 / w + 1 / n)
    from scipy.stats import chi2

    expected = chi2.sf((T - (t[0] - c2**2 / c3)) / (c3 / c2), c2**3 / c3**2)
    assert fit(Moments.of(h), window) == pytest.approx(expected, rel=1e-9)


def test_the_moments_are_estimated_without_bias_and_p_is_uniform():
    generator = torch.Generator().manual_seed(1)
    p = []
    for _ in range(1500):
        x = gauss(generator, 0, 96)
        p.append(fit(Moments.of(x[:64]), x[64:]))
    for level in (0.5, 0.1, 0.01):
        assert np.mean(np.array(p) < level) == pytest.approx(level, abs=3.5 * (level / 1500) ** 0.5)


class Counting(Detector):
    alarms = 0

    def _settle(self, when):
        self.alarms += 1
        super()._settle(when)


def test_alarms_come_at_the_level_that_was_asked_for_and_few_are_confirmed():
    level, length, alarms, confirmed, examples = 0.1, 16, 0, 0, 480
    for seed in range(30):
        detector = Counting(level, length)
        confirmed += len(detector.read(stream([(0, examples)], seed))) - 1
        alarms += detector.alarms
    assert 0.2 < alarms / (level * 30 * examples / length) < 1.2  # neighbouring tests overlap: fewer than the bound
    assert confirmed < 0.3 * alarms


def test_boundaries_are_found_and_tasks_reopened():
    segments = Detector(length=32).read(stream(ORDER))
    assert [s.task for s in segments] == [0, 1, 0, 2, 1, 2]
    assert all(abs(s.start - true) <= 3 for s, true in zip(segments, STARTS, strict=True))
    assert [s.stop for s in segments] == [*(s.start for s in segments[1:]), 700]
    assert all(0 < s.delay <= 32 for s in segments[1:]) and segments[0].delay == 0


def test_a_subtle_change_takes_longer_and_is_found():
    generator = torch.Generator().manual_seed(3)
    near = gauss(generator, 0, 400)
    near[200:, 5] += 0.5
    segments = Detector(length=64).read(near)
    assert [s.task for s in segments] == [0, 1] and abs(segments[1].start - 200) < 32


@pytest.mark.parametrize("chunk", [1, 7, 50])
def test_how_the_examples_are_dealt_to_calls_changes_nothing(chunk):
    x = stream(ORDER)
    whole, parts = Detector(length=32), Detector(length=32)
    whole.read(x)
    for rows in x.split(chunk):
        parts.read(rows)
    assert parts.segments == whole.segments
    assert all(torch.equal(a.gram, b.gram) for a, b in zip(parts.tasks, whole.tasks, strict=True))


def test_a_decision_does_not_know_what_comes_later():
    x = stream(ORDER)
    other = torch.cat([x[:420], stream([(3, 280)], seed=9)])
    for stop in (150, 200, 290, 350, 420):
        a, b = Detector(length=32), Detector(length=32)
        assert a.read(x[:stop]) == b.read(other[:stop])
        a.read(x[stop:]), b.read(other[stop:])
        settled = [s for s in a.segments if s.start + 64 <= stop]
        assert [(s.start, s.task, s.detected_at) for s in b.segments[: len(settled)]] == [
            (s.start, s.task, s.detected_at) for s in settled
        ]


def test_what_is_kept_does_not_grow_with_the_stream():
    detector = Detector(length=32)
    detector.read(stream([(0, 1000)]))
    assert len(detector._rows) <= 64
    assert detector.tasks[0].n + len(detector._rows) == 1000


def test_moments_of_a_task_are_those_of_its_segments():
    x = stream(ORDER)
    detector = Detector(length=32)
    segments = detector.read(x)
    own = torch.cat([F.normalize(x[s.start : s.stop], dim=1) for s in segments if s.task == 1])
    torch.testing.assert_close(detector.tasks[1].gram, own.T @ own)
    assert detector.tasks[1].n == len(own)


def test_equal_features_are_no_alarm_and_another_one_is():
    one = torch.ones(200, 4)
    assert len(Detector(length=16).read(one)) == 1
    two = torch.cat([one, torch.tensor([1.0, -1, 1, 1]).repeat(100, 1)])
    assert [s.start for s in Detector(length=16).read(two)] == [0, 200]


def test_what_cannot_be_read_is_refused():
    detector = Detector()
    assert detector.read(torch.zeros(0, 4)) == []
    detector.read(torch.ones(3, 4))
    with pytest.raises(RouterError, match=r"\(N, 4\)"):
        detector.read(torch.ones(3, 5))
    with pytest.raises(RouterError, match="finite"):
        detector.read(torch.full((3, 4), torch.nan))
    for settings in ({"level": 0}, {"level": 1.5}, {"length": 4}):
        with pytest.raises(ConfigError):
            Detector(**settings)
