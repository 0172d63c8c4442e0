"""What a run has learned: opened, predicted with, exported. Learns nothing."""

from __future__ import annotations

import copy
import functools
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import datasets
import torch
from torch import Tensor

from ..consolidation import Consolidation
from ..core.environment import default_device
from ..core.errors import ConfigError, RunError, nearest
from ..core.progress import Progress
from ..heads import ContrastiveHead, Head, LanguageHead, make_head
from ..models.answer_scoring import LONGEST
from ..models.backbone import Backbone, Examples, Pooling
from ..models.dual_encoder import DualBackbone
from ..models.fixed_features import FixedFeatures
from ..models.language_model import LanguageBackbone
from ..models.loading import load_backbone, load_language_model
from ..recipes import make_recipe
from ..recipes.recipe import Recipe
from ..runs.commit import Commit, active
from ..runs.directory import Run, read_config, write_folder
from ..streams.predict_inputs import table
from ..tuners import NoNetwork
from .compatibility import suited
from .composition import choose, plain
from .evaluator import Evaluator, best_class
from .routed_scores import routed_scores
from .trainer import resolve_training

Opened = TypeVar("Opened", bound="Learned")


class Known(NamedTuple):
    """What a run can be asked: all label texts, the classes learned so far, the input columns, the tasks learned."""

    labels: Sequence[str]
    classes: Sequence[int]
    inputs: Sequence[str]
    tasks: Sequence[str]


