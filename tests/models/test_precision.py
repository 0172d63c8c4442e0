"""The model as it is: precision, quantisation, GGUF files, models in memory."""

from __future__ import annotations

import warnings

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import perpetune as pt
from perpetune.core.errors import ConfigError, ModelError, RunError
from perpetune.models.language_loading import load_language_model
from perpetune.models.loading import load_backbone
from perpetune.models.precision import Loading, precision, quantised

TRAINING = {"max_steps": 3, "per_device_train_batch_size": 4, "per_device_eval_batch_size": 8, "learning_rate": 5e-3}


@pytest.fixture(scope="module")
def stream(word_stream):
    return pt.load_stream(word_stream, tasks=["films", "news"], pose="instruction", train_limit=8, test_limit=4)


@pytest.fixture(scope="module")
def half(tiny_lm, tmp_path_factory):
    """A folder whose checkpoint is in bf16."""
    source, folder = tiny_lm("llama", width=64, layers=1), tmp_path_factory.mktemp("half")
    AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    return folder


def learner(model, recipe, path=None, **options):
    return pt.Learner(model, recipe, path, training={**TRAINING, **options.pop("training", {})}, **options)


def logits(model, folder):
    tokens = AutoTokenizer.from_pretrained(folder)(["the movie was good"], return_tensors="pt")
    with torch.no_grad():
        return model(**{k: v for k, v in tokens.items() if k != "token_type_ids"}).logits.float()


# ---- precision ----


def test_a_language_model_is_in_the_precision_of_its_checkpoint_and_an_encoder_in_fp32(half, tiny_bert):
    assert precision(load_language_model(half).model) == "bfloat16"
    assert precision(load_language_model(half, dtype="float32").model) == "float32"
    assert precision(load_backbone(tiny_bert(), "text").model) == "float32"


@pytest.mark.parametrize("recipe", ["lora", "sequential_lora", "color", "olora_released"])
def test_adapters_train_in_fp32_on_a_bf16_base_whose_weights_stay(half, stream, tmp_path, recipe):
    made = learner(half, recipe, tmp_path / "run")
    made.learn(stream)
    model, base = made.backbone.model, load_language_model(half).model.state_dict()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert trained and {p.dtype for p in trained} == {torch.float32}
    kept = {n: p for n, p in model.get_base_model().named_parameters() if "lora_" not in n}
    assert all(torch.equal(p, base[n.replace(".base_layer", "")]) for n, p in kept.items())
    opened = pt.Learner.open(tmp_path / "run")
    prompts = [p for task in stream for p in task.test["prompt"][:]]
    assert opened.predict(prompts) == made.predict(prompts)
    assert precision(opened.backbone.model.get_base_model().lm_head) == "bfloat16"


def test_an_encoder_in_bf16_gives_fp32_features(tiny_bert, tiny_vit):
    texts = load_backbone(tiny_bert(), "text", dtype="bfloat16")
    assert texts.features(texts.samples(), 2).dtype == torch.float32
    images = load_backbone(tiny_vit(), "image", dtype="bfloat16")
    assert images(**images.batch(images.samples())).dtype == torch.float32


def test_a_run_made_before_goes_on_in_fp32(half, stream, tmp_path):
    """Whose run.yaml says nothing of a precision."""
    learner(half, "sequential_lora", tmp_path, dtype="float32").learn(stream.select(["films"]))
    assert "dtype" not in (tmp_path / "run.yaml").read_text(encoding="utf-8")
    again = learner(half, "sequential_lora", tmp_path)
    again.learn(stream)
    assert precision(again.backbone.model) == "float32"


def test_recipes_that_change_the_weights_stay_in_fp32_or_are_refused(half, stream):
    assert precision(learner(half, "sequential").setup.load_backbone("language").model) == "float32"
    for recipe in ("sequential", "sotu", "child_tuning_d", "oft"):
        with pytest.raises(ConfigError, match="changes the weights"):
            learner(half, recipe, dtype="bfloat16").learn(stream)
        with pytest.raises(ConfigError, match="quantised base.*leave quantization out"):
            learner(half, recipe, quantization="nf4").learn(stream)
    with pytest.raises(ConfigError, match="did you mean `bfloat16`"):
        Loading(dtype="bfloat")
    with pytest.raises(ConfigError, match="did you mean `nf4`"):
        Loading(quantization="nf")


# ---- quantised ----


