"""Makes tests/data/made_before: small run directories, and what was found in them, read by test_runs_made_before.py.

They were made by perpetune 0.1.0 (commit 3ef9ffd), before its modules moved, and show that later code still opens what
earlier code has written. So they are NOT to be made again by later code: this script is kept to say how they came
about, and refuses to touch a folder that is there.

    OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 python tests/data/make_runs.py

In the folder:
    models/    random models of a few thousand weights with their tokenizers
    streams/   three tasks of two classes each: texts, prompts with answers, images
    learned/   run directories. Each has learned the first two tasks, except `joint` (all at once), and `sotu_reverted`
               (the first of the two was taken out again)
    expected/  for each run expected.json, and the files of the commits that learning the third task (`resumed`) and
               taking out the first (`reverted`) have added to it

Paths in the runs are relative to the folder. Clock times, and what the machine was, are as they came.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import random
import re
import shutil
import string
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).resolve().parent / "made_before"
TASKS = ["films", "news", "mood"]
WORDS = {
    "films": {"film": ["movie", "film"], "music": ["band", "song"]},
    "news": {"sport": ["team", "game"], "business": ["market", "bank"]},
    "mood": {"happy": ["great", "good"], "sad": ["bad", "awful"]},
}
COLOURS = {
    "films": {"red": (220, 20, 20), "green": (20, 220, 20)},
    "news": {"blue": (20, 20, 220), "yellow": (220, 220, 20)},
    "mood": {"white": (235, 235, 235), "black": (15, 15, 15)},
}
QUICK = {
    "num_train_epochs": 3,
    "per_device_train_batch_size": 16,
    "learning_rate": 2e-3,
    "head_learning_rate": 5e-2,
}
FAST = {**QUICK, "learning_rate": 1e-2}
ANSWERS = {"num_train_epochs": 6, "per_device_train_batch_size": 8, "learning_rate": 1e-2}
RIDGE = {"type": "ridge", "features": 16}
ROUTED = {  # the recipe of this name, with fewer random features than it can be given
    "name": "routed",
    "tuner": {"type": "LoraConfig", "r": 2, "lora_alpha": 8, "target_modules": ["query", "value"]},
    "consolidation": {
        "type": "PerTask",
        "router": {"type": "PooledRouter", "features": 16},
        "candidates": 3,
        "prior": 0.5,
    },
}

# name -> (model, stream, recipe, heads, training)
RUNS: dict[str, tuple[str | None, str, Any, list[Any] | None, dict[str, Any]]] = {
    "lora": ("bert", "words", {"name": "lora", "rank": 2}, ["linear", "ncm", RIDGE, "label_text"], QUICK),
    "sequential_lora": (
        "bert",
        "words",
        {"name": "sequential_lora", "rank": 2},
        ["linear_seen", "ncm_refresh", {**RIDGE, "type": "ridge_refresh"}],
        QUICK,
    ),
    "olora_released": ("bert", "words", {"name": "olora_released", "rank": 2}, None, QUICK),  # Stack
    "sotu": ("bert", "words", "sotu", None, QUICK),  # SparseSum
    "sotu_disjoint": ("bert", "words", "sotu_disjoint", ["linear", "ncm"], QUICK),
    "sotu_reverted": ("bert", "words", {"name": "sotu", "storage": "int8", "keep": 0.5}, ["ncm_refresh"], QUICK),
    "color": ("bert", "words", {"name": "color", "rank": 2, "centres": 2}, None, FAST),  # PerTask
    "routed": ("bert", "words", ROUTED, None, FAST),  # PerTask, several candidates
    "replay": ("bert", "words", {"name": "replay", "rank": 2, "per_class": 2}, None, QUICK),
    "joint": ("bert", "words", {"name": "joint", "rank": 2}, None, QUICK),
    "pegp_lora_fresh": ("bert", "words", {"name": "pegp_lora_fresh", "rank": 2, "energy": 0.9}, None, QUICK),
    "pegp_adapter": ("bert", "words", {"name": "pegp_adapter", "bottleneck": 4, "energy": 0.9}, None, QUICK),
    "pegp_prompt": ("bert", "words", {"name": "pegp_prompt", "tokens": 2, "energy": 0.9}, None, QUICK),
    "pegp_prefix": ("bert", "words", {"name": "pegp_prefix", "tokens": 2, "energy": 0.9}, None, QUICK),
    "pegp_bias": ("bert", "words", "pegp_bias", None, QUICK),
    "child_tuning_d": ("bert", "words", "child_tuning_d", None, QUICK),
    "child_tuning_f": ("bert", "words", "child_tuning_f", None, QUICK),
    "oft": ("bert", "words", {"name": "oft", "block_size": 4}, None, QUICK),
    "goft": ("bert", "words", "goft", None, QUICK),
    "frozen_ridge": ("bert", "words", {"name": "frozen_ridge", "features": 16}, None, {}),
    "tfidf_ridge": (None, "words", {"name": "tfidf_ridge", "words": 32}, None, {}),
    "images_lora": ("vit", "images", {"name": "lora", "rank": 2}, None, QUICK),
    "language_lora": ("llama", "prompts", {"name": "lora", "rank": 4}, ["language"], ANSWERS),
    "language_generated": (
        "t5",
        "prompts",
        "sequential",
        [{"type": "language_generated", "longest": 6}, "language"],
        {**ANSWERS, "num_train_epochs": 10},
    ),
}


def main() -> None:
    if HERE.exists():
        raise SystemExit(f"{HERE} is there, and is not to be made again")
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    sys.path.insert(0, str(HERE.parents[2] / "src"))
    HERE.mkdir()
    os.chdir(HERE)  # so that what is written down holds relative paths
    make_models()
    make_streams()
    for name in RUNS:
        make_run(name)


# ---- models ----


def make_models() -> None:
    import transformers

    bert = wordpiece(Path("models/bert"))
    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    save(
        transformers.BertModel,
        transformers.BertConfig(
            vocab_size=bert,
            **small,
            max_position_embeddings=24,
            initializer_range=0.2,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        ),
        "bert",
    )
    save(
        transformers.ViTModel,
        transformers.ViTConfig(image_size=8, patch_size=4, num_channels=3, **small, initializer_range=0.2),
        "vit",
    )
    processor = {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": 8, "width": 8},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
    }
    Path("models/vit/preprocessor_config.json").write_text(json.dumps(processor, indent=1))
    pieces = byte_pairs(Path("models/llama"), "<s> $A")
    marks = {"bos_token_id": 3, "eos_token_id": 1, "pad_token_id": 0}
    llama = transformers.LlamaConfig(
        vocab_size=pieces,
        **small,
        num_key_value_heads=2,
        **marks,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        initializer_range=0.2,
    )
    save(transformers.LlamaForCausalLM, llama, "llama")
    pieces = byte_pairs(Path("models/t5"), "$A </s>")
    t5 = transformers.T5Config(
        vocab_size=pieces,
        d_model=16,
        d_kv=8,
        d_ff=32,
        num_layers=1,
        num_heads=2,
        dropout_rate=0.0,
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=1,
    )
    save(transformers.T5ForConditionalGeneration, t5, "t5")


def save(kind: Any, config: Any, name: str) -> None:
    torch.manual_seed(0)
    kind(config).save_pretrained(Path("models") / name)


def words() -> list[str]:
    return sorted({w for labels in WORDS.values() for label, own in labels.items() for w in (label, *own)}) + ["the"]


def wordpiece(folder: Path) -> int:
    """Write a tokenizer of the words and single characters; how many pieces it has."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    letters = string.ascii_lowercase + string.digits
    pieces = dict.fromkeys([*special, *letters, *("##" + c for c in letters), *words()])
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"])],
    )
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), special, strict=True))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=24, **names).save_pretrained(folder)
    return len(vocabulary)


