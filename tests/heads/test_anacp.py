import pytest
import torch
from torch.nn.functional import gelu, normalize

from perpetune.core.errors import ConfigError
from perpetune.heads import AnaCPHead
from perpetune.heads.anacp import JITTER, spread
from tests.heads.points import LABELS, WIDTH, N, head_of, samples


def direct(f, y, head):
    """The equations, sample by sample: projections p of any features of length 1."""
    x = normalize(f.double(), dim=1)
    means = torch.stack([x[y == c].mean(0) for c in range(4)])
    S = (x - means[y]).T @ (x - means[y]) / len(x) + JITTER * torch.eye(WIDTH, dtype=torch.float64)
    T = spread(means, S)
    R = [layer.W * 2.0**-10 for layer in head._layers]
    thetas = []
    for k in range(head.layers):
        z = gelu(x @ R[k])
        A = z.T @ z + head.regularisation * torch.eye(z.shape[1], dtype=torch.float64)
        thetas.append(torch.linalg.solve(A, z.T @ T[y]))
    return lambda q: sum(normalize(gelu(q @ r) @ t, dim=1) for r, t in zip(R, thetas, strict=True)) / head.layers


def test_projections_and_scores_are_those_of_the_equations():
    f, y, ids = samples()
    head = head_of(f, y, ids, AnaCPHead, features=20, regularisation=2.0, batch=11)
    seen, Theta, _ = head.fit()
    p = direct(f, y, head)(normalize(f.double(), dim=1))
    z = [head.maps[f"z{k}."].steps(f.double())[0] for k in range(3)]
    assert float((head._projected(z) - p).abs().max()) < 2e-3  # the grid of z
    scores = gelu(p @ (head._last.W * 2.0**-10)) @ Theta
    assert float((head.scores(f)[:, :4] - scores).abs().max() / scores.abs().max()) < 5e-3
    assert float((head.scores(f).argmax(1) == y).double().mean()) > 0.7


def test_targets_of_means_that_differ_in_one_direction_are_pushed_apart_along_it():
    means = torch.tensor([[1.0, 0.1, 0.0], [1.0, -0.1, 0.0]], dtype=torch.float64)
    T = spread(means, 0.04 * torch.eye(3, dtype=torch.float64))
    # whitened: s = sqrt(2) * 0.1 / 0.2; a class moves from 0.1 to (s + 1) / s * 0.1 / 0.2 / 0.2
    s = 2**0.5 * 0.5
    expected = torch.tensor([1.0, (s + 1) / 2**0.5 / 0.2, 0.0], dtype=torch.float64)
    assert torch.allclose(T[0], expected / expected.norm(), atol=1e-12)
    assert torch.allclose(T[1], T[0] * torch.tensor([1.0, -1.0, 1.0]), atol=1e-12)


def test_same_bits_in_any_order_and_for_any_batch():
    f, y, ids = samples()
    plain = head_of(f, y, ids, AnaCPHead)
    index = torch.randperm(N, generator=torch.Generator().manual_seed(1))
    labels = LABELS[::-1]
    other = head_of(f[index], 4 - y[index], [ids[i] for i in index], AnaCPHead, labels, 9)
    assert torch.equal(plain.fit()[1], other.fit()[1])
    assert torch.equal(plain.scores(f), torch.cat([other.scores(part) for part in f.split(13)]).flip(1))


def test_settings_out_of_range_are_refused():
    for wrong in ({"layers": 0}, {"replay": 0}, {"regularisation": 0}, {"features": 0}):
        with pytest.raises(ConfigError):
            AnaCPHead(**wrong)