def test_on_a_quantised_base_the_past_stays_beside_it_and_an_export_merges_into_fp32(half, stream, tmp_path):
    """What the export computes is the fp32 base plus the sum of what tasks have left."""
    pytest.importorskip("bitsandbytes")
    made = learner(half, {"name": "lora", "rank": 4}, tmp_path / "run", quantization="nf4")
    made.learn(stream)
    base = made.backbone.model.get_base_model()
    assert quantised(made.backbone.model)
    assert type(base.model.layers[0].self_attn.q_proj.base_layer).__name__ == "Linear4bit"
    assert made.setup.load_backbone("language").fingerprint == made.backbone.fingerprint
    written = pt.runs.directory.read_config(tmp_path / "run")["model"]
    assert (written["quantization"], written["dtype"]) == ("nf4", "bfloat16")
    exported = AutoModelForCausalLM.from_pretrained(made.export(tmp_path / "model"))
    assert exported.dtype == torch.float32 and not quantised(exported)
    expected = AutoModelForCausalLM.from_pretrained(half, dtype=torch.float32).state_dict()
    for commit in made._result().commits[1:]:
        for name, A in commit.tensors("adapter_model.safetensors").items():
            if "lora_A" in name:
                B = commit.tensors("adapter_model.safetensors")[name.replace("lora_A", "lora_B")]
                key = name.removeprefix("base_model.model.").replace(".lora_A.weight", ".weight")
                expected[key] = expected[key] + made.recipe.tuner.config.lora_alpha / 4 * (B @ A)
    assert all(torch.allclose(t, expected[n], atol=1e-6) for n, t in exported.state_dict().items())
    opened = pt.Learner.open(tmp_path / "run")
    prompts = [p for task in stream for p in task.test["prompt"][:]]
    assert opened.predict(prompts) == made.predict(prompts)


def test_quantised_weights_are_the_same_bits_after_evaluation(half):
    """bitsandbytes packs 4-bit weights anew for inference on some processors."""
    pytest.importorskip("bitsandbytes")
    model = load_language_model(half, quantization="nf4")
    model.open(("good",), ("options",))
    before = logits(model.model.train(), half)
    model.eval()
    logits(model.model, half)
    assert not model.weights_changed()
    assert torch.equal(logits(model.model.train(), half), before)


def test_a_projected_run_is_taken_up_again_on_a_quantised_base(half, stream, tmp_path):
    pytest.importorskip("bitsandbytes")
    for name, part in (("whole", (stream,)), ("stopped", (stream.select(["films"]), stream))):
        for some in part:
            learner(half, "pegp_lora_fresh", tmp_path / name, quantization="nf4").learn(some)
    whole, stopped = (
        (tmp_path / name / "commits" / "0002-news" / "adapter_model.safetensors").read_bytes()
        for name in ("whole", "stopped")
    )
    assert whole == stopped


# ---- GGUF ----


