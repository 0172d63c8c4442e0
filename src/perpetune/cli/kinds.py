"""The kinds of things to choose from, for `perpetune list`; nothing heavy is imported for its help."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Kind:
    """What a kind of thing is, and how one of it is chosen."""

    about: str
    use: str


KINDS = {
    "recipes": Kind(
        "published methods and controls, each a tuner, rules, a consolidation and a head with their settings.",
        "Use one: perpetune run --recipe nlora … or, with settings, --recipe '{name: nlora, rank: 4}'.",
    ),
    "tuners": Kind(
        "where the change to the model lives: all weights, or a small module. Any configuration of peft is one, too.",
        "Use one in YAML: recipe: {tuner: {type: LoraConfig, r: 8, target_modules: all-linear}}.",
    ),
    "rules": Kind(
        "how each optimizer step is shaped, so that it does not undo what earlier tasks left. Several act together.",
        "Use one in YAML: recipe: {tuner: {type: LoraConfig, r: 8}, rules: [{type: product_l1, strength: 1e-4}]}.",
    ),
    "consolidations": Kind(
        "what a finished task leaves behind: the same weights trained on, a merged change, a state of its own.",
        "Use one in YAML: recipe: {tuner: {type: LoraConfig, r: 8}, consolidation: Merge}.",
    ),
    "routers": Kind(
        "which task's state an input goes to, where every task has its own (consolidation PerTask).",
        "Use one in YAML: recipe: {tuner: {type: LoraConfig, r: 8}, "
        "consolidation: {type: PerTask, router: RidgeRouter}}.",
    ),
    "heads": Kind(
        "how a prediction is read off the model. The first shapes the features in training, the others read along.",
        "Use some: perpetune run --heads linear,ridge … or, with settings, --heads '{type: ridge, features: 256}'.",
    ),
    "streams": Kind(
        "built-in tasks to try things on, without a download.",
        "Use one: perpetune run --stream digits … Your own tasks are a folder: --stream my_tasks/.",
    ),
    "benchmarks": Kind(
        "streams of published papers, read from their files.",
        "Use one: perpetune run --stream cl-order-1 --data downloads/CL_Benchmark ….",
    ),
}
