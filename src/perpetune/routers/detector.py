"""Finds where a new task begins in a stream that does not tell, from frozen features in the order of arrival."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from ..core.errors import ConfigError
from .base import RouterError

LOOKS = 4  # tests in the time in which a window fills; each is made at level / LOOKS


@dataclass(frozen=True)
class Segment:
    """Examples start .. stop - 1 of a stream, which belong to one task.

    Attributes:
        task: the tasks are counted as they are discovered; one that comes back keeps its number.
        detected_at: how many examples had been read when the boundary at `start` was noticed; 0 for the first segment.
    """

    start: int
    stop: int
    task: int
    detected_at: int

    @property
    def delay(self) -> int:
        return self.detected_at - self.start


@dataclass(frozen=True)
class Moments:
    """Of n features h in R^L: n, sum h (L,), sum h h^T (L x L)."""

    n: int
    total: Tensor
    gram: Tensor

    @classmethod
    def of(cls, h: Tensor) -> Moments:
        return cls(len(h), h.sum(0), h.T @ h)

    def __add__(self, other: Moments) -> Moments:
        return Moments(self.n + other.n, self.total + other.total, self.gram + other.gram)

    @property
    def mean(self) -> Tensor:
        return self.total / self.n


@dataclass
class Detector:
    """Does the mean of the last w = `length` examples still lie where the n examples of the task before them put it?

    With frozen features h of length 1, m and S mean and covariance of the task so far (the window held out), v = n - 1:

        T = |mean(window) - m|^2 / (1/w + 1/n)   ~   sum_k lambda_k chi^2_1,   lambda_k the eigenvalues of Sigma,

    where nothing has changed (Bai and Saranadasa 1996: no inverse, so that n may be below L). Only the sums
    c_j = sum_k lambda_k^j are needed of Sigma. They are estimated without bias from S (Srivastava 2005),

        c_1 = tr S,   c_2 = v^2 / ((v-1)(v+2)) [tr S^2 - (tr S)^2 / v],
        c_3 = v^4 / ((v-1)(v-2)(v+2)(v+4)) [tr S^3 - 3/v tr S^2 tr S + 2/v^2 (tr S)^3],

    and T is read as `a chi^2_d + b` with the same mean, variance and skewness (Hall, Buckley and Eagleson):
    a = c_3/c_2, d = c_2^3/c_3^2, b = c_1 - c_2^2/c_3. (Distances to k-means centres, which CoLoR routes by, miss a task
    that lies as near to these centres as the task's own examples do: on text, short sentences.)

    An alarm is confirmed by examples that come after it, w/2 at least: those before it were chosen for being odd. Then
    the task begins where a split of the examples kept has the largest squared distance of the means,
    n_1 n_2 / (n_1 + n_2) |m_1 - m_2|^2, and what has come since, about w examples, is tested against every known task.
    It is the one that it fits best, and a new one where it fits none at `level`.

    Causal: whatever is decided after i examples depends on these alone, and not on how they were dealt to calls. Kept
    are the last 2w to 3w examples, and of every task its moments, 8 L (L + 1) bytes (1.2 MB at L = 384).

    Args:
        level: the alarms to expect by chance while `length` examples are read; tests are made every length/4 examples,
            at level/4 each. That such an alarm is confirmed has the chance `level` again. All of it holds for examples
            that come shuffled within a task.
        length: w; a task is expected to be at least so long when it comes, and twice as long when it comes first.

    Raises:
        ConfigError: level outside (0, 1), or a length below 8.

    Attributes:
        tasks: what is known of each task discovered so far.
    """

    level: float = 0.001
    length: int = 64
    tasks: list[Moments] = field(default_factory=list, init=False, repr=False, compare=False)
    _rows: Tensor = field(init=False, repr=False, compare=False)  # the last examples, not yet in `tasks`
    _read: int = field(default=0, init=False, repr=False, compare=False)  # how many examples are read
    _done: list[Segment] = field(default_factory=list, init=False, repr=False, compare=False)
    _current: Segment = field(init=False, repr=False, compare=False)  # its `stop` is not known yet
    _alarm: tuple[int, int] | None = field(default=None, init=False, repr=False, compare=False)  # (split, when)

    def __post_init__(self) -> None:
        if not 0 < self.level < 1 or self.length < 8:
            raise ConfigError(
                f"Detector: level={self.level}, length={self.length}; a level in (0, 1), a length of at least 8"
            )

    @property
    def segments(self) -> list[Segment]:
        """The segments so far, the current one included; empty before the first example."""
        return [*self._done, _until(self._current, self._read)] if self._read else []

    def read(self, features: Tensor) -> list[Segment]:
        """Read the next examples; returns `segments`.

        Args:
            features: (N x L), of the frozen model; brought to length 1 here.

        Raises:
            RouterError: features of another width than before, or not finite.
        """
        h = F.normalize(features.detach().cpu().to(torch.float64), dim=-1)
        if h.ndim != 2 or (self._read and h.shape[1] != self._rows.shape[1]) or not torch.isfinite(h).all():
            width = self._rows.shape[1] if self._read else "L"
            raise RouterError(f"Detector: expected finite features of shape (N, {width}), found {tuple(h.shape)}")
        if not self.tasks and len(h):
            self._rows, self._current, self.tasks = h[:0], Segment(0, 0, 0, 0), [Moments.of(h[:0])]
        pace = self.length // LOOKS
        while len(h):
            take = pace - self._read % pace
            new, h = h[:take], h[take:]
            self._rows, self._read = torch.cat([self._rows, new]), self._read + len(new)
            if self._read % pace == 0:
                self._look()
        return self.segments

    def _look(self) -> None:
        if self._alarm is None and self._changed():
            self._alarm = self._split(), self._read
        kept = 2 * self.length
        if self._alarm is not None:
            split, when = self._alarm
            kept = max(kept, self._read - split)
            if self._read - split >= self.length and self._read - when >= self.length // 2:
                self._settle(when)
                self._alarm = None
        old = max(0, len(self._rows) - kept)
        self.tasks[self._current.task] += Moments.of(self._rows[:old])
        self._rows = self._rows[old:]

    def _changed(self) -> bool:
        """The test of the last window; False as long as it, or the task before it, is too short."""
        if self._read - self._current.start < self.length:
            return False
        before = self.tasks[self._current.task] + Moments.of(self._rows[: -self.length])
        return before.n >= self.length and fit(before, self._rows[-self.length :]) < self.level / LOOKS

    def _split(self) -> int:
        """Where the last examples are best divided in two, counted from the first example of the stream."""
        known, first = self.tasks[self._current.task], self._read - len(self._rows)
        start = max(first, self._current.start + self.length)  # the part before has its least length
        before = known.n + torch.arange(len(self._rows), dtype=torch.float64)[:, None]  # (rows x 1): n_1 of a split
        after = self._read - first - torch.arange(len(self._rows), dtype=torch.float64)[:, None]  # n_2
        upto = known.total + self._rows.cumsum(0) - self._rows  # (rows x L): sum of all examples before a split
        rest = known.total + self._rows.sum(0) - upto
        gain = (before * after / (before + after))[:, 0] * (upto / before - rest / after).square().sum(1)
        return start + int(gain[start - first :].argmax())

    def _settle(self, when: int) -> None:
        """Which task the examples since the split belong to; the split is placed once more, now that there are more."""
        split, task = self._split(), self._current.task
        here = split - (self._read - len(self._rows))
        known = list(self.tasks)
        known[task] += Moments.of(self._rows[:here])
        since = [self._rows[when - self._read if k == task else here :] for k in range(len(known))]
        fits = [fit(moments, rows) for moments, rows in zip(known, since, strict=True)]
        best = max(range(len(fits)), key=fits.__getitem__)
        if fits[task] >= self.level:
            return  # no boundary
        if fits[best] < self.level:
            best = len(known)
            known.append(Moments.of(self._rows[:0]))
        self._done.append(_until(self._current, split))
        self._current = Segment(split, split, best, when)
        self.tasks, self._rows = known, self._rows[here:]


def fit(task: Moments, window: Tensor) -> float:
    """How likely a mean at least so far off is, if the window's examples are of the task; see `Detector`."""
    n, v, m = task.n, task.n - 1, task.mean
    T = (window.mean(0) - m).square().sum() / (1 / len(window) + 1 / n)
    S = (task.gram - n * torch.outer(m, m)) / v
    s_1, s_2, s_3 = S.trace(), S.square().sum(), ((S @ S) * S).sum()  # tr S, tr S^2, tr S^3
    c_1 = s_1
    if not c_1 > 0:
        return float(T == 0)
    c_2 = v**2 / ((v - 1) * (v + 2)) * (s_2 - s_1**2 / v)
    c_3 = v**4 / ((v - 1) * (v - 2) * (v + 2) * (v + 4)) * (s_3 - 3 / v * s_2 * s_1 + 2 / v**2 * s_1**3)
    # no eigenvalues have smaller sums than these; estimates from few examples may
    c_2 = torch.maximum(c_2, c_1**2 / len(m))
    c_3 = torch.maximum(c_3, c_2**2 / c_1)
    a, d, b = c_3 / c_2, c_2**3 / c_3**2, c_1 - c_2**2 / c_3
    return float(torch.special.gammaincc(d / 2, ((T - b) / a).clamp_min(0) / 2))  # P(a chi^2_d + b > T)


def _until(segment: Segment, stop: int) -> Segment:
    return replace(segment, stop=stop)
