"""Your own training loop on a language model, and a rule that keeps old answers: the loop stays as it is.

    python examples/attach_plain_loop.py                            # a tiny random LLaMA, some seconds
    python examples/attach_plain_loop.py --model Qwen/Qwen2.5-0.5B

Two tasks, each with a LoRA of its own that is merged afterwards. `pt.attach` hangs the rule on the optimizer, and after
a task the rule looks once at what was learned. What the layers computed of old prompts and answers then stays.
"""

from __future__ import annotations

import argparse
from typing import Any

import peft
import torch
from torch import Tensor

import perpetune as pt

TASKS = {
    "capitals": [("capital of France:", " Paris"), ("capital of Italy:", " Rome")],
    "colours": [("colour of snow:", " white"), ("colour of coal:", " black")],
}


def tiny_llama() -> tuple[Any, Any]:
    """A random decoder that reads bytes: a stand-in for a real model."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config), lambda text: list(text.encode())


def pretrained(name: str) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(name)
    return AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32), lambda text: tokenizer(text).input_ids


def batch(pairs: list[tuple[str, str]], encode: Any) -> dict[str, Tensor]:
    """Prompts and answers in one sequence each, padded on the right; labels are -100 on prompts and padding."""
    whole = [torch.tensor(encode(prompt + answer)) for prompt, answer in pairs]
    asked = [len(encode(prompt)) for prompt, _ in pairs]
    labels = [ids.masked_fill(torch.arange(len(ids)) < n, -100) for ids, n in zip(whole, asked, strict=True)]
    pad = torch.nn.utils.rnn.pad_sequence
    return {
        "input_ids": pad(whole, batch_first=True),
        "attention_mask": pad([torch.ones_like(ids) for ids in whole], batch_first=True),
        "labels": pad(labels, batch_first=True, padding_value=-100),
    }


def run(model: Any, encode: Any, steps: int = 40) -> dict[str, list[float]]:
    """Learn the tasks one after another; the loss of each after every task."""
    rule = pt.SubspaceProjection(energy=1.0, branch="fresh")
    losses: dict[str, list[float]] = {name: [] for name in TASKS}
    for index, pairs in enumerate(TASKS.values()):
        adapter = peft.LoraConfig(r=8, lora_alpha=32, target_modules=["q_proj", "v_proj"], init_lora_weights=True)
        tuned = peft.get_peft_model(model, adapter)
        optimizer = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], lr=5e-3)
        data = batch(pairs, encode)
        inputs = {name: data[name] for name in ("input_ids", "attention_mask")}

        attached = pt.attach(tuned, optimizer, [rule], index=index, batches=lambda inputs=inputs: [inputs])
        for _ in range(steps):
            optimizer.zero_grad()
            tuned(**data).loss.backward()
            optimizer.step()
        attached.remove()
        rule.end_task(pt.TaskContext(tuned, index, lambda inputs=inputs: [inputs]))

        model = tuned.merge_and_unload()
        with torch.no_grad():
            for name in TASKS:
                losses[name].append(float(model(**batch(TASKS[name], encode)).loss))
    return losses


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="hub id or folder of a decoder whose attention has q_proj and v_proj")
    chosen = parser.parse_args().model
    for task, found in run(*(pretrained(chosen) if chosen else tiny_llama())).items():
        print(task, "loss after each task:", ", ".join(f"{loss:.6f}" for loss in found))
