"""The toy of the gradient-projection sheet, section 3: what every form of projection is measured on."""

from __future__ import annotations

import math

import peft
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from perpetune.rules.base import Rule, TaskContext, attach

# ---- the toy of the sheet, section 3: a frozen residual network, LoRA on its layers or adapters beside them ----

WIDTH, HIDDEN, BOTTLENECK = 96, 192, 64


class Block(nn.Module):
    """h + W_2 act(W_1 LN(h)), and an adapter W_u act(W_d LN(h)) beside it where one is asked for."""

    def __init__(self, adapter: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)
        self.adapter = None
        if adapter:
            pair = nn.Linear(WIDTH, BOTTLENECK, bias=False), nn.Linear(BOTTLENECK, WIDTH, bias=False)
            nn.init.zeros_(pair[1].weight)
            self.adapter = nn.Sequential(pair[0], nn.GELU(), pair[1])

    def forward(self, h: Tensor) -> Tensor:
        x = self.norm(h)
        out = self.down(F.gelu(self.up(x)))
        return h + out if self.adapter is None else h + out + self.adapter(x)


class Network(nn.Module):
    def __init__(self, adapter: bool = False) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(adapter) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def network(tuner: str, dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = Network(tuner == "adapter")
    for name, p in model.named_parameters():
        p.requires_grad_(tuner == "all" or "adapter" in name)
    return lora(model.to(dtype)) if tuner == "lora" else model.to(dtype)


def lora(model: nn.Module) -> nn.Module:
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=["up", "down"])
    return peft.get_peft_model(model, config, autocast_adapter_dtype=False)


def data(rows: int, seed: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(rows, n, generator=generator, dtype=torch.float64).to(dtype) for n in (WIDTH, 8))
    return x, y


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


class Course:
    """Two tasks on one model: 48 old samples, then 256 new ones."""

    def __init__(self, tuner: str, dtype: torch.dtype = torch.float64, rule: Rule | None = None) -> None:
        self.dtype, self.rule = dtype, rule
        self.model = network(tuner, dtype)
        self.old, self.new = data(48, 1, dtype), data(256, 2, dtype)
        self.optimizer: torch.optim.Optimizer | None = None
        self.loss = math.nan

    def learn(self, index: int, steps: int, make=None, carry: bool = False, autocast: bool = False, **kind) -> None:
        """A task with a head of its own; `carry`: the optimizer's state (momentum) is that of the task before."""
        x, y = (self.old, self.new)[index]
        torch.manual_seed(7 + index)
        head = nn.Linear(WIDTH, y.shape[1]).to(self.dtype)
        params = [*trained(self.model), *head.parameters()]
        optimizer = (make or torch.optim.AdamW)(params, **({"lr": 3e-3, "weight_decay": 0.01} | kind))
        if carry:
            optimizer.state.update({p: self.optimizer.state[p] for p in trained(self.model)})
        self.optimizer = optimizer
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 2 * steps)
        rules = [self.rule] if self.rule else []
        attached = attach(self.model, optimizer, rules, index=index, batches=lambda: [{"x": x}])
        for _ in range(steps):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss = F.mse_loss(head(self.model(x)), y)
            loss.backward()
            nn.utils.clip_grad_norm_(params, 10.0)
            optimizer.step()
            schedule.step()
        attached.remove()
        self.loss = loss.item()

    def merge(self) -> None:
        """The LoRA of the task becomes part of the weights, and the next task gets a new one."""
        self.model = lora(self.model.merge_and_unload())

    def end(self, index: int) -> None:
        if self.rule:
            self.rule.end_task(TaskContext(self.model, index, lambda: [{"x": (self.old, self.new)[index][0]}]))

    def first(self, steps: int = 30) -> Course:
        self.learn(0, steps)
        self.end(0)
        return self

    @torch.no_grad()
    def outputs(self) -> Tensor:
        return self.model(self.old[0]).double()

    def drift(self, steps: int = 300, **how) -> float:
        before = self.outputs()
        self.learn(1, steps, **how)
        return ((self.outputs() - before).norm() / before.norm()).item()
