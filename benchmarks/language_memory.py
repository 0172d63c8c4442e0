"""Peak memory and losses of a language model, beside a plain peft script: fp32, bf16 and nf4, with and without
gradient checkpointing.

    python -m benchmarks.language_memory --model PATH/TO/model.gguf --out docs/results/language_memory.md

Both sides train the same LoRA from the same start on the same tokens in the same order, with the stock Trainer, each in
a process of its own. A GGUF file is written once as a plain folder, which both load. The peak is the largest resident
set of the process; perpetune's side is a whole run, which predicts before and after, and commits.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

PRECISIONS: dict[str, dict[str, str]] = {
    "fp32": {"dtype": "float32"},
    "bf16": {"dtype": "bfloat16"},
    "nf4": {"dtype": "bfloat16", "quantization": "nf4"},
}
RANK, ALPHA, RATE = 8, 16, 1e-3
MONTHS = ("January", "February", "March", "April", "May", "June", "July", "August", "September", "October")


def one(what: str, settings: dict[str, Any]) -> dict[str, Any]:
    if what == "folder":
        return folder(settings)
    if what == "examples":
        return examples(settings)
    return perpetune(settings) if what == "perpetune" else plain_peft(settings)


def folder(settings: dict[str, Any]) -> dict[str, Any]:
    """The model of a GGUF file as a plain transformers folder."""
    from perpetune.models.language_loading import load_language_model

    model = load_language_model(settings["model"])
    model.model.save_pretrained(settings["folder"])
    model.save_processors(settings["folder"])
    return {}


def examples(settings: dict[str, Any]) -> dict[str, Any]:
    """The training rows as perpetune tokenises them, for the plain script."""
    import perpetune as pt
    from perpetune.models.language_loading import load_language_model

    model = load_language_model(settings["folder"], max_length=settings["length"])
    model.open((), ("generate",))
    model.tokens.prefix = ""  # as a run chooses for a stream of prompts
    rows = pt.load_stream(settings["stream"], metric="exact_match").tasks[0].train
    found = [{"prompt": e["input_ids"], "answer": list(e["answer"])} for e in model.prepare(rows)]
    Path(settings["examples"]).write_text(json.dumps(found), encoding="utf-8")
    return {}


def training(settings: dict[str, Any]) -> dict[str, Any]:
    return {
        "max_steps": settings["steps"],
        "per_device_train_batch_size": settings["batch"],
        "per_device_eval_batch_size": 1,
        "learning_rate": RATE,
        "weight_decay": 0.0,
        "lr_scheduler_type": "constant",
        "gradient_checkpointing": settings["checkpointing"],
        "logging_steps": 1,
    }


def perpetune(settings: dict[str, Any]) -> dict[str, Any]:
    import perpetune as pt
    from perpetune.core.environment import peak_memory
    from perpetune.learning.loss_log import FILE

    recipe = {"name": "lora", "rank": RANK, "alpha": ALPHA}
    with tempfile.TemporaryDirectory() as out:
        heads = [{"type": "language_generated", "longest": 4}]  # what is generated is not what is measured here
        options = {"training": training(settings), "max_length": settings["length"], "device": "cpu", "heads": heads}
        learner = pt.Learner(settings["folder"], recipe, out, **options, **PRECISIONS[settings["precision"]])
        learner.learn(pt.load_stream(settings["stream"], metric="exact_match"))
        lines = (Path(out) / FILE).read_text(encoding="utf-8").splitlines()
        return {"peak": peak_memory(learner.device), "losses": [json.loads(line)["loss"] for line in lines]}


def plain_peft(settings: dict[str, Any]) -> dict[str, Any]:
    """What one writes with transformers and peft alone."""
    import hashlib
    import resource

    import peft
    import torch
    from torch.nn.utils.rnn import pad_sequence
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Trainer, TrainingArguments, set_seed

    given = PRECISIONS[settings["precision"]]
    dtype = getattr(torch, given["dtype"])
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
    )  # fmt: skip
    options = {"quantization_config": quantization} if "quantization" in given else {}
    model = AutoModelForCausalLM.from_pretrained(settings["folder"], dtype=dtype, **options)
    rows = json.loads(Path(settings["examples"]).read_text(encoding="utf-8"))
    seed = int.from_bytes(hashlib.sha256(b"0/task").digest()[:4], "little") >> 1
    set_seed(seed)
    model = peft.get_peft_model(
        model, peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["q_proj", "v_proj"], lora_dropout=0.0)
    )
    losses: list[float] = []

    def together(batch: list[dict[str, Any]]) -> dict[str, Any]:
        ids = [torch.tensor(row["prompt"] + row["answer"]) for row in batch]
        told = [torch.tensor([-100] * len(row["prompt"]) + row["answer"]) for row in batch]
        return {
            "input_ids": pad_sequence(ids, batch_first=True),
            "attention_mask": pad_sequence([torch.ones_like(x) for x in ids], batch_first=True),
            "labels": pad_sequence(told, batch_first=True, padding_value=-100),
        }

    class Noting(Trainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().compute_loss(*args, **kwargs)
            losses.append(float(loss.detach()))
            return loss

    own = {k: v for k, v in training(settings).items() if k != "per_device_eval_batch_size"}
    with tempfile.TemporaryDirectory() as out:
        arguments = TrainingArguments(
            out, save_strategy="no", report_to="none", remove_unused_columns=False, use_cpu=True, seed=seed,
            gradient_checkpointing_kwargs={"use_reentrant": False}, disable_tqdm=True, **own,
        )  # fmt: skip
        Noting(model=model, args=arguments, train_dataset=rows, data_collator=together).train()
    return {"peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, "losses": losses}


def measured(what: str, settings: dict[str, Any]) -> dict[str, Any]:
    """What one side says of itself, in a new process."""
    command = [sys.executable, "-m", "benchmarks.language_memory", "--one", what, json.dumps(settings)]
    found = subprocess.run(command, capture_output=True, text=True)
    if found.returncode:
        raise SystemExit(found.stderr)
    return json.loads(found.stdout.splitlines()[-1])


def write_stream(folder: Path, rows: int, words: int) -> None:
    """One task of free texts: a note of so many words, and what is to be said of it."""
    (folder / "task").mkdir(parents=True)
    for split, count in (("train", rows), ("test", 1)):
        lines = []
        for i in range(count):
            month, day = MONTHS[i % len(MONTHS)], 1 + 7 * i % 28
            note = f"The parcel was sent on the {day} of {month} and did not arrive. "
            prompt = " ".join((note * words).split()[:words]) + " When was it sent?"
            lines.append(json.dumps({"prompt": prompt, "response": f"On the {day} of {month}."}))
        (folder / "task" / f"{split}.jsonl").write_text("\n".join(lines), encoding="utf-8")


def page(found: list[dict[str, Any]], command: str, load: float) -> str:
    lines = [
        "# Memory of a language model, beside a plain peft script",
        "",
        "```",
        command,
        "```",
        "",
        "SmolLM2-135M-Instruct on two CPU cores: LoRA of rank 8 on queries and values, the same tokens in the same",
        "order, each side in a process of its own. Peak: the largest resident set of the process, from start to end;",
        "perpetune's side is a whole run, with predictions before and after and a commit. Losses of every step.",
        f"Load average of the machine at the end: {load:.0f}.",
        "",
        "| weights | checkpointing | peak, plain peft (MB) | perpetune (MB) | ratio | losses, plain peft | perpetune |",
        "| --- | --- | ---: | ---: | ---: | --- | --- |",
    ]
    for row in found:
        plain, ours = row["peft"], row["perpetune"]
        told = [" ".join(f"{x:.4f}" for x in side["losses"]) for side in (plain, ours)]
        ratio = ours["peak"] / plain["peak"]
        checkpointing = "yes" if row["checkpointing"] else "no"
        lines.append(
            f"| {row['precision']} | {checkpointing} | {plain['peak'] / 1e6:.0f} | {ours['peak'] / 1e6:.0f} | "
            f"{ratio:.3f} | {told[0]} | {told[1]} |"
        )
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--model", help="a GGUF file, or a folder")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--words", type=int, default=256, help="of a prompt")
    parser.add_argument("--precisions", default=",".join(PRECISIONS))
    parser.add_argument("--out", help="a page to write; else it is printed")
    given = parser.parse_args(arguments)
    if given.one:
        print(json.dumps(one(given.one[0], json.loads(given.one[1]))))
        return
    if not given.model:
        raise SystemExit("give --model: a GGUF file, or a folder")
    found = []
    with tempfile.TemporaryDirectory() as root:
        write_stream(Path(root) / "stream", 4 * given.batch, given.words)
        settings = {
            "model": given.model, "folder": f"{root}/model", "stream": f"{root}/stream", "length": 512,
            "examples": f"{root}/examples.json", "steps": given.steps, "batch": given.batch,
        }  # fmt: skip
        if Path(given.model).is_dir():
            settings["folder"] = given.model
        else:
            measured("folder", settings)
        measured("examples", settings)
        for precision in given.precisions.split(","):
            for checkpointing in (False, True):
                own = {**settings, "precision": precision, "checkpointing": checkpointing}
                row = {**own, **{what: measured(what, own) for what in ("peft", "perpetune")}}
                print(json.dumps(row), file=sys.stderr, flush=True)
                found.append(row)
    command = (
        f"python -m benchmarks.language_memory --model PATH/TO/{Path(given.model).name} --steps {given.steps} "
        f"--batch {given.batch} --words {given.words}"
    )
    text = page(found, command, os.getloadavg()[0])
    if given.out:
        Path(given.out).write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
