"""Geometry of the updates of tasks: where they collide, how their subspaces overlap, how large and how sparse they are.

An update is a dense dW (d_out x d_in) or its LoRA factors (B, A, s) in peft layout, B (d_out x r), A (r x d_in),
dW = s B A; s is part of dW everywhere. Products are made in chunks of rows, so that no more than one chunk of any dW
exists at a time. No published values can be matched: the papers name neither threshold nor form (see each docstring),
so `geometry_lines` prints a figure of ours with what it is of, its formula and its tolerance.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..core.errors import ConfigError

CHUNK = 1 << 20  # entries of dW that exist at a time

GEOMETRY_FORMULAS: dict[str, str] = {
    "collision_rate": "#{(a, b): |dW_i[a, b]| > tolerance and |dW_j[a, b]| > tolerance} / (d_out d_in), dW = s B A",
    "average_collision_rate": "ACR = 2/(T(T-1)) sum over i < j of collision_rate(dW_i, dW_j)",
    "subspace_overlap": "OO = sum over i < t of ||A_i A_t^T||_F^2, s not included",
    "awom": "||A_1 A_2^T||_F, s not included",
    "nuclear_norm": "sum of the singular values of dW = s B A",
    "zero_share": "#{(a, b): dW[a, b] = 0} / (d_out d_in), dW = s B A",
    "above_share": "#{(a, b): |dW[a, b]| > relative * max |dW|} / (d_out d_in), dW = s B A",
}

RELATIVE = 0.01  # entries of dW above this share of the largest count as large

# What a run's figures are: of which updates, and pooled, summed or averaged over what; see `Result.geometry`.
GEOMETRY_LABELS: dict[str, str] = {
    "average_collision_rate": "share of entries where the updates of two tasks collide, mean over pairs of tasks, "
    "all layers pooled",
    "subspace_overlap": "squared overlap of the last task's A with the A of every earlier task, sum over layers",
    "awom": "norm of the product of all earlier A, stacked as A_1, with the last task's A_2, sum over layers",
    "nuclear_norm": "nuclear norm of the update of one task in one layer, mean over tasks and layers",
    "zero_share": "share of entries of the last task's update that are exactly 0, mean over layers",
    "above_share": f"share of entries of the last task's update above relative = {RELATIVE:g} of the largest in their "
    "layer, mean over layers",
}


def geometry_lines(found: Mapping[str, float | None], tolerance: float) -> list[str]:
    """A run's geometry as text: name, value, what the value is, formula; a tolerance where the figure has one.

    Args:
        found: see `Result.geometry`.
        tolerance: what `found` was computed with.
    """
    lines = []
    for name, value in found.items():
        figure = "undefined (fewer than two tasks)" if value is None else f"{value:.4g}"
        with_tolerance = f", tolerance {tolerance:g}" if "tolerance" in _formula(name) else ""
        lines.append(f"{name} {figure}: {GEOMETRY_LABELS[name]} [{_formula(name)}{with_tolerance}]")
    return lines


def _formula(name: str) -> str:
    """With that of the collision of one pair, which the average is over."""
    pair = f"; collision_rate = {GEOMETRY_FORMULAS['collision_rate']}" if name == "average_collision_rate" else ""
    return GEOMETRY_FORMULAS[name] + pair


class Factors(NamedTuple):
    """dW = scaling B A; a plain (B, A, scaling) tuple does as well."""

    B: Tensor
    A: Tensor
    scaling: float = 1.0


Update = Tensor | tuple[Tensor, Tensor, float] | Factors


class Sparsity(NamedTuple):
    """Shares of the entries of dW: exactly zero, and above `relative` times the largest magnitude."""

    zero_share: float
    above_share: float
    largest: float
    relative: float


def _shape(update: Update) -> tuple[int, int]:
    if isinstance(update, Tensor):
        shape = tuple(update.shape)
    else:
        B, A, _ = update
        if B.ndim != 2 or A.ndim != 2 or B.shape[1] != A.shape[0]:
            raise ConfigError(
                f"B {tuple(B.shape)} and A {tuple(A.shape)} have no product: give (d_out x r), (r x d_in)"
            )
        shape = (B.shape[0], A.shape[1])
    if len(shape) != 2 or 0 in shape:
        raise ConfigError(f"an update must be a matrix with entries, got shape {shape}")
    return shape


def _rows(update: Update, rows: slice) -> Tensor:
    """These rows of dW; half-precision factors are multiplied in fp32."""
    if isinstance(update, Tensor):
        return update.detach()[rows]
    B, A, scaling = update
    dtype = torch.promote_types(B.dtype, torch.float32)
    return scaling * (B.detach()[rows].to(dtype) @ A.detach().to(dtype))


def _blocks(shape: tuple[int, int], chunk: int) -> Iterator[slice]:
    step = max(1, chunk // shape[1])
    return (slice(start, start + step) for start in range(0, shape[0], step))


def _collisions(updates: Sequence[Update], tolerance: float, chunk: int) -> tuple[int, int]:
    """(colliding entries summed over all pairs of updates, entries), for updates of one layer.

    c updates above the tolerance at one entry are c(c-1)/2 colliding pairs: one pass, whatever the number of tasks.
    """
    if math.isnan(tolerance) or tolerance < 0:
        raise ConfigError(f"tolerance must be 0 or more, got {tolerance}: an entry collides where |dW| > tolerance")
    shapes = {_shape(u) for u in updates}
    if len(shapes) > 1:
        raise ConfigError(f"updates of one layer must have one shape, got {sorted(shapes)}")
    (shape,) = shapes
    pairs = 0
    for rows in _blocks(shape, chunk):
        above = sum((_rows(u, rows).abs() > tolerance).int() for u in updates)
        assert isinstance(above, Tensor)
        pairs += int((above * (above - 1)).sum()) // 2
    return pairs, shape[0] * shape[1]


def collision_rate(dW_i: Tensor, dW_j: Tensor, tolerance: float) -> float:
    """CR_ij = #{(a, b): |dW_i[a, b]| > tol and |dW_j[a, b]| > tol} / (d_out d_in).

    N-LoRA (2410.10179), in the pairwise form that secondary sources agree on; the paper's threshold is unknown, and a
    dense B A has no exact zeros, so the tolerance has no default.

    Raises:
        ConfigError: shapes that differ, or a negative tolerance.
    """
    pairs, entries = _collisions((dW_i, dW_j), tolerance, CHUNK)
    return pairs / entries


def collision_rate_factors(first: Update, second: Update, tolerance: float, *, chunk: int = CHUNK) -> float:
    """`collision_rate` of factors (B, A, s), never holding more than `chunk` entries (at least one row) of a dW."""
    pairs, entries = _collisions((first, second), tolerance, chunk)
    return pairs / entries


def average_collision_rate(updates: Sequence[Update], tolerance: float, *, chunk: int = CHUNK) -> float | None:
    """ACR_T = 2/(T(T-1)) sum over i < j of CR_ij, of the T updates of one layer; None for fewer than two.

    Raises:
        ConfigError: shapes that differ, or a negative tolerance.
    """
    return pooled_collision_rate([updates], tolerance, chunk=chunk)


def pooled_collision_rate(layers: Iterable[Sequence[Update]], tolerance: float, *, chunk: int = CHUNK) -> float | None:
    """ACR_T of a whole model: the share of all entries of all layers, so that large layers count for more.

    Args:
        layers: for every layer the updates of its T tasks; an iterator may make them one layer at a time.

    Returns:
        None where there is no layer, or fewer than two tasks.

    Raises:
        ConfigError: layers with different numbers of tasks, or as in `collision_rate`.
    """
    collided, entries, tasks = 0, 0, set()
    for updates in layers:
        tasks.add(len(updates))
        if len(updates) > 1:
            found, size = _collisions(updates, tolerance, chunk)
            collided, entries = collided + found, entries + size
    if len(tasks) > 1:
        raise ConfigError(f"every layer must have an update of every task, got {sorted(tasks)} updates")
    T = max(tasks, default=0)
    return 2 * collided / (T * (T - 1) * entries) if T > 1 else None


def _wide(x: Tensor) -> Tensor:
    """fp64 where the device has it."""
    return x.detach().to(torch.float32 if x.device.type == "mps" else torch.float64)


def subspace_overlap(A_past: Tensor | Sequence[Tensor], A_t: Tensor) -> float:
    """OO = sum over i < t of ||A_i A_t^T||_F^2, for A_i (r_i x d_in) and A_t (r x d_in); 0.0 without a past.

    The form is not confirmed by the paper: squared, on A, not averaged over layers, s not included (2410.10179,
    secondary). In peft layout the rows of A span the subspace, so the sources' A_i^T A_t is A_i A_t^T here.

    Args:
        A_past: all earlier A, as a list or concatenated by rows.
    """
    past = [A_past] if isinstance(A_past, Tensor) else A_past
    return sum(float((_wide(A_i) @ _wide(A_t).T).square().sum()) for A_i in past)


def awom(A_1: Tensor, A_2: Tensor) -> float:
    """AWOM = ||A_1 A_2^T||_F for A_1 (m x d), A_2 (n x d): 0 where all rows are orthogonal.

    SHiRA (2406.13175) takes the l2 norm of A_1^T A_2 of two adapter updates, read here as the norm of all entries; for
    LoRA in peft layout that is A_1 A_2^T of the two `lora_A`. For whole updates pass their transposes.
    """
    return float(torch.linalg.matrix_norm(_wide(A_1) @ _wide(A_2).T))


def nuclear_norm(B: Tensor, A: Tensor, scaling: float) -> float:
    """||s B A||_*, the sum of singular values, for B (d_out x r), A (r x d_in).

    With B = Q_B R_B and A^T = Q_A R_A the singular values of B A are those of R_B R_A^T (r x r): B A is never formed.
    The mean of it over layers is what N-LoRA's figure calls subspaces per task.
    """
    _shape((B, A, scaling))
    R_B = torch.linalg.qr(_wide(B), mode="r").R
    R_A = torch.linalg.qr(_wide(A).T, mode="r").R
    return abs(scaling) * float(torch.linalg.svdvals(R_B @ R_A.T).sum())


def sparsity(dW: Update, *, relative: float = RELATIVE, chunk: int = CHUNK) -> Sparsity:
    """Share of entries that are exactly 0, and share with |dW| > relative * max |dW| (0 for an empty update).

    Args:
        dW: dense, or factors (B, A, s), whose product is made twice, in chunks.
    """
    shape = _shape(dW)
    largest = max(float(_rows(dW, rows).abs().max()) for rows in _blocks(shape, chunk))
    zero = above = 0
    for rows in _blocks(shape, chunk):
        part = _rows(dW, rows).abs()
        zero += int((part == 0).sum())
        above += int((part > relative * largest).sum())
    entries = shape[0] * shape[1]
    return Sparsity(zero / entries, above / entries, largest, relative)
