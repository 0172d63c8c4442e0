"""Rules in training loops that know nothing of them."""

from __future__ import annotations

import peft
import pytest
import torch
import transformers
from torch import nn

from perpetune.rules import OrthogonalToPast, ProductL1, TaskContext, attach, lora_pairs


@pytest.fixture(scope="module")
def tiny():
    """tiny(seed): a BERT of two small layers with a LoRA whose B is not 0."""

    def make(seed: int) -> peft.PeftModel:
        torch.manual_seed(seed)
        config = transformers.BertConfig(
            vocab_size=20, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
            max_position_embeddings=8, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        )  # fmt: skip
        model = transformers.BertForSequenceClassification(config)
        lora = peft.LoraConfig(r=2, target_modules=["query", "value", "dense"], task_type="SEQ_CLS")
        model = peft.get_peft_model(model, lora)
        for pair in lora_pairs(model):
            nn.init.normal_(pair.B, std=0.1)
        return model

    return make


def rules_with_a_past(tiny):
    rules = [ProductL1(1e-3), OrthogonalToPast(0.5)]
    for rule in rules:
        rule.begin_task(TaskContext(tiny(0), 0))
        rule.end_task(TaskContext(tiny(0), 0))
    return rules


def rows():
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 20, (16, 6), generator=generator)
    return [{"input_ids": x, "labels": x[0] % 2} for x in ids]


def test_plain_adamw_steps_as_with_the_penalty_in_the_loss(tiny):
    rules = rules_with_a_past(tiny)
    model, reference = tiny(1), tiny(1)
    past = {pair.name: pair.A.detach() for pair in lora_pairs(tiny(0))}
    optimizers = [torch.optim.AdamW([p for p in m.parameters() if p.requires_grad]) for m in (model, reference)]
    attached = attach(model, optimizers[0], rules, index=1)
    batch = {key: torch.stack([row[key] for row in rows()]) for key in ("input_ids", "labels")}
    for _ in range(3):
        for optimizer in optimizers:
            optimizer.zero_grad()
        model(**batch).loss.backward()
        penalty = sum(
            1e-3 * (pair.B @ pair.A).abs().sum() + 0.5 * (past[pair.name] @ pair.A.T).square().sum()
            for pair in lora_pairs(reference)
        )
        (reference(**batch).loss + penalty).backward()
        for optimizer in optimizers:
            optimizer.step()
    for a, b in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    attached.remove()


@pytest.mark.parametrize("accumulation", [1, 4])
def test_inside_transformers_trainer(tiny, tmp_path, accumulation):
    """One SGD step of the Trainer moves the factors by what the rules add, whatever the accumulation."""
    moved = {}
    for ruled in (False, True):
        model = tiny(1)
        before = {pair.name: (pair.A.detach().clone(), pair.B.detach().clone()) for pair in lora_pairs(model)}
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        rules = rules_with_a_past(tiny) if ruled else []
        attached = attach(model, optimizer, rules, index=1)
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path), per_device_train_batch_size=16 // accumulation, max_steps=1, report_to=[],
            gradient_accumulation_steps=accumulation, save_strategy="no", lr_scheduler_type="constant", use_cpu=True,
            disable_tqdm=True, max_grad_norm=0.0, logging_strategy="no",
        )  # fmt: skip
        transformers.Trainer(model=model, args=arguments, train_dataset=rows(), optimizers=(optimizer, None)).train()
        attached.remove()
        moved[ruled] = {
            pair.name: (pair.A.detach() - before[pair.name][0], pair.B.detach() - before[pair.name][1])
            for pair in lora_pairs(model)
        }
    past = {pair.name: pair.A.detach() for pair in lora_pairs(tiny(0))}
    for pair in lora_pairs(tiny(1)):
        value = 1e-3 * (pair.B @ pair.A).abs().sum() + 0.5 * (past[pair.name] @ pair.A.T).square().sum()
        for number, gradient in enumerate(torch.autograd.grad(value, [pair.A, pair.B])):
            added = moved[True][pair.name][number] - moved[False][pair.name][number]
            torch.testing.assert_close(added, -0.1 * gradient, rtol=1e-3, atol=1e-6)


def test_a_parameter_that_the_loss_does_not_reach_is_shaped_too(tiny):
    model = tiny(1)
    rule = ProductL1(1e-3)
    attach(model, torch.optim.SGD(model.parameters(), lr=0.1), [rule])
    rule.on_gradient()  # no backward at all
    assert all(p.grad is not None and p.grad.any() for pair in lora_pairs(model) for p in (pair.A, pair.B))


@pytest.mark.parametrize("how", ["positional", "keyword"])
def test_a_step_that_computes_its_own_gradients_is_shaped_too(tiny, how):
    """Lightning steps with a closure: the gradients exist only once it has run."""
    model, reference = tiny(1), tiny(1)
    batch = {key: torch.stack([row[key] for row in rows()]) for key in ("input_ids", "labels")}
    for m, closure in ((model, True), (reference, False)):
        optimizer = torch.optim.AdamW([p for p in m.parameters() if p.requires_grad])
        attach(m, optimizer, [ProductL1(1e-2)])

        def compute(m=m, optimizer=optimizer):
            optimizer.zero_grad()
            loss = m(**batch).loss
            loss.backward()
            return loss

        for _ in range(2):
            if not closure:
                compute()
                optimizer.step()
            elif how == "positional":
                optimizer.step(compute)
            else:
                optimizer.step(closure=compute)
    for p, q in zip(model.parameters(), reference.parameters(), strict=True):
        assert torch.equal(p, q)