def byte_pairs(folder: Path, adds: str) -> int:
    """Write a tokenizer like LLaMA's or T5's; how many pieces it has."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "</s>", "<unk>", "<s>"]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    alphabet = ["\u2581", "\n", " ", "?", ":", ".", *string.ascii_letters, *string.digits]
    trainer = trainers.BpeTrainer(
        vocab_size=160, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([f"{word} {word}" for word in (*words(), "What is it") for _ in range(9)], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=adds, special_tokens=[(name, special.index(name)) for name in ("<s>", "</s>")]
    )
    names = dict(zip(("pad_token", "eos_token", "unk_token", "bos_token"), special, strict=True))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    return tokenizer.get_vocab_size()


# ---- streams ----


def make_streams() -> None:
    from PIL import Image

    drawn = random.Random(0)
    for task, labels in WORDS.items():
        for split, many, few in (("train", 32, 12), ("test", 6, 6)):  # routers want more texts, models fewer answers
            rows = [
                (" ".join(drawn.choices([*own, "the"], k=5)) + f" {split[:2]}{i}", label)
                for label, own in labels.items()
                for i in range(many)
            ]
            write("words", task, split, [{"text": text, "label": label} for text, label in rows])
            asked = [{"prompt": f"What is it? {text}:", "response": label} for text, label in rows]
            write("prompts", task, split, asked[:few] + asked[many : many + few])
    for task, colours in COLOURS.items():
        for label, colour in colours.items():
            for split, count in (("train", 6), ("test", 3)):
                folder = Path("streams/images") / task / split / label
                folder.mkdir(parents=True)
                for i in range(count):
                    pixels = [tuple(max(0, c + drawn.randint(-40, 20)) % 256 for c in colour) for _ in range(64)]
                    image = Image.new("RGB", (8, 8))
                    image.putdata(pixels)
                    image.save(folder / f"{i}.png")


def write(stream: str, task: str, split: str, rows: list[dict[str, str]]) -> None:
    folder = Path("streams") / stream / task
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


# ---- runs, and what is found in them ----


def make_run(name: str) -> None:
    import perpetune as pt

    model, stream, recipe, heads, training = RUNS[name]
    model = None if model is None else f"models/{model}"
    source, path, notes = Path("streams") / stream, Path("learned") / name, Path("expected") / name
    joint = name == "joint"
    learner = pt.Learner(model, recipe, path, heads=heads, training=training)
    learner.learn(pt.load_stream(source, tasks=TASKS if joint else TASKS[:2], scenario="class"))
    if name.endswith("_reverted"):
        learner = pt.Learner.open(path, model=model)
        learner.revert(pt.load_stream(source, tasks=TASKS[1:2], scenario="class"), TASKS[0])
    relative(path)
    notes.mkdir(parents=True)
    expected: dict[str, Any] = {"model": model, "stream": str(source), "cpu": cpu()}
    expected["found"] = {**found(path, model), "exported": exported(pt.Learner.open(path, model=model))}
    with tempfile.TemporaryDirectory() as aside:
        if not joint:
            copy = Path(shutil.copytree(path, Path(aside) / "resumed" / name))
            pt.Learner.open(copy, model=model).learn(pt.load_stream(source, tasks=TASKS, scenario="class"))
            expected["resumed"] = {**found(copy, model), "commit": newest(copy, notes / "resumed")}
        copy = Path(shutil.copytree(path, Path(aside) / "reverted" / name))
        out, *left = pt.Result(path).tasks
        try:
            if left:
                pt.Learner.open(copy, model=model).revert(pt.load_stream(source, tasks=left, scenario="class"), out)
                expected["reverted"] = {"task": out, **found(copy, model), "commit": newest(copy, notes / "reverted")}
        except pt.ConfigError:
            expected["refused"] = out
    (path / ".lock").unlink()
    text = json.dumps(expected, indent=1, sort_keys=True, allow_nan=False)
    text = re.sub(r"\[[^\[\]{}]*\]", lambda flat: re.sub(r"\n *", " ", flat[0]), text)  # a list of values: one line
    assert json.loads(text) == expected
    (notes / "expected.json").write_text(text + "\n")
    figures = expected.get("resumed", expected["found"])["records"][0]
    print(f"{name}: {figures['final_accuracy']:.2f}, forgetting {figures['forgetting']}", flush=True)


def relative(path: Path) -> None:
    """Leave no path of this machine in a run."""
    for file in (path / "run.yaml", path / "journal.jsonl"):
        file.write_text(file.read_text().replace(f"{HERE}/", "").replace(f"{HERE.parents[2]}/", ""))


def newest(run: Path, to: Path) -> str:
    """Keep the files of the newest commit; its name."""
    commit = sorted((run / "commits").iterdir())[-1]
    shutil.copytree(commit, to)
    return commit.name


def cpu() -> dict[str, str]:
    """What, beside the versions in run.yaml, bits depend on."""
    described = Path("/proc/cpuinfo")
    lines = described.read_text().splitlines() if described.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.split("\t")[0] in ("model name", "model")]
    return {
        "machine": platform.machine(),
        "processor": ", ".join(dict.fromkeys(names)) or platform.processor(),
        "capability": torch.backends.cpu.get_cpu_capability(),
    }


def found(run: Path, model: str | None) -> dict[str, Any]:
    """What the public interface says of a run."""
    import perpetune as pt

    result, learner = pt.Result(run), pt.Learner.open(run, model=model)
    asked = inputs(result.config["stream"]["name"])
    left_out = {"run", "formulas", "guarantees", "per_task", "train_seconds", "evaluate_seconds"}
    return {
        "tasks": list(result.tasks),
        "reverted": list(result.reverted),
        "records": [json.loads(record.model_dump_json(exclude=left_out)) for record in result.records()],
        "guarantees": [promise(measured) for measured in result.guarantees],
        "predicted": [{"asked": options, "said": learner.predict(asked, **options)} for options in questions(result)],
    }


NAMED = 4  # parts of a promise that are no figures


EARLIER = {"DeltaMerge": "SparseSum"}  # what pieces were called when the runs were made


def promise(measured: dict[str, Any]) -> list[Any]:
    """A guarantee without the words that explain it."""
    named = {**measured, "source": EARLIER.get(measured["source"], measured["source"])}
    return [named[key] for key in ("task", "source", "name", "unit", "bound", "holds", "value")]


def questions(result: Any) -> Iterator[dict[str, Any]]:
    """Options of `Learner.predict`: every head, the classes of every task, and of a model with a state for each task
    every task."""
    heads = list(dict.fromkeys(head for head, _ in result.readings))
    yield {}
    yield from ({"head": head} for head in heads if len(heads) > 1)
    named = COLOURS if result.config["stream"]["inputs"] == ["image"] else WORDS
    yield from ({"classes": list(named[task])} for task in result.tasks)
    if result.routing() is not None:
        yield from ({"task": task} for task in result.tasks)


def inputs(stream: str) -> list[Any]:
    """Test inputs of all tasks; what no run has learned is among them, too."""
    from PIL import Image

    if stream == "images":
        files = sorted((HERE / "streams/images").glob("*/test/*/[01].png"))
        return [Image.open(file).convert("RGB") for file in files]
    folders = [HERE / "streams" / stream / task for task in TASKS]
    rows = [json.loads(line) for folder in folders for line in (folder / "test.jsonl").read_text().splitlines()]
    return [row["prompt" if stream == "prompts" else "text"] for row in rows[::4]]


def exported(learner: Any) -> dict[str, Any]:
    """Digest and size of the exported weights: as they are, and without the last task where that is possible."""
    from safetensors.torch import load_file

    import perpetune as pt

    out, last = {}, pt.Result(learner.path).tasks[-1]
    for key, options in (("whole", {}), ("without", {"without": [last]})):
        with tempfile.TemporaryDirectory() as aside:
            try:
                tensors = load_file(learner.export(Path(aside) / "model", head=False, **options) / "model.safetensors")
            except pt.ConfigError:
                continue
        digest = hashlib.sha256()
        for name, tensor in sorted(tensors.items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.contiguous().numpy().tobytes())
        norm = sum(tensor.double().square().sum().item() for tensor in tensors.values()) ** 0.5
        out[key] = {"sha256": digest.hexdigest(), "tensors": len(tensors), "norm": norm}
    return out


if __name__ == "__main__":
    main()
