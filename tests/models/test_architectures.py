"""Whatever architecture is loaded: a text has the same features alone and in a batch, on whichever side its tokenizer
pads; texts are cut to the positions that a model has; tokens that it has no embedding for are named."""

from __future__ import annotations

import json
import shutil

import datasets
import pytest
import torch

from perpetune import ConfigError, ModelError
from perpetune.models.loading import load_backbone, load_language_model

SPECIAL = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")  # the padding token is token 1, as in RoBERTa
TEXTS = ("a", "hello world, this is a longer text", "b c", "", "good movie " * 40)
COMMON = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
PLACES = {"max_position_embeddings": 66}
NARROW = {"embedding_size": 16}
MARKS = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
DEBERTA = {
    "type_vocab_size": 0, "relative_attention": True, "position_buckets": 16, "pos_att_type": ["p2c", "c2p"],
    "position_biased_input": False, "norm_rel_ebd": "layer_norm", "share_att_key": True,
}  # fmt: skip
ENDS = {"cls_token_id": 0, "sep_token_id": 2}
FNET = {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64, "tpu_short_seq_length": 66}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 66}
DISTIL = {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64}
XLNET = {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 64}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
HEADS = {"num_key_value_heads": 2}
# name of the classes, settings, tokens that fit (None: 256, our own limit)
ARCHITECTURES = {
    "Bert": ({**COMMON, **PLACES}, 66),
    "Roberta": ({**COMMON, **PLACES}, 64),
    "XLMRoberta": ({**COMMON, **PLACES}, 64),
    "DistilBert": ({**DISTIL, **PLACES}, 66),
    "Albert": ({**COMMON, **PLACES, **NARROW}, 66),
    "Electra": ({**COMMON, **PLACES, **NARROW}, 66),
    "DebertaV2": ({**COMMON, **PLACES, **DEBERTA}, 66),
    "MPNet": ({**COMMON, **PLACES}, 64),
    "ModernBert": ({**COMMON, **PLACES, **ENDS}, 66),
    "ConvBert": ({**COMMON, **PLACES, **NARROW}, 66),
    "FNet": ({**FNET, **PLACES}, 66),
    "Nystromformer": ({**COMMON, **PLACES}, 66),
    "XLNet": (XLNET, None),
    "T5": (T5, None),
    "GPT2": (GPT2, 66),
    "Llama": ({**COMMON, **PLACES, **HEADS}, 66),
    "Qwen2": ({**COMMON, **PLACES, **HEADS}, 66),
    "Mamba": ({"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}, None),
}
PADDED = {"ConvBert", "FNet", "Nystromformer"}  # they read their padding


def tokenizer(side="right", added=(), adds="<s> $A </s>"):
    """Bytes, as GPT-2 reads them, between marks; types 1 for the second text of a pair. It names no limit."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {piece: i for i, piece in enumerate((*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())))}
    fast = Tokenizer(models.BPE(vocabulary, []))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    fast.post_processor = processors.TemplateProcessing(
        single=adds, pair="<s> $A </s> $B:1 </s>:1", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    names = ("bos_token", "pad_token", "eos_token", "unk_token", "mask_token")
    made = PreTrainedTokenizerFast(
        tokenizer_object=fast, padding_side=side, **dict(zip(names, SPECIAL, strict=True)), cls_token="<s>",
        sep_token="</s>", model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )  # fmt: skip
    made.add_tokens(list(added))
    return made


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """`made("Bert", side="left", kind="Model", added=[...], adds="$A", rows=None)`: a folder with a random model and
    its tokenizer."""
    import transformers

    def make(name, kind="Model", side="right", added=(), adds="<s> $A </s>", **settings):
        torch.manual_seed(0)
        words = tokenizer(side, added, adds)
        plain = {"vocab_size": len(tokenizer()), **ARCHITECTURES[name][0], **MARKS, **settings}
        config = getattr(transformers, f"{name}Config")(**plain)
        model = getattr(transformers, f"{name}{kind}")(config)
        for parameter in model.parameters():  # their own spread leaves all texts nearly alike in so narrow a model
            if parameter.ndim == 2:
                torch.nn.init.normal_(parameter, std=0.2)
        folder = tmp_path_factory.mktemp(name)
        model.save_pretrained(folder)
        words.save_pretrained(folder)
        return folder

    return make


def rows(texts, **more):
    return datasets.Dataset.from_dict({"text": list(texts), **more, "label": [0] * len(texts), "id": [""] * len(texts)})


def apart(one, other):
    return float((one - other).norm() / other.norm())


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_text_has_the_same_features_alone_and_in_a_batch(made, name, side):
    backbone = load_backbone(made(name, side=side), "text")
    assert backbone.max_length == (ARCHITECTURES[name][1] or 256)
    assert backbone.pads_all == (name in PADDED)
    examples = backbone.prepare(rows(TEXTS))
    assert len(examples[-1]["input_ids"]) == backbone.max_length
    alone = backbone.features(examples, 1)
    assert alone.isfinite().all() and alone.std() > 0.01
    assert apart(alone[0], alone[1]) > 1e-3  # another text is another thing
    for size in (2, 5):
        together = backbone.features(examples, size)
        assert max(apart(a, b) for a, b in zip(together, alone, strict=True)) < 1e-4


@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
@pytest.mark.parametrize("name", ["Bert", "Roberta", "GPT2"])
def test_the_side_on_which_a_tokenizer_pads_is_no_matter(made, name, pooling):
    found = []
    for side in ("right", "left"):
        backbone = load_backbone(made(name, side=side), "text", pooling=pooling)
        found.append(backbone.features(backbone.prepare(rows(TEXTS)), 5))
    assert torch.equal(*found)


def test_the_encoder_of_a_t5_is_what_its_whole_model_computes(made, tmp_path):
    import transformers

    folder = made("T5", kind="ForConditionalGeneration", decoder_start_token_id=1)
    backbone = load_backbone(folder, "text")
    example = backbone.prepare(rows(["hello world"]))
    whole = transformers.AutoModel.from_pretrained(folder).eval()
    ids = torch.tensor([example[0]["input_ids"]])
    with torch.no_grad():
        expected = whole(input_ids=ids, decoder_input_ids=ids).encoder_last_hidden_state.mean(1)
    assert apart(backbone.features(example, 1), expected) < 1e-5
    assert not any("decoder" in name for name, _ in backbone.model.named_parameters())
    backbone.model.save_pretrained(tmp_path)
    backbone.save_processors(str(tmp_path))
    again = load_backbone(tmp_path, "text")
    assert again.fingerprint == backbone.fingerprint


def test_an_encoder_that_does_not_stand_alone_is_refused(tmp_path):
    import transformers

    sizes = {f"{part}_{what}": n for part in ("encoder", "decoder")
             for what, n in (("layers", 1), ("attention_heads", 2), ("ffn_dim", 16))}  # fmt: skip
    config = transformers.BartConfig(vocab_size=len(tokenizer()), d_model=16, max_position_embeddings=64, **sizes)
    transformers.BartForConditionalGeneration(config).save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="--pose instruction") as told:
        load_backbone(tmp_path, "text")
    assert "\n" not in str(told.value)


def test_a_pair_reads_token_types_where_the_model_has_them(made):
    for name, types in (("Bert", 2), ("Roberta", 1)):
        backbone = load_backbone(made(name, type_vocab_size=types), "text")
        examples = backbone.prepare(rows(["a", "b"], text_pair=["c", "d"]))
        assert ("token_type_ids" in examples[0]) == (types == 2)
        assert backbone.features(examples, 2).isfinite().all()


def test_a_text_without_tokens_is_answered(made):
    backbone = load_backbone(made("GPT2", adds="$A"), "text", pooling="last")
    examples = backbone.prepare(rows(["", "good movie", ""]))
    assert [len(e["input_ids"]) for e in examples] == [1, 10, 1]
    alone, together = backbone.features(examples, 1), backbone.features(examples, 3)
    assert together.isfinite().all() and apart(together, alone) < 1e-5
    assert torch.equal(together[0], together[2])


def test_a_prompt_without_tokens_is_answered(made):
    model = load_language_model(made("GPT2", kind="LMHeadModel", adds="$A"))
    model.open(["yes", "no"], ["options", "generate"], longest=2)
    prompts = datasets.Dataset.from_dict({"prompt": ["", "good movie"], "label": [0, 1], "id": ["", ""]})
    examples = model.prepare(prompts)
    assert len(examples[0]["input_ids"]) == 1
    alone, together = (model.outputs(examples, size, classes=[0, 1]) for size in (1, 2))
    assert together.isfinite().all() and apart(together, alone) < 1e-4


# ---- tokens that a model does not know ----


def test_a_padding_token_beyond_the_embedding_is_replaced(made):
    folder = made("GPT2")
    words = tokenizer(added=["[PAD]"])
    words.pad_token = "[PAD]"
    words.save_pretrained(folder)
    backbone = load_backbone(folder, "text")
    assert backbone.processor.pad_token == "</s>"
    examples = backbone.prepare(rows(TEXTS))
    assert apart(backbone.features(examples, 5), backbone.features(examples, 1)) < 1e-5
    model = load_language_model(made_again(made, words))
    model.open(["yes", "no"], ["options"])
    assert model.tokens.pad == model.tokens.end
    asked = datasets.Dataset.from_dict({"prompt": ["a", "good movie"], "label": [0, 1], "id": ["", ""]})
    assert model.outputs(model.prepare(asked), 2).isfinite().all()


def made_again(made, words):
    folder = made("GPT2", kind="LMHeadModel")
    words.save_pretrained(folder)
    return folder


def test_an_added_token_that_the_model_has_no_embedding_for_is_named(made):
    backbone = load_backbone(made("Bert", added=["<order>"]), "text")
    assert backbone.prepare(rows(["good movie"]))
    with pytest.raises(ModelError, match=r"`<order>` is token 261, and .* has embeddings for 261 alone"):
        backbone.prepare(rows(["good movie", "my <order> is late"]))
    model = load_language_model(made("GPT2", kind="LMHeadModel", added=["<order>"]))
    model.open(["yes", "no"], ["options"])
    with pytest.raises(ModelError, match="`<order>` is token 261"):
        model.prepare(datasets.Dataset.from_dict({"prompt": ["my <order>"], "label": [0], "id": [""]}))
    with pytest.raises(ModelError, match="`<order>` is token 261"):
        model.open(["yes", "<order>"], ["options"])


@pytest.mark.parametrize("load", [lambda f: load_backbone(f, "text"), load_language_model])
def test_the_tokenizer_of_another_model_is_refused(made, load):
    with pytest.raises(ModelError, match="knows 261 tokens, and the model has embeddings for 200"):
        load(made("GPT2", kind="LMHeadModel", vocab_size=200))


def test_a_pooler_with_random_weights_is_refused(made):
    with pytest.raises(ModelError, match="hold no pooler"):
        load_backbone(made("Bert", kind="ForMaskedLM"), "text", pooling="pooler")


# ---- language models ----


def test_a_decoder_whose_positions_start_behind_the_padding_index(made):
    """RoBERTa as a decoder: as transformers reads it alone, and no longer than it has positions."""
    model = load_language_model(made("Roberta", kind="ForCausalLM", is_decoder=True))
    model.open(["yes", "no"], ["options"])
    assert model.max_length == 64 and model.limit == 64 - 5  # ` yes` byte by byte, and an end
    asked = datasets.Dataset.from_dict({"prompt": ["a", "good movie " * 20], "label": [0, 1], "id": ["", ""]})
    examples = model.prepare(asked)
    found = model.eval().outputs(examples, 2, classes=[0, 1])
    for example, row in zip(examples, found, strict=True):
        for c in (0, 1):
            prompt, answer = example["input_ids"], list(model.tokens.answer(model.labels[c], example["blank"]))
            with torch.no_grad():
                logits = model.model(input_ids=torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1]
            expected = logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None]).sum()
            assert float(row[c]) == pytest.approx(float(expected), rel=1e-4)


def test_a_model_that_sees_what_follows_is_no_language_model(made):
    with pytest.raises(ModelError, match="sees what follows"):
        load_language_model(made("Bert", kind="ForMaskedLM"))


def test_a_tokenizer_whose_files_are_missing_is_refused(tiny_bert, tmp_path):
    folder = shutil.copytree(tiny_bert(), tmp_path / "model")
    for path in folder.glob("token*"):
        path.unlink()
    with pytest.raises(ModelError, match="knows no word.*put the tokenizer's files"):
        load_backbone(folder, "text")


def test_weights_that_do_not_fit_their_configuration_are_refused(tiny_bert, tmp_path):
    folder = shutil.copytree(tiny_bert(), tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "hidden_size": 2 * config["hidden_size"]}))
    with pytest.raises(ModelError, match="cannot load"):
        load_backbone(folder, "text")


def test_a_length_without_room_for_a_text_is_refused(tiny_bert):
    with pytest.raises(ConfigError, match="max_length 2 leaves no room.*at least 3"):
        load_backbone(tiny_bert(), "text", max_length=2)


def test_a_path_that_leads_nowhere_is_no_name_on_the_hub(tmp_path):
    for load in (lambda path: load_backbone(path, "text"), load_language_model):
        with pytest.raises(ModelError, match="no such file or folder"):
            load(tmp_path / "nowhere")
