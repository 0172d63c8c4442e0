"""The learner: a recipe on a base model, one task after another."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from ..consolidation import Consolidation
from ..core import meeting, processes
from ..core.errors import ConfigError
from ..core.progress import Progress
from ..heads import Head, make_head
from ..models.backbone import Backbone
from ..models.in_memory import InMemory
from ..models.precision import Loading
from ..recipes import make_recipe
from ..recipes.recipe import Recipe
from ..recipes.user_pieces import import_modules
from ..runs.result import Result
from ..streams import Stream
from . import export, prediction
from .adopt import adopt
from .config import RunConfig
from .general import read_general
from .generation import Generation, generate
from .opening import arguments_of, as_begun, folder_of, going_on, reopened
from .retry import Accept, with_settings
from .revert import revert
from .setup import Setup
from .state import LearnerState
from .task_loop import learn
from .trainer_choice import TrainerName
from .training_settings import resolve_training


class Learner:
    """Learns one task after another, keeps what it promised to keep, and measures it.

    Args:
        model: hub id or folder of a transformers encoder, or of a language model for streams of prompts; a .gguf file;
            or in memory (model, tokenizer), of which copies are taken. Not needed by recipes without a network.
        recipe: a name, plain data, or a `Recipe`.
        run: run directory; started again with the same one, it resumes. None keeps the run for this object's life only,
            which processes that train together cannot share.
        heads: names, `{type: name, setting: value}` or heads, instead of the recipe's own; the first shapes features.
        training: names of `TrainingArguments` (and TRL's `SFTConfig`), and our own; see `resolve_training`.
        seed: decides everything random; progress: a display; None shows nothing.
        trainer, response_prefix: see `settle`; processor: of a model in memory, where it is given alone.
        evaluate_every: all tasks so far are evaluated after every so many tasks, and after the last of the stream
            (0: then alone); otherwise the task just learned and the next one. Decides nothing about what is learned.
        general, lm_eval: prompts of no task, or a file of them, and tasks of lm-evaluation-harness, see `general_of`.
        device: where to train and predict; None takes an accelerator. loading: names of `Loading`: pooling, dtype, …

    Raises:
        ConfigError: an unknown recipe, head or training setting; no run for processes that train together.

    Example:
        >>> learner = pt.Learner("google/vit-base-patch16-224-in21k", recipe="nlora", run="runs/nlora")
        >>> result = learner.learn(pt.load_stream("path/to/stream"))
        >>> print(result.summary())
    """

    def __init__(
        self,
        model: str | Path | tuple[Any, Any] | Any | None,
        recipe: str | dict[str, Any] | Recipe = "lora",
        run: str | Path | None = None,
        *,
        heads: Sequence[str | dict[str, Any] | Head] | None = None,
        training: dict[str, Any] | None = None,
        seed: int = 0,
        trainer: TrainerName | None = None,
        response_prefix: str | None = None,
        evaluate_every: int = 1,
        general: str | Path | Sequence[Any] | None = None,
        lm_eval: Sequence[str] = (),
        device: str | torch.device | None = None,
        progress: Progress | None = None,
        processor: Any = None,
        **loading: Any,
    ) -> None:
        made = make_recipe(recipe)
        if heads:
            made = made.with_heads([h if isinstance(h, Head) else make_head(h) for h in heads])
        device = meeting.join(device)
        path, self._temporary = folder_of(run)
        made = as_begun(made, recipe, path)
        self.setup = Setup(
            model=InMemory.of(model, processor) or (str(model) if model is not None else None),
            recipe=made,
            heads_given=bool(heads),
            path=path,
            training=resolve_training(made.training, training or {}),
            given=frozenset(training or ()),
            loading=Loading(**loading),
            evaluate_every=evaluate_every,
            general=read_general(general),
            lm_eval=tuple(lm_eval),
            seed=seed,
            device=device,
            progress=progress if progress and processes.first() else Progress(),
            trainer=trainer,
            response_prefix=response_prefix,
        )
        self._state: LearnerState | None = None

    @classmethod
    def from_config(cls, config: RunConfig, **instead: Any) -> Learner:
        """The learner of a configuration, see `going_on`; `instead` replaces arguments of the constructor."""
        import_modules(config.imports)
        recipe = config.recipe if isinstance(config.recipe, str) else config.recipe.get("name", "custom")
        own = RunConfig.model_fields.keys() - {"model", "stream", "out", "imports"}
        settings = {"run": config.out or Path("runs") / recipe, **{name: getattr(config, name) for name in own}}
        return cls(**{"model": config.model, **settings, **going_on(config), **instead})

    @classmethod
    def described(cls, run: str | Path, **options: Any) -> Learner:
        """The learner that a run was made with, as run.yaml describes it; nothing is loaded yet.

        Raises:
            RunError: no run is there, or its base model was one in memory, and is not given again.
        """
        name, recipe, settings = arguments_of(Path(run), options)
        return cls(name, recipe, run, **settings)

    @classmethod
    def open(cls, run: str | Path, **options: Any) -> Learner:
        """The learner of a finished run, ready to predict and export.

        A run with pieces of one's own: import their module first, or give `recipe` (docs/how-to/own-rule.md).

        Raises:
            RunError: no run is there, it is damaged, or its base model is another one now.
        """
        learner = cls.described(run, **options)
        learner._state = reopened(learner.setup)
        return learner

    # ---- what it is ----

    @property
    def state(self) -> LearnerState:
        """Base model plus commits.

        Raises:
            ConfigError: nothing is learned or opened yet.
        """
        if self._state is None:
            raise ConfigError("nothing is learned yet: call learn(stream), or Learner.open(run)")
        return self._state

    @property
    def recipe(self) -> Recipe:
        """The recipe; once something is learned, with the state that its pieces hold."""
        return self._state.recipe if self._state is not None else self.setup.recipe

    backbone = property(lambda self: self.state.backbone, doc="The model as it is now.")
    heads = property(lambda self: self.recipe.heads, doc="The heads of the recipe.")
    path = property(lambda self: self.setup.path, doc="The run directory.")
    model_name = property(lambda self: self.setup.model, doc="Hub id or folder of the base model, or itself.")
    training = property(lambda self: self.setup.training, doc="Complete training settings.")
    seed = property(lambda self: self.setup.seed, doc="Decides everything random.")
    device = property(lambda self: self.setup.device, doc="Where the model is trained and predicts.")
    progress = property(lambda self: self.setup.progress, doc="The display.")
    evaluate_every = property(lambda self: self.setup.evaluate_every, doc="See the constructor.")
    adopt = classmethod(adopt)

    # ---- learning ----

    def learn(self, stream: Stream, *, accept: Accept | None = None) -> Result:
        """Learn the tasks that the run has not learned yet.

        Args:
            accept: judges every task when it is learned, and returns why it may not stay. Then the run, and this
                learner, are as they were before the task, and no later one is learned; see `Result.rejected`.

        Raises:
            PerpetuneError: whatever is wrong, with how to mend it; every finished task is safe.
        """
        self._state = learn(self.setup, stream, accept)
        return self._result()

    def retry(
        self, stream: Stream, task: str, training: Mapping[str, Any] | None = None, *, accept: Accept | None = None
    ) -> Result:
        """Throw the newest task away and learn it again, with other settings: to the bit the run that never tried.

        Args:
            training: settings of this task, over those of the run and of the stream.

        Raises:
            PerpetuneError: as `learn`; it is not the newest task.
        """
        self._state = learn(self.setup, with_settings(stream, task, training or {}), accept, retry=task)
        return self._result()

    def revert(self, stream: Stream, task: str) -> Result:
        """Take a task out of what the run has learned, heads included: a new commit; nothing is deleted.

        The weights become the base and what the other tasks left: after `SparseSum`, the bits of a run in which this
        task left nothing. What heads have of the task goes as `Head.forget` says; heads with `refresh` gather anew from
        the training data of the other tasks. What rules remember stays. The task is not learned again under its name.

        Args:
            stream: with the other learned tasks, as they were; the task itself may be gone.

        Raises:
            ConfigError: no such task is learned, or tasks leave nothing that could be taken out.
            RunError: no run is there, or the other tasks are not what they were.
        """
        self._state = revert(self.setup, stream, task)
        return self._result()

    def _result(self) -> Result:
        return Result(self.path, keep=self._temporary)

    # ---- using ----

    def predict(
        self,
        inputs: Sequence[Any],
        *,
        head: str | None = None,
        classes: Sequence[str] | None = None,
        task: str | None = None,
    ) -> list[str]:
        """Label texts for new inputs: texts, (text, text_pair) tuples, PIL images, prompts, (image, prompt) tuples, or
        lists of messages. Where a generated answer names no class, or free texts were learned, the answer itself.

        An input is predicted as if it were alone; only the last bits of scores depend on the others (padding).

        Args:
            head: which head to read; None takes the first.
            classes: choose among these label texts only (task-incremental use); None chooses among all classes learned.
            task: whose adapter reads the inputs, where there is one for every task; None lets the router find out.

        Raises:
            ConfigError: nothing is learned yet, inputs of another kind than were learned, an unknown head, class or
                task, or a task for a model that has but one state.
        """
        return prediction.predict(self.state, inputs, head, classes, task)

    def generate(
        self, inputs: Sequence[Any], *, task: str | None = None, streamer: Any = None, **settings: Any
    ) -> list[str]:
        """What a language model answers to prompts, lists of messages, or (image, prompt) tuples.

        Where the run learned conversations, a text is a user's turn. Answers end where the model's chat template or
        generation settings say that one ends.

        Args:
            task: whose adapter answers, where there is one for every task; None lets the router find out.
            streamer: of transformers, shown the tokens of one prompt as they come.
            settings: `max_new_tokens` (256), `temperature` (0: greedily), `top_p`, `seed`, `batch_size`; see
                `Generation`.

        Raises:
            ConfigError: no language model, nothing learned yet, other inputs, an unknown task or setting.
        """
        return generate(self.state, inputs, Generation.of(settings), task, streamer)

    def export(
        self,
        folder: str | Path,
        *,
        format: Literal["merged", "adapters"] = "merged",
        only: Sequence[str] | None = None,
        without: Collection[str] = (),
        scales: Mapping[str, float] | None = None,
        dtype: Literal["float32", "bfloat16"] = "float32",
        head: bool | str = True,
        cumulative: bool = False,
    ) -> Path:
        """Write a folder that loads without perpetune, with a model card; the run stays as it is.

        Args:
            format: "merged", a plain transformers model; "adapters", LoRA for plain peft and vLLM: one for every task
                where each has its own, else one of summed rank, and `routes.json` (docs/how-to/serve.md).
            only: tasks to take, None all; without: tasks to leave out. Weights are then the base and what the chosen
                left on it, added up in fp32: the same bits as if the others had never been.
            scales: factors of tasks, times the consolidation's own.
            dtype: what the fp32 weights are rounded to, once.
            head: which goes along where it is linear, by name; True the first, False none. In a class for
                classification of transformers, or, where none pools as the run did, in `classifier.safetensors`.
            cumulative: of adapters: also one for the model after each task before the last.

        Raises:
            ConfigError: nothing is learned yet; no network, or no weights or LoRA could hold the change; an unknown
                task, head or format; tasks that leave nothing to choose from.
            RunError: the folder is a run directory, or cannot be written; then nothing of it is there.
        """
        choice = export.Choice(only, without, scales, dtype, head, format, cumulative)
        return export.export(self.setup, self.state, Path(folder), choice)[0]

    def fresh(self) -> tuple[Backbone, Consolidation]:
        """The base model once more, untouched, and the recipe's consolidation over it, nothing restored yet."""
        return export.fresh(self.setup, self.state)
