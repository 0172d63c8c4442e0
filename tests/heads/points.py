"""Samples of four classes, and heads that have seen them."""

from __future__ import annotations

import torch

from perpetune.heads import LDAHead

LABELS = ["ant", "bee", "cat", "dog", "eel"]
N, WIDTH = 160, 6


def samples(n=N, seed=0, noise=0.7):
    """Features, labels (the last label never occurs), ids."""
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(0, 4, (n,), generator=g)
    means = torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(9))
    return means[y] + noise * torch.randn(n, WIDTH, generator=g), y, [f"s-{i}" for i in range(n)]


def opened(kind=LDAHead, labels=LABELS, **settings):
    small = {"features": 16} if kind is not LDAHead or "map" in settings else {}
    head = kind(**{**small, **settings})
    head.open(WIDTH, labels, seed=3)
    return head


def head_of(f, y, ids, kind=LDAHead, labels=LABELS, batch=10**9, **settings):
    head = opened(kind, labels, **settings)
    for i in range(0, len(y), batch):
        head.observe(f[i : i + batch], y[i : i + batch], ids[i : i + batch])
    return head
