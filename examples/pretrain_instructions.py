"""Teach an encoder to answer: a small language model from a sentence encoder, in 17 minutes on one core.

python examples/pretrain_instructions.py --encoder PATH/TO/all-MiniLM-L6-v2 --stream PATH/TO/cl-benchmark --out answers

The encoder gets a decoder of two of its own layers, whose cross-attention starts as a copy of their self-attention, and
whose output embeddings are the encoder's words. Both are tuned on the instructions of some tasks; streams that are
learned afterwards must not have these (configs/language_minilm.yaml). The same bits come out for the same seed, on one
machine, with the same number of threads.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModel, AutoTokenizer, BertConfig, BertLMHeadModel, EncoderDecoderModel

import perpetune as pt
from perpetune.models.pretraining import progress_bar, versions
from perpetune.models.prompt_tokens import PromptTokenizer
from perpetune.streams.passage import mark, unmark

TASKS = ("amazon", "dbpedia", "imdb")
LAYERS = (2, 5)  # of the encoder, which the decoder starts from
ROWS, BATCH, LONGEST = 30_000, 12, 96  # rows read in all, rows a step, tokens of a prompt
FRESH, COPIED = 1e-3, 2e-4  # learning rates; with 5e-4 and 3e-4 amazon stayed at its majority

Row = tuple[str, str]  # prompt, answer


def build(encoder: str) -> EncoderDecoderModel:
    """The encoder, and a decoder made of some of its layers."""
    reader = AutoModel.from_pretrained(encoder, attn_implementation="eager")
    reader.config.hidden_dropout_prob = reader.config.attention_probs_dropout_prob = 0.0
    settings = {**reader.config.to_dict(), "is_decoder": True, "add_cross_attention": True}
    config = BertConfig(**{**settings, "num_hidden_layers": len(LAYERS)})
    writer = BertLMHeadModel._from_config(config, attn_implementation="eager")
    weights = {"cls.predictions.transform.dense.weight": torch.eye(config.hidden_size)}
    for name, value in reader.state_dict().items():
        layer = re.match(r"encoder\.layer\.(\d+)\.", name)
        if layer is None:
            weights[f"bert.{name}"] = value
        elif int(layer[1]) in LAYERS:
            own = f"bert.encoder.layer.{LAYERS.index(int(layer[1]))}.{name[layer.end() :]}"
            weights[own] = value
            if ".attention." in own:
                weights[own.replace(".attention.", ".crossattention.")] = value
    writer.load_state_dict(weights, strict=False)
    writer.tie_weights()
    return EncoderDecoderModel(encoder=reader, decoder=writer)


def instructions(stream: pt.Stream) -> list[Row]:
    return [(row["prompt"], stream.labels[row["label"]]) for task in stream for row in task.train]


def words(text: str) -> list[str]:
    return re.findall(r"[a-zA-Z]{4,}", text)


def puzzle(passages: list[str], draw: random.Random) -> Row:
    """A word is missing in a passage: which of two, four or eight?"""
    text = draw.choice(passages)
    missing = draw.choice(words(text))
    options = {missing: None}
    count = draw.choice([2, 4, 8])
    while len(options) < count:
        options[draw.choice(words(draw.choice(passages)))] = None
    shown = draw.sample(list(options), len(options))
    gap = mark(re.sub(rf"\b{missing}\b", "[MASK]", text))
    return f"Which word is missing in the following paragraph?\nOptions: {', '.join(shown)}\n{gap}\nAnswer:", missing


def rows(stream: pt.Stream, puzzles: float, draw: random.Random) -> Iterator[Row]:
    """Instructions, and so many puzzles for each."""
    asked = instructions(stream)
    found = [text[first:last][:600] for text, first, last in (unmark(prompt) for prompt, _ in asked)]
    passages = [text for text in found if words(text)]
    while True:
        for row in draw.sample(asked, len(asked)):
            yield row
            if draw.random() < puzzles:
                yield puzzle(passages, draw)


def batches(
    source: Iterator[Row], tokens: PromptTokenizer, draw: random.Random
) -> Iterator[tuple[list[Tensor], Tensor]]:
    """([prompts, mask, answers as they are fed to the decoder], answers), prompts of one length together."""
    while True:
        some = [next(source) for _ in range(BATCH * 20)]
        read = tokens.prompts([prompt for prompt, _ in some], LONGEST)
        pairs = [(torch.tensor(p.tokens), torch.tensor(tokens.answer(a))) for p, (_, a) in zip(read, some, strict=True)]
        pairs.sort(key=lambda pair: len(pair[0]))
        dealt = [pairs[first : first + BATCH] for first in range(0, len(pairs), BATCH)]
        for batch in draw.sample(dealt, len(dealt)):
            prompts = pad_sequence([p for p, _ in batch], True, tokens.pad)
            mask = pad_sequence([torch.ones_like(p) for p, _ in batch], True, 0)
            answers = pad_sequence([a for _, a in batch], True, -100)
            start = torch.full((len(batch), 1), tokens.tokenizer.cls_token_id)
            fed = torch.cat([start, answers[:, :-1].masked_fill(answers[:, :-1] < 0, tokens.pad)], 1)
            yield [prompts, mask, fed], answers


def teach(model: EncoderDecoderModel, source: Iterator[tuple[list[Tensor], Tensor]], steps: int) -> list[float]:
    """Mean losses per answer token, of a hundred steps each."""
    for part in (model.encoder.pooler, model.encoder.embeddings, model.decoder.bert.embeddings):
        part.requires_grad_(False)
    fresh = ("crossattention", "predictions")
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for n, p in named if any(f in n for f in fresh)], "lr": FRESH},
        {"params": [p for n, p in named if not any(f in n for f in fresh)], "lr": COPIED},
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, [FRESH, COPIED], steps, pct_start=0.05, cycle_momentum=False
    )
    losses = []
    model.train()
    with progress_bar("learning to answer", steps) as advance:
        for _ in range(steps):
            (prompts, mask, fed), answers = next(source)
            known = answers != -100
            with torch.autocast("cpu", torch.bfloat16):
                read = model.encoder(input_ids=prompts, attention_mask=mask).last_hidden_state
                written = model.decoder.bert(
                    input_ids=fed, encoder_hidden_states=read, encoder_attention_mask=mask
                ).last_hidden_state
                logits = model.decoder.cls(written[known])  # of the answers' own tokens alone
            loss = torch.nn.functional.cross_entropy(logits.float(), answers[known])
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_([p for _, p in named], 1.0)
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
            advance(1)
    return [sum(losses[i : i + 100]) / len(losses[i : i + 100]) for i in range(0, len(losses), 100)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", required=True, help="a BERT-like sentence encoder: hub id or folder")
    parser.add_argument("--stream", required=True, help="a folder of text tasks")
    parser.add_argument("--out", required=True, type=Path, help="a transformers folder is written; kept if it is there")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), help="those whose instructions are learned")
    parser.add_argument("--puzzles", type=float, default=0.0, help="for every instruction, so many missing words")
    parser.add_argument("--rows", type=int, default=ROWS, help="how much is read in all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    if (options.out / "pretraining.json").exists():
        print(f"{options.out} is there already")
        return
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    tokenizer = AutoTokenizer.from_pretrained(options.encoder)
    model = build(options.encoder)
    model.config.decoder_start_token_id = tokenizer.cls_token_id
    model.config.pad_token_id, model.config.eos_token_id = tokenizer.pad_token_id, tokenizer.sep_token_id
    stream = pt.load_stream(options.stream, tasks=options.tasks, pose="instruction")
    draw, tokens = random.Random(options.seed), PromptTokenizer(tokenizer, decoder=False)
    source = batches(rows(stream, options.puzzles, draw), tokens, draw)
    losses = teach(model, source, options.rows // BATCH)
    model.eval().save_pretrained(options.out)
    tokenizer.save_pretrained(options.out)
    facts = {
        "tasks": options.tasks,
        "puzzles": options.puzzles,
        "rows": options.rows,
        "seed": options.seed,
        "losses": losses,
        "versions": versions(),
    }
    (options.out / "pretraining.json").write_text(json.dumps(facts, indent=1) + "\n")
    print(f"loss per token {losses[0]:.2f} to {losses[-1]:.2f}: {options.out}")


if __name__ == "__main__":
    main()
