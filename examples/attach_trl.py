"""TRL's SFTTrainer as it is, with rules of perpetune on its optimizer: one callback, nothing is subclassed.

    pip install trl
    python examples/attach_trl.py --model Qwen/Qwen2.5-0.5B

The callback works in every trainer that is a `transformers.Trainer`.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor
from transformers import TrainerCallback

import perpetune as pt


class Attach(TrainerCallback):
    """Hangs rules on the trainer's optimizer when training begins, and lets them look at the task when it ends.

    Args:
        rules: the same objects for all tasks: they remember what the later ones must keep.
        index: 0-based number of the task.
    """

    def __init__(self, rules: Sequence[pt.Rule], index: int) -> None:
        self.rules, self.index = rules, index

    def on_train_begin(
        self, args: Any, state: Any, control: Any, *, model: Any, optimizer: Any, train_dataloader: Any, **kwargs: Any
    ) -> None:
        def batches() -> Iterator[dict[str, Tensor]]:
            for batch in train_dataloader:
                yield {name: batch[name] for name in ("input_ids", "attention_mask")}

        self.context = pt.TaskContext(model, self.index, batches)
        self.attached = pt.attach(model, optimizer, self.rules, index=self.index, batches=batches)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.attached.remove()
        for rule in self.rules:
            rule.end_task(self.context)


TASKS = {
    "capitals": [("The capital of France is", " Paris"), ("The capital of Italy is", " Rome")],
    "colours": [("The colour of snow is", " white"), ("The colour of coal is", " black")],
}


def main(name: str) -> None:
    import datasets
    import peft
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(name), AutoTokenizer.from_pretrained(name)
    rules = [pt.SubspaceProjection(energy=0.99, branch="fresh")]
    for index, (task, pairs) in enumerate(TASKS.items()):
        adapter = peft.LoraConfig(r=8, lora_alpha=32, target_modules=["q_proj", "v_proj"])
        tuned = peft.get_peft_model(model, adapter)
        trainer = SFTTrainer(
            model=tuned,
            args=SFTConfig(output_dir=f"runs/trl/{task}", num_train_epochs=20, learning_rate=5e-4, report_to="none"),
            train_dataset=datasets.Dataset.from_list([{"prompt": p, "completion": c} for p, c in pairs]),
            processing_class=tokenizer,
            callbacks=[Attach(rules, index)],
        )
        trainer.train()
        model = tuned.merge_and_unload()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="hub id or folder of a decoder")
    main(parser.parse_args().model)
