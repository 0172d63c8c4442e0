"""What was trained elsewhere becomes the first task of a run: a LoRA adapter, or a fine-tuned model and its base."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import torch
from datasets import Features, Value
from torch import Tensor
from transformers.trainer_utils import set_seed

from ..core.errors import ConfigError, ModelError, RuleError, RunError, StreamError
from ..models.backbone import Backbone
from ..recipes import make_recipe
from ..recipes.recipe import Recipe
from ..rules import TaskContext
from ..runs.directory import Run
from ..streams import Stream, Task, load_stream
from ..streams.tokens import METRIC, SOURCE
from .adopted_files import adapter_config, adapter_tensors, check_base, check_fits, with_adapter
from .committing import commit_session
from .kept import named
from .language_losses import passages
from .opening import Opened
from .session import Training, gather, task_seed
from .state import LearnerState
from .task_loop import TaskLoop
from .trainer import TrainingLog
from .trainer_choice import settle

if TYPE_CHECKING:
    from .learner import Learner

WHOLE = {"name": "task_arithmetic", "scale": 1.0}  # theta_0 + d is the model that was adopted


def adopt(
    kind: type[Learner],
    trained: str | Path,
    model: str | Path,
    run: str | Path,
    *,
    recipe: str | dict[str, Any] | Recipe | None = None,
    task: str = "adopted",
    data: str | Path | None = None,
    metric: str = "exact_match",
    same_base: bool = False,
    **options: Any,
) -> Learner:
    """The learner of a new run whose first task was trained elsewhere; `learn` and `Keep` go on from it.

    Args:
        trained: folder of a peft LoRA adapter, or of a fine-tuned model.
        model: hub id or folder of the base model.
        run: a new run directory.
        recipe: how tasks go on; None: `lora` for an adapter, whose settings the run takes on; for a model
            `task_arithmetic` with scale 1, of which the difference to its base is the first task.
        task: what it is called in the run.
        data: a sample of what it was trained on, a file or folder of prompts and responses: rules then remember its
            inputs, and it is evaluated. Without, they say what they cannot know, and the commit, too.
        metric: how generated answers to this data are scored.
        same_base: the adapter names another base model than `model`, and it is the same under another name.
        options: see `Learner`.

    Raises:
        ModelError: what is there fits neither the base model nor the recipe.
        ConfigError: the recipe cannot go on from it.
        RunError: the run has learned something already.
    """
    folder, name = Path(trained), named(task)
    config = adapter_config(folder)
    if config is not None and not same_base:
        check_base(config, str(model), folder)
    made = make_recipe(recipe if recipe is not None else "lora" if config is not None else WHOLE)
    check_fits(made, config, folder)
    learner = kind(str(model), made, run, **options)
    setup = learner.setup
    backbone = setup.load_backbone("language")
    if config is not None:
        setup.recipe = with_adapter(made, config, backbone.model)
    setup.fit_heads(backbone)
    setup.recipe.tuner.check(backbone.model)
    states = setup.recipe.consolidation.states
    if states is not None and data is None:
        raise ConfigError(f"recipe `{made.name}` finds tasks by their inputs: give a sample of the data (--data)")
    tensors = adapter_tensors(folder) if config is not None else _model_tensors(folder, learner)
    stream = settle(setup, _stream(setup.path.name, name, data, metric, backbone), backbone)
    opened = Run.open(setup.path, setup.config(stream, backbone))
    try:
        if len(opened.commits) > 1:
            raise RunError(f"{setup.path} has learned tasks already, and adopt begins a run: give a new one (--out)")
        state = LearnerState(setup, backbone, stream.labels, stream.inputs).restore(opened.commits)
        loop = Adoption(Opened(opened, stream, state, {}))
        with setup.progress:
            loop.adopt(tensors, folder, whole=config is None, known=data is not None)
    finally:
        opened.close()
    learner._state = state
    return learner


class Adoption(TaskLoop):
    """The order of a task whose training happened elsewhere."""

    def adopt(self, tensors: dict[str, Tensor], folder: Path, *, whole: bool, known: bool) -> None:
        """
        Args:
            tensors: what was trained; whole: all weights of a model; known: whether there is a sample of the data.
        """
        state, consolidation, session = self.state, self.state.consolidation, self.sessions[0]
        if not self.run.commits:
            self.commit_untouched()
        with self._phase("prepare"):
            set_seed(task_seed(self.setup.seed, session.name))
            consolidation.begin_task(session)
            training = Training(state, session)
            training.open_heads()
        with self._phase("rules"):
            unknown = self._rules(training, tensors, whole, known)
        with self._phase("consolidate"):
            training.close_heads()
            consolidation.end_task(session if known else replace(session, tasks=(_probed(session.tasks[0]),)))
        with self._phase("observe"):
            gather(state, self.stream.tasks if known else (), session.tasks if known else ())
        with self._phase("evaluate"):
            evaluated = self._evaluated(session)
            predictions = state.evaluator.predictions(self.stream, session, state.heads, consolidation, evaluated)
            measured = [*consolidation.guarantee(), *(m for head in state.heads for m in head.guarantee())]
        with self._phase("commit"):
            trainable = sum(t.numel() for t in tensors.values())
            facts = self._facts(session, measured, trainable)
            facts["adopted"] = {"kind": "model" if whole else "adapter", "name": folder.name, "unknown": unknown}
            commit = commit_session(self.run, state, session.name, predictions, facts)
        self.log = TrainingLog(0, None, None)
        self._note(commit, session, "adopted")
        for text in unknown:
            self.setup.progress.say(text)

    def _rules(self, training: Training, tensors: dict[str, Tensor], whole: bool, known: bool) -> list[str]:
        """Rules see the task begin and end, and what was trained in between; what they cannot know, in words."""
        batches, losses = (training.batches, training.losses) if known else (None, None)
        context = TaskContext(self.state.backbone, 0, batches, losses, self.setup.progress.say)
        unknown: dict[int, str] = {}

        def tell(number: int, act: Any) -> None:
            if number in unknown:
                return
            try:
                act(context)
            except RuleError:
                if known:
                    raise
                kind = type(self.state.recipe.rules[number]).__name__
                unknown[number] = (
                    f"{kind} does not know the inputs of `{self.sessions[0].name}`, and later tasks may change what it "
                    "makes of them: adopt it with a sample of its data (--data)"
                )

        rules = self.state.recipe.rules
        for i, rule in enumerate(rules):
            tell(i, rule.begin_task)
        _put(self.state.backbone, self.state.recipe, tensors, whole)
        for i, rule in enumerate(rules):
            tell(i, rule.end_task)
        if 0 < len(unknown) < len(rules):  # they would count tasks differently
            raise ConfigError(next(iter(unknown.values())))
        return list(unknown.values())


@torch.no_grad()
def _put(backbone: Backbone, recipe: Recipe, tensors: dict[str, Tensor], whole: bool) -> None:
    """Load what was trained.

    Raises:
        ModelError: it is not what the model has.
    """
    now = backbone.model.state_dict() if whole else recipe.tuner.tensors(backbone.model)
    what = "model" if whole else "adapter"
    for name in sorted({*now, *tensors}):
        if name not in tensors:
            raise ModelError(f"the {what} lacks `{name}`, which the base model has a place for: it is of another model")
        if name not in now:
            raise ModelError(f"the {what} has `{name}`, for which the base model has no place: it is of another model")
        if now[name].shape != tensors[name].shape:
            shapes = " and ".join(f"{tuple(t.shape)}" for t in (tensors[name], now[name]))
            rows = any(part in name for part in ("embed", "wte", "lm_head", "shared"))
            mend = "resize the base's embeddings to it, save that, and give it" if rows else "it is of another model"
            raise ModelError(f"`{name}` has the shapes {shapes} in the {what} and in the base model: {mend}")
    if whole:
        for name, tensor in now.items():
            tensor.copy_(tensors[name])
    else:
        recipe.tuner.load(backbone.model, tensors)


def _model_tensors(folder: Path, learner: Learner) -> dict[str, Tensor]:
    from ..models.loading import load_model

    tuned = load_model(str(folder), "language", learner.setup.loading_of("language"))
    return {name: t.detach().clone() for name, t in tuned.model.state_dict().items()}


def _stream(run: str, task: str, data: str | Path | None, metric: str, backbone: Backbone) -> Stream:
    """One task, with rows where there is a sample of its data."""
    if data is None:
        talks = getattr(backbone.processor, "chat_template", None) is not None
        inputs = ("messages",) if talks else ("prompt",)
        nothing = _texts([])
        only = Task(task, (), nothing, nothing, gone=("train", "test"), metric=METRIC)
        return Stream(run, (only,), (), "domain", inputs, {"source": SOURCE})
    stream = _sample(Path(data), task, metric)
    only = replace(stream.tasks[0], training={})
    return replace(stream, tasks=(only,), name=run, source={"source": SOURCE})


def _sample(data: Path, task: str, metric: str) -> Stream:
    """A folder with train.* and test.*, or one file, whose rows are both.

    Raises:
        StreamError: something else, or rows of another kind.
    """
    if not data.is_file() and not any(data.glob("train.*")):
        raise StreamError(
            f"{data} is no file and has no train.*: give prompts and responses, a file or a task's folder"
        )
    with tempfile.TemporaryDirectory() as place:  # as a stream of one task
        folder = Path(place) / task
        if data.is_file():
            folder.mkdir()
            for split in ("train", "test"):
                shutil.copy(data, folder / f"{split}{data.suffix}")
        else:
            folder.symlink_to(data.resolve(), target_is_directory=True)
        stream = load_stream(place, metric=metric)
    if stream.modality != "language":
        raise StreamError(f"{data} holds {' and '.join(stream.inputs)}: give prompts and responses, or messages")
    return stream


def _probed(task: Task) -> Task:
    """Without data, texts of no task show whether merging changes what the model computes."""
    words = [text.split() for text in passages()]
    cut = [(" ".join(w[:12]), " ".join(w[12:18])) for w in words]
    return replace(task, test=_texts(cut), metric=METRIC)


def _texts(pairs: Sequence[tuple[str, str]]) -> datasets.Dataset:
    """(prompt, response) as the rows of a task."""
    columns = {"id": Value("string"), "label": Value("int64"), "prompt": Value("string"), "response": Value("string")}
    prompts, responses = [prompt for prompt, _ in pairs], [response for _, response in pairs]
    rows = {"id": [""] * len(pairs), "label": [-1] * len(pairs), "prompt": prompts, "response": responses}
    return datasets.Dataset.from_dict(rows, features=Features(columns))
