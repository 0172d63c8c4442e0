"""What one writes with transformers and peft (and TRL, for `sft`) alone: the other side of `whole_run`."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

HEAD_RATE = 1e-2
LONGEST = 50  # tokens of a generated answer
CLASSES = 4  # of a task of the encoder
SPREAD = 0.02  # standard deviation of the first weights of a class, as of perpetune


def read_stream(folder: str) -> list[tuple[str, dict[str, list[dict[str, Any]]]]]:
    splits = ("train", "test")
    return [
        (place.name, {s: [json.loads(line) for line in (place / f"{s}.jsonl").open(encoding="utf-8")] for s in splits})
        for place in sorted(Path(folder).iterdir())
    ]


def plain_peft(settings: dict[str, Any], side: str) -> None:
    """The whole script: model, data, and a LoRA for each task, merged afterwards."""
    import peft
    from transformers import set_seed

    model: Any = (Speaker if settings["kind"] == "language" else Classifier)(settings)
    tasks = read_stream(settings["stream"])
    targets = ["q_proj", "v_proj"] if settings["kind"] == "language" else ["query", "value"]
    lora = peft.LoraConfig(r=8, lora_alpha=32, target_modules=targets, lora_dropout=0.0)
    if settings["evaluated"]:
        model.untouched([data["test"] for _, data in tasks])
    for index, (name, data) in enumerate(tasks):
        if settings["evaluated"] and index:
            model.before(data["test"])
        seed = int.from_bytes(hashlib.sha256(f"0/{name}".encode()).digest()[:4], "little") >> 1
        set_seed(seed)
        model.base = peft.get_peft_model(model.base, lora)
        set_seed(seed)
        model.train(data["train"], side, seed, Path(settings["out"]) / "trainer")
        model.base.save_pretrained(Path(settings["out"]) / name)
        model.base = model.base.merge_and_unload()
        if settings["evaluated"]:
            model.after([data["test"] for _, data in tasks[: index + 1]])


def arguments(kind: Any, settings: dict[str, Any], folder: Path, seed: int, **more: Any) -> Any:
    own = {k: v for k, v in settings["training"].items() if k != "head_learning_rate"}
    return kind(
        str(folder), seed=seed, save_strategy="no", report_to="none", disable_tqdm=True, use_cpu=True,
        remove_unused_columns=False, dataloader_pin_memory=False, **own, **more,
    )  # fmt: skip


class Speaker:
    """A language model that learns to answer."""

    def __init__(self, settings: dict[str, Any]) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.settings = settings
        self.base: Any = AutoModelForCausalLM.from_pretrained(settings["model"], dtype="float32")
        self.tokenizer = AutoTokenizer.from_pretrained(settings["model"])
        self.end = self.tokenizer.convert_tokens_to_ids(settings["end"])

    def rows(self, data: list[dict[str, Any]]) -> list[dict[str, Any]]:
        found = []
        for row in data:
            *asked, said = row["messages"]
            text = self.tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
            prompt = self.tokenizer(text, add_special_tokens=False)["input_ids"]
            answer = [*self.tokenizer(said["content"], add_special_tokens=False)["input_ids"], self.end]
            found.append({"prompt": prompt, "input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer})
        return found

    def padded(self, rows: list[dict[str, Any]], key: str = "input_ids") -> dict[str, Any]:
        from torch import tensor
        from torch.nn.utils.rnn import pad_sequence

        ids = [tensor(row[key]) for row in rows]
        left = {"batch_first": True, "padding_side": "left"}
        found = {"input_ids": pad_sequence(ids, padding_value=self.end, **left)}
        found["attention_mask"] = pad_sequence([x.new_ones(len(x)) for x in ids], **left)
        if key == "input_ids":
            found["labels"] = pad_sequence([tensor(row["labels"]) for row in rows], padding_value=-100, **left)
        return found

    def train(self, data: list[dict[str, Any]], side: str, seed: int, folder: Path) -> None:
        import datasets
        from transformers import Trainer, TrainingArguments

        rows = self.rows(data)
        if side == "peft":
            given = arguments(TrainingArguments, self.settings, folder, seed)
            Trainer(self.base, given, self.padded, rows).train()
            return
        from trl import SFTConfig, SFTTrainer

        known = datasets.Dataset.from_list([{k: row[k] for k in ("input_ids", "labels")} for row in rows])
        given = arguments(SFTConfig, self.settings, folder, seed, max_length=None, gradient_checkpointing=False)
        SFTTrainer(self.base, given, train_dataset=known, processing_class=self.tokenizer).train()

    def read(self, data: list[dict[str, Any]], losses: bool) -> None:
        import torch

        rows, size = self.rows(data), self.settings["evaluated"]
        self.base.eval()
        for start in range(0, len(rows), size):
            batch = rows[start : start + size]
            with torch.inference_mode():
                self.base.generate(
                    **self.padded(batch, "prompt"), max_new_tokens=LONGEST, do_sample=False, eos_token_id=self.end,
                    pad_token_id=self.end,
                )  # fmt: skip
                if losses:
                    self.base(**self.padded(batch))

    def untouched(self, tests: list[list[dict[str, Any]]]) -> None:
        for test in tests:
            self.read(test, losses=False)

    def before(self, test: list[dict[str, Any]]) -> None:
        self.read(test, losses=False)

    def after(self, tests: list[list[dict[str, Any]]]) -> None:
        for test in tests:
            self.read(test, losses=True)


class Classifier:
    """An encoder whose averaged states a linear layer reads, trained over the classes of the task."""

    def __init__(self, settings: dict[str, Any]) -> None:
        from transformers import AutoModel, AutoTokenizer

        self.settings = settings
        self.base: Any = AutoModel.from_pretrained(settings["model"], dtype="float32", add_pooling_layer=False)
        self.tokenizer = AutoTokenizer.from_pretrained(settings["model"])

    def padded(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        import torch

        inputs = [{k: row[k] for k in ("input_ids", "attention_mask")} for row in rows]
        known = self.tokenizer.pad(inputs, return_tensors="pt")
        return {**known, "labels": torch.tensor([row["label"] for row in rows])}

    def rows(self, data: list[dict[str, Any]]) -> list[dict[str, Any]]:
        texts = self.tokenizer([row["text"] for row in data], truncation=True, max_length=256)
        labels = [int(row["label"].split()[-1]) for row in data]
        columns = zip(texts["input_ids"], texts["attention_mask"], labels, strict=True)
        return [{"input_ids": ids, "attention_mask": mask, "label": y} for ids, mask, y in columns]

    def features(self, **inputs: Any) -> Any:
        states, mask = self.base(**inputs).last_hidden_state, inputs["attention_mask"][..., None]
        return (states * mask).sum(1) / mask.sum(1)

    def train(self, data: list[dict[str, Any]], side: str, seed: int, folder: Path) -> None:
        import torch
        from torch import nn
        from transformers import Trainer, TrainingArguments

        head = nn.Linear(self.base.config.hidden_size, CLASSES)
        with torch.no_grad():  # as perpetune begins, or the losses of the two could not be compared
            nn.init.zeros_(head.bias)
            for label in {row["label"] for row in data}:
                digest = hashlib.sha256(f"0:{label}".encode()).digest()
                generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
                row = torch.randn(head.in_features, generator=generator)
                head.weight[int(label.split()[-1])] = SPREAD * row

        class Whole(nn.Module):
            def __init__(whole) -> None:
                super().__init__()
                whole.base, whole.head = self.base, head

            def forward(whole, labels: Any, **inputs: Any) -> Any:
                return {"loss": nn.functional.cross_entropy(head(self.features(**inputs)), labels)}

        whole, decay = Whole(), self.settings["training"].get("weight_decay", 0.0)
        tuned = [p for p in self.base.parameters() if p.requires_grad]
        groups = [{"params": tuned}, {"params": head.parameters(), "lr": HEAD_RATE}]
        rate = self.settings["training"]["learning_rate"]
        optimizer = torch.optim.AdamW(groups, lr=rate, weight_decay=decay, fused=True)
        given = arguments(TrainingArguments, self.settings, folder, seed)
        Trainer(whole, given, self.padded, self.rows(data), optimizers=(optimizer, None)).train()

    def untouched(self, tests: list[list[dict[str, Any]]]) -> None:
        """It names no class yet."""

    def before(self, test: list[dict[str, Any]]) -> None:
        """It cannot name the classes of a task that it has not learned."""

    def after(self, tests: list[list[dict[str, Any]]]) -> None:
        import torch

        self.base.eval()
        for test in tests:
            rows, size = self.rows(test), self.settings["evaluated"]
            for start in range(0, len(rows), size):
                batch = self.padded(rows[start : start + size])
                with torch.inference_mode():
                    self.features(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