class Learned:
    """A recipe on a base model, in the state in which the commits of a run have left it. See `Learner`."""

    def __init__(
        self,
        model: str | Path | None,
        recipe: str | dict[str, Any] | Recipe = "lora",
        run: str | Path | None = None,
        *,
        heads: Sequence[str | dict[str, Any] | Head] | None = None,
        training: dict[str, Any] | None = None,
        seed: int = 0,
        pooling: Pooling | None = None,
        max_length: int | None = None,
        trust_remote_code: bool = False,
        evaluate_every: int = 1,
        device: str | torch.device | None = None,
        progress: Progress | None = None,
    ) -> None:
        self._recipe = make_recipe(recipe)
        self._heads_given = bool(heads)
        if heads:
            self._recipe = self._recipe.with_heads([h if isinstance(h, Head) else make_head(h) for h in heads])
        self.recipe = copy.deepcopy(self._recipe)
        self.model_name = str(model) if model is not None else None
        self.training = resolve_training(self.recipe.training, training or {})
        self.seed = seed
        self.loading: dict[str, Any] = {
            "pooling": pooling,
            "max_length": max_length,
            "trust_remote_code": trust_remote_code,
        }
        if not isinstance(evaluate_every, int) or evaluate_every < 0:
            raise ConfigError(f"evaluate_every is a number of tasks, or 0, not {evaluate_every!r}")
        self.evaluate_every = evaluate_every
        self.device = torch.device(device) if device is not None else default_device()
        self.progress = progress or Progress()
        self._temporary = tempfile.TemporaryDirectory() if run is None else None
        self.path = Path(self._temporary.name if self._temporary else run)  # type: ignore[arg-type]
        self.backbone: Backbone | None = None
        self.heads = self.recipe.heads
        self._surrogate: Head | None = None
        self._predicts: Known | None = None

    # ---- opening ----

    @classmethod
    def open(cls: type[Opened], run: str | Path, **options: Any) -> Opened:
        """The learner of a finished run, ready to predict and export.

        A run with pieces of one's own: import their module first, or give `recipe` (docs/how-to/own-rule.md).

        Raises:
            RunError: no run is there, it is damaged, or its base model is another one now.
        """
        learner = cls.described(run, **options)
        config = read_config(Path(run))
        model, stream = config["model"], config["stream"]
        learner.backbone = learner._load_base(model["modality"], model["fingerprint"])
        directory = Run.read(run)
        learner._restore(directory, stream["labels"])
        newest = directory.commits[-1].manifest if directory.commits else {"classes": [], "learned": []}
        learner._predicts = Known(stream["labels"], newest["classes"], stream["inputs"], newest["learned"])
        return learner

    @classmethod
    def described(cls: type[Opened], run: str | Path, **options: Any) -> Opened:
        """The learner that a run was made with, as run.yaml says; nothing is loaded yet.

        Raises:
            RunError: no run is there.
        """
        config = read_config(Path(run))
        model, settings = config["model"], config["training"]
        name = options.pop("model", None) or config["model_name"]
        loading = {} if name is None else {k: model[k] for k in ("pooling", "max_length", "trust_remote_code")}
        return cls(
            name,
            options.pop("recipe", config["recipe"]),
            run,
            training=settings,
            seed=config["seed"],
            **loading,
            **options,
        )

    def _load_backbone(self, modality: Any) -> Backbone:
        tuner = self.recipe.tuner
        if isinstance(tuner, NoNetwork):
            return FixedFeatures(modality, words=tuner.words, side=tuner.side)
        if self.model_name is None:
            raise ConfigError(f"recipe `{self.recipe.name}` needs a model: give a hub id or a folder (--model)")
        if modality != "language":
            return load_backbone(self.model_name, modality, **self.loading).to(self.device)
        if self.loading["pooling"] is not None:
            raise ConfigError("a language model answers prompts, and pools nothing: leave pooling out")
        options = {name: self.loading[name] for name in ("max_length", "trust_remote_code")}
        return load_language_model(self.model_name, **options).to(self.device)

    def _check_heads(self, backbone: Backbone, captions: bool = False) -> None:
        """Read the model with heads that suit it; see `suited`."""
        self._recipe = suited(self._recipe, backbone, self._heads_given, captions)
        self.recipe = copy.deepcopy(self._recipe)
        self.heads = self.recipe.heads

    def frozen_features(self, rows: datasets.Dataset, modality: Any, labels: Sequence[str] = ()) -> Tensor:
        """What the base model, nothing learned, says an input is (N x `Backbone.pooled_width`).

        Args:
            rows: with the columns of `Task.train`; labels: their label texts.
        """
        backbone = self._load_backbone(modality)
        if isinstance(backbone, LanguageBackbone):
            backbone.open(labels, [])
        examples, size = backbone.prepare(rows), int(self.training["per_device_eval_batch_size"])
        with self.progress, self.progress.bar("features of the stream", len(examples)) as advance:
            return backbone.pooled(examples, size, advance)

    def _load_base(self, modality: Any, expected: str) -> Backbone:
        backbone = self._load_backbone(modality)
        if backbone.fingerprint != expected:
            raise RunError(
                f"{self.path} was made with another base model than `{self.model_name}` is now: give the one that it "
                "was made with (--model)"
            )
        return backbone

    def _restore(self, run: Run, labels: Sequence[str], without: str | None = None) -> None:
        """Base model plus active commits: nothing else decides what follows. Heads and rules are as the newest commit
        left them; `without` a task, the weights are as if it had left nothing."""
        # rules, heads and consolidations hold state: every run starts from untouched ones
        self.recipe = recipe = copy.deepcopy(self._recipe)
        self.heads, backbone = recipe.heads, self._need_backbone()
        self._evaluator = Evaluator(backbone, int(self.training["per_device_eval_batch_size"]), self.progress)
        if isinstance(backbone, LanguageBackbone):
            asking = [head for head in self.heads if isinstance(head, LanguageHead)]
            backbone.open(
                labels,
                [head.read for head in asking],
                rouge_l=any(head.rouge_l for head in asking),
                longest=max((head.longest for head in asking), default=LONGEST),
            )
        first = self.heads[0]
        self._surrogate = None if first.trains or not recipe.tuner.trains else first.trainer()
        if isinstance(backbone, DualBackbone):
            read = next((head for head in self.heads if isinstance(head, ContrastiveHead)), first)
            backbone.open(read.label_prompts(labels), paired=isinstance(self._surrogate or first, ContrastiveHead))
        for head in self._all_heads():
            embeddings = None
            if head.needs_label_embeddings:
                embeddings = backbone.label_embeddings(head.label_prompts(labels))
            head.open(backbone.width, labels, seed=self.seed, label_embeddings=embeddings)
            head.to(self.device)
        recipe.consolidation.open(backbone, recipe.tuner, labels)
        recipe.consolidation.restore([c for c in active(run.commits) if c.manifest["task"] != without])
        backbone.to(self.device)
        states = head_states(run.commits[-1]) if run.commits else {}
        for name, head in self._named_heads() if states else ():
            head.load_state(states.get(name, {}))
        if run.commits and run.commits[-1].has("rules.safetensors"):
            state = run.commits[-1].tensors("rules.safetensors")
            for i, rule in enumerate(recipe.rules):
                rule.load_state({k.split(".", 1)[1]: v for k, v in state.items() if k.startswith(f"{i}.")})

    def _named_heads(self) -> Iterator[tuple[str, Head]]:
        yield from ((head.name, head) for head in self.heads)
        if self._surrogate is not None:
            yield "trainer", self._surrogate

    def _all_heads(self) -> list[Head]:
        return [head for _, head in self._named_heads()]

    def _need_backbone(self) -> Backbone:
        if self.backbone is None:
            raise ConfigError("nothing is learned yet: call learn(stream), or Learner.open(run)")
        return self.backbone

    def fresh(self) -> tuple[Backbone, Consolidation]:
        """The base model once more, untouched, and the recipe's consolidation over it, nothing restored yet.

        Raises:
            ConfigError: nothing is learned yet.
            RunError: the base model is another one now.
        """
        backbone, recipe = self._need_backbone(), copy.deepcopy(self._recipe)
        base = self._load_base(backbone.modality, backbone.fingerprint)
        recipe.consolidation.open(base, recipe.tuner, self._predicts.labels if self._predicts else ())
        return base, recipe.consolidation

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
        lists of messages. An empty text where a generated answer names no class.

        An input is answered as if it were alone, whatever else is asked with it: only the last bits of scores differ
        (padding to the longest of a batch makes sums round anew, 2e-7 with MiniLM), so a tie alone could be decided
        otherwise.

        Args:
            head: which head to read; None takes the first.
            classes: choose among these label texts only (task-incremental use); None chooses among all classes learned.
            task: whose adapter reads the inputs, where there is one for every task; None lets the router find out.

        Raises:
            ConfigError: nothing is learned yet, inputs of another kind than were learned, an unknown head, class or
                task, or a task for a model that has but one state.
        """
        backbone = self._need_backbone()
        if self._predicts is None or not self._predicts.classes:
            raise ConfigError("no task is learned yet: call learn(stream) first")
        labels, seen, columns, _ = self._predicts
        by_name = {h.name: h for h in self.heads}
        if head is not None and head not in by_name:
            raise ConfigError(f"this run reads no head `{head}`: {nearest(head, by_name)}")
        reader = by_name[head or self.heads[0].name]
        allowed = list(seen)
        if classes is not None:
            known = {labels[c]: c for c in seen}
            for name in classes:
                if name not in known:
                    raise ConfigError(f"class `{name}` is not learned: {nearest(name, known)}")
            allowed = [known[name] for name in classes]
            if not allowed:
                raise ConfigError("classes=[] leaves nothing to choose: None chooses among all classes learned")
        given = table(inputs, tuple(columns))
        size = len(inputs)
        if not size:
            return []
        self._evaluator.embed([reader], labels, [allowed])
        data = datasets.Dataset.from_dict({**given, "label": [0] * size, "id": [""] * size})
        scores = self._scores(reader, backbone.prepare(data), len(labels), task, allowed)
        return [labels[c] if c >= 0 else "" for c in best_class(scores, allowed).tolist()]

    def _scores(self, head: Head, examples: Examples, classes: int, task: str | None, allowed: Sequence[int]) -> Tensor:
        """(N x C). Where inputs are divided among adapters: read once to find out their tasks, then in one pass for
        every task that is present."""
        backbone, consolidation = self._need_backbone(), self.recipe.consolidation
        size = int(self.training["per_device_eval_batch_size"])
        if not consolidation.routed:
            if task is not None:
                raise ConfigError("the model is the same for all tasks: give `classes` to choose among those of one")
            return head.scores(backbone.about(allowed)(examples, size))

        @functools.cache
        def routing() -> Tensor:
            with consolidation.view(None):
                return backbone.pooled(examples, size)

        def read(view: int | None, rows: Tensor) -> Tensor:
            if view is None:
                return routing()[rows]
            with consolidation.view(view):
                return backbone.about(consolidation.task_classes(view))([examples[i] for i in rows.tolist()], size)

        if task is None:
            weights = consolidation.candidates_of(routing())
        else:
            learned = list(self._predicts.tasks) if self._predicts else []
            if task not in learned:
                raise ConfigError(f"this run has learned no task `{task}`: {nearest(task, learned)}")
            weights = torch.full((len(examples), len(learned)), -torch.inf)
            weights[:, consolidation.reads(learned.index(task), len(learned) - 1)] = 0
        return routed_scores(head, classes, weights, consolidation, read)

    def export(
        self,
        folder: str | Path,
        *,
        only: Sequence[str] | None = None,
        without: Collection[str] = (),
        scales: Mapping[str, float] | None = None,
        dtype: Literal["float32", "bfloat16"] = "float32",
    ) -> Path:
        """Write a plain transformers folder, adapters merged; the run stays as it is.

        Without a choice of tasks this is the model as it is now; with one, the base model and what the chosen tasks
        left on its weights, added up in fp32: the same bits as if the other deltas had never been.

        Args:
            only: tasks to take, None all; without: tasks to leave out.
            scales: factors of tasks, times the consolidation's own.
            dtype: what the fp32 weights are rounded to, once.

        Raises:
            ConfigError: nothing is learned yet, there is no network to export, no weights could hold the adapter; an
                unknown task; tasks that leave nothing to choose from.
            RunError: the folder is a run directory, or cannot be written; then nothing of it is there.
        """
        backbone = self._need_backbone()
        if isinstance(backbone, FixedFeatures):
            raise ConfigError(f"recipe `{self.recipe.name}` has no network to export")
        if dtype not in ("float32", "bfloat16"):
            raise ConfigError(f"dtype is float32 or bfloat16, not `{dtype}`")
        commits = Run.read(self.path).commits
        if not commits:
            raise ConfigError("nothing is learned yet: call learn(stream) first")
        everything = only is None and not without and not scales
        if everything and not self.recipe.consolidation.routed:
            model: Any = plain(copy.deepcopy(backbone.model), commits[-1].path)
        else:
            chosen = choose(commits[-1].manifest["learned"], only, without, scales)
            backbone, consolidation = self.fresh()
            by_task = {c.manifest["task"]: c for c in active(commits)}
            consolidation.compose(by_task, chosen)
            model = plain(backbone.model, by_task[list(chosen)[-1]].path if chosen else commits[-1].path)
        model = model.to(dtype=getattr(torch, dtype))

        def write(aside: Path) -> None:
            model.save_pretrained(str(aside))
            backbone.save_processors(str(aside))

        return write_folder(Path(folder), write)


def head_states(commit: Commit) -> dict[str, dict[str, Tensor]]:
    """What a commit holds of each head, by name; nothing before the first task."""
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in commit.tensors("head.safetensors").items() if commit.has("head.safetensors") else ():
        name, _, part = key.partition(".")
        found.setdefault(name, {})[part] = tensor
    return found