@pytest.fixture(scope="module")
def gguf(tmp_path_factory):
    """A tiny LLaMA as a GGUF file in fp32, with a byte-level tokenizer, as llama.cpp writes it."""
    import gguf as writing

    folder = tmp_path_factory.mktemp("gguf")
    width, layers, heads = 64, 1, 2
    pieces = [*"<pad> </s> <s>".split(), *(chr(c) for c in range(33, 127)), "Ġ", "th"]
    draw = torch.Generator().manual_seed(0)
    writer = writing.GGUFWriter(folder / "tiny.gguf", "llama")
    writer.add_block_count(layers)
    writer.add_context_length(256)
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(2 * width)
    writer.add_head_count(heads)
    writer.add_head_count_kv(heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(width // heads)
    writer.add_vocab_size(len(pieces))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(pieces)
    writer.add_token_types([3] * 3 + [1] * (len(pieces) - 3))
    writer.add_token_merges(["t h"])
    writer.add_bos_token_id(2)
    writer.add_eos_token_id(1)
    writer.add_pad_token_id(0)

    def add(name, *shape):
        writer.add_tensor(name, (0.2 * torch.randn(shape, generator=draw)).numpy())

    add("token_embd.weight", len(pieces), width)
    add("output.weight", len(pieces), width)
    add("output_norm.weight", width)
    for i in range(layers):
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            add(f"blk.{i}.{name}.weight", width, width)
        add(f"blk.{i}.ffn_gate.weight", 2 * width, width)
        add(f"blk.{i}.ffn_up.weight", 2 * width, width)
        add(f"blk.{i}.ffn_down.weight", width, 2 * width)
        add(f"blk.{i}.attn_norm.weight", width)
        add(f"blk.{i}.ffn_norm.weight", width)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder / "tiny.gguf"


def test_a_gguf_file_is_a_model_that_can_be_saved_and_is_the_one_that_transformers_reads(gguf, stream, tmp_path):
    made = learner(gguf, "lora", tmp_path / "run")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Could not find a config file")  # of peft, at every save
        made.learn(stream)
    theirs = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name).state_dict()
    ours = load_language_model(gguf.parent, gguf_file=gguf.name).model
    assert not quantised(ours) and not hasattr(ours.config, "quantization_config")
    assert all(torch.equal(t, theirs[n]) for n, t in ours.state_dict().items())
    saved = AutoModelForCausalLM.from_pretrained(made.export(tmp_path / "model"))
    assert torch.allclose(logits(saved, tmp_path / "model"), logits(made.backbone.model, tmp_path / "model"), atol=1e-4)
    prompts = stream.tasks[0].test["prompt"][:]
    assert pt.Learner.open(tmp_path / "run").predict(prompts) == made.predict(prompts)
    with pytest.raises(ModelError, match="there is no file"):
        load_language_model("nowhere.gguf")


def test_a_gguf_file_is_parsed_once(gguf, monkeypatch):
    import gguf as package

    parsed, reader = [], package.GGUFReader

    class Counted(reader):
        def __init__(self, path, *more):
            parsed.append(path)
            super().__init__(path, *more)

    monkeypatch.setattr(package, "GGUFReader", Counted)
    load_language_model(gguf)
    assert len(parsed) == 1 and package.GGUFReader is Counted


def test_a_gguf_file_is_quantised_once_more(gguf):
    pytest.importorskip("bitsandbytes")
    model = load_language_model(gguf, quantization="nf4", dtype="bfloat16")
    assert quantised(model.model) and precision(model.model) == "bfloat16"
    assert type(model.model.model.layers[0].self_attn.q_proj).__name__ == "Linear4bit"


# ---- in memory ----


def test_a_model_in_memory_is_copied_and_asked_for_again(tiny_lm, stream, tmp_path):
    folder = tiny_lm("llama")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    own = AutoModelForCausalLM.from_pretrained(folder)
    before = {name: t.clone() for name, t in own.state_dict().items()}
    made = learner((own, tokenizer), "lora", tmp_path / "a")
    made.learn(stream)
    assert all(torch.equal(t, before[name]) for name, t in own.state_dict().items())
    learner(folder, "lora", tmp_path / "b").learn(stream)
    commits = [tmp_path / x / "commits" / "0002-news" / "adapter_model.safetensors" for x in "ab"]
    assert commits[0].read_bytes() == commits[1].read_bytes()
    with pytest.raises(RunError, match="in memory: give it again"):
        pt.Learner.open(tmp_path / "a")
    prompts = stream.tasks[0].test["prompt"][:]
    for given in ({"model": own, "processor": tokenizer}, {"model": (own, tokenizer)}, {"model": folder}):
        assert pt.Learner.open(tmp_path / "a", **given).predict(prompts) == made.predict(prompts)
    other = AutoModelForCausalLM.from_pretrained(tiny_lm("llama", seed=1))
    with pytest.raises(RunError, match="another base model than `LlamaForCausalLM in memory`"):
        pt.Learner.open(tmp_path / "a", model=(other, tokenizer))
    with pytest.raises(ConfigError, match="without what reads its inputs"):
        pt.Learner(own)
    with pytest.raises(ConfigError, match="leave dtype out"):
        learner((own, tokenizer), "lora", dtype="bfloat16").learn(stream)


def test_an_encoder_in_memory(tiny_bert, word_stream, tmp_path):
    from transformers import AutoModel

    folder, stream = tiny_bert(), pt.load_stream(word_stream, tasks=["films"])
    model = AutoModel.from_pretrained(folder, add_pooling_layer=False)
    made = learner((model, AutoTokenizer.from_pretrained(folder)), "lora", tmp_path / "a")
    made.learn(stream)
    learner(folder, "lora", tmp_path / "b").learn(stream)
    commits = [tmp_path / x / "commits" / "0001-films" / "adapter_model.safetensors" for x in "ab"]
    assert commits[0].read_bytes() == commits[1].read_bytes()


# ---- devices and attention ----


def test_attention_and_device_map_reach_the_model(tiny_lm, stream, tmp_path):
    made = learner(tiny_lm("llama"), "lora", tmp_path, attn_implementation="eager", device_map="cpu")
    made.learn(stream)
    assert made.backbone.model.config._attn_implementation == "eager"
    assert pt.runs.directory.read_config(tmp_path)["model"]["attn_implementation"] == "eager"
    assert pt.Learner.open(tmp_path).backbone.model.config._attn_implementation == "eager"
