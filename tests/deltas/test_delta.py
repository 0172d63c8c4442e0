from __future__ import annotations

import hashlib
import json
import math
import random
import struct
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from perpetune.core.errors import DeltaError, PerpetuneError
from perpetune.deltas.combine import merge
from perpetune.deltas.delta import BODY, CHECKSUM, Delta
from perpetune.deltas.extract import extract
from perpetune.deltas.overlap import overlap
from perpetune.deltas.seeded_mask import CHUNK, SeededMask, tensor_id
from perpetune.deltas.storage import GROUP

VECTORS = json.loads((Path(__file__).parents[1] / "data" / "delta_vector.json").read_text())
BASE = "0" * 64


def seeded(task_key: int = 1, scheme: str = "stratified", keep: float = 0.1, slot: int | None = None) -> SeededMask:
    return SeededMask.of(scheme, keep, seed=7, task_key=task_key, slot=slot)


def models(
    shapes: dict[str, tuple[int, ...]], tasks: int, dtype: torch.dtype = torch.float32
) -> list[dict[str, Tensor]]:
    """theta_0, theta_1, ..."""
    generator = torch.Generator().manual_seed(0)
    base = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
    changed = [
        {n: (t.float() + 1e-2 * torch.randn(t.shape, generator=generator)).to(dtype) for n, t in base.items()}
        for _ in range(tasks)
    ]
    return [base, *changed]


def stored(delta: Delta, folder: Path) -> Delta:
    """Through a file and back."""
    file = folder / "delta.safetensors"
    save_file(delta.to_tensors(), file, metadata=delta.metadata())
    return Delta.from_tensors(*opened(file))


def opened(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    with safe_open(file, "pt") as content:
        return {key: content.get_tensor(key) for key in content.keys()}, content.metadata()  # noqa: SIM118


def bits_of(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[n].dtype == b[n].dtype and bits_of(a[n]) == bits_of(b[n]) for n in a)


# --- the equation


def test_a_merge_is_the_base_and_the_masked_deltas():
    base, *tuned = models({"w": (50, 40), "b": (40,)}, 3)
    masks = [seeded(1), seeded(2, "bernoulli", 0.3), seeded(3, "disjoint", 0.2, slot=4)]
    deltas = [extract(base, t, m, fingerprint=BASE) for t, m in zip(tuned, masks, strict=True)]
    merged = dict(merge(base, deltas, [1, 0.5, -2], fingerprint=BASE))
    for name, theta_0 in base.items():
        expected = theta_0.double().view(-1)
        for scale, t, m in zip([1, 0.5, -2], tuned, masks, strict=True):
            kept = torch.zeros(theta_0.numel(), dtype=torch.float64)
            kept[torch.from_numpy(m.positions(tensor_id(name), theta_0.numel(), 0))] = 1
            expected = expected + scale * kept * (t[name].double() - theta_0.double()).view(-1)
        assert merged[name].shape == theta_0.shape
        assert torch.allclose(merged[name].double().view(-1), expected, rtol=0, atol=1e-6)


def mixed(base: dict[str, Tensor], tuned: list[dict[str, Tensor]], storage: str = "fp32") -> list[Delta]:
    """Deltas whose chunks end in different places, of every kind of mask."""
    chosen = {name: t.abs() > 1.5 for name, t in base.items()}
    return [
        extract(base, tuned[0], seeded(40, "stratified", 1 / 7), fingerprint=BASE, storage=storage),
        extract(base, tuned[1], seeded(2**64 - 1, "bernoulli"), fingerprint=BASE, storage=storage, dense=["b"]),
        extract(base, tuned[2], seeded(3), fingerprint=BASE, storage=storage, bits=chosen),
        extract(base, tuned[3], seeded(4, "disjoint", 1e-3, slot=999), fingerprint=BASE, storage=storage),
    ]


SCALES = [1.0, 0.3, -1.7, 10.0]


def dense_sum(base: dict[str, Tensor], deltas: list[Delta], scales: list[float]) -> dict[str, Tensor]:
    """One task after the other, whole tensors, sorted by task key."""
    out = {}
    for name, theta_0 in base.items():
        total = torch.full(theta_0.shape, -0.0)
        for delta, scale in sorted(zip(deltas, scales, strict=True), key=lambda pair: pair[0].task_key):
            total = total + delta.dense(name) * scale
        out[name] = (theta_0.to(torch.promote_types(theta_0.dtype, torch.float32)) + total).to(theta_0.dtype)
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("storage", ["fp32", "int8"])
def test_chunks_give_the_bits_of_the_dense_sum_whatever_the_order(dtype, storage):
    base, *tuned = models({"w": (3, 2**17 + 77), "b": (500,), "scalar": ()}, 4, dtype)
    deltas = mixed(base, tuned, storage)
    expected = dense_sum(base, deltas, SCALES)
    for order in ([0, 1, 2, 3], [3, 1, 0, 2]):
        merged = dict(merge(base, [deltas[i] for i in order], [SCALES[i] for i in order], fingerprint=BASE))
        assert same_bits(merged, expected)


def test_without_a_delta_it_is_as_if_it_had_never_existed():
    base, *tuned = models({"w": (3, 2**17 + 77)}, 4)
    deltas = mixed({**base, "b": torch.zeros(9)}, [{**t, "b": torch.ones(9)} for t in tuned])
    base["b"] = torch.zeros(9)
    before = {name: t.clone() for name, t in base.items()}
    fewer = dict(merge(base, [deltas[3], deltas[0]], fingerprint=BASE))
    dict(merge(base, deltas, fingerprint=BASE))
    assert same_bits(dict(merge(base, [deltas[0], deltas[3]], fingerprint=BASE)), fewer)
    assert same_bits(dict(merge(base, deltas, [1, 0, 0, 1], fingerprint=BASE)), fewer)
    assert same_bits(dict(merge(base, [], fingerprint=BASE)), base)
    assert same_bits(base, before)


def test_negative_zeros_and_weights_that_nobody_keeps_stay_as_they_are():
    base = {"w": torch.full((100,), -0.0)}
    delta = extract(base, {"w": torch.ones(100)}, seeded(), fingerprint=BASE)
    merged = dict(merge(base, [delta], fingerprint=BASE))["w"]
    kept = merged == 1
    assert kept.sum() == 10 and torch.signbit(merged[~kept]).all()


def test_a_merge_writes_into_the_model(tiny_bert):
    from transformers import AutoModel

    from perpetune.models.backbone import fingerprint

    model = AutoModel.from_pretrained(tiny_bert(width=8, layers=1))
    base = {name: t.clone() for name, t in model.state_dict().items()}
    mark = fingerprint(model)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.5
    delta = extract(base, model.state_dict(), seeded(keep=1), fingerprint=mark)
    assert all(len(delta.parts[name].values) == p.numel() for name, p in model.named_parameters())
    state = model.state_dict()
    for deltas, change in (([delta], 0.5), ([], 0.0)):
        for name, tensor in merge(base, deltas, fingerprint=mark):
            state[name].copy_(tensor)
        assert all(torch.allclose(p, base[n] + change) for n, p in model.named_parameters())
    assert fingerprint(model) == mark


# --- storage

shapes = st.lists(st.integers(0, 30), max_size=3).map(tuple)


@settings(max_examples=40)
@given(
    shape=shapes,
    storage=st.sampled_from(["fp32", "bf16", "int8"]),
    scheme=st.sampled_from(["bernoulli", "stratified", "disjoint"]),
    kind=st.sampled_from(["seed", "bits", "dense"]),
    keep=st.sampled_from([1, 0.5, 0.1]),
    power=st.integers(-36, 30),
    number=st.integers(0, 2**32),
)
def test_what_is_stored_comes_back(shape, storage, scheme, kind, keep, power, number):
    generator = torch.Generator().manual_seed(number)
    change = torch.randn(shape, generator=generator) * 10.0**power
    base, tuned = {"x.y": torch.zeros(shape)}, {"x.y": change}
    delta = extract(
        base,
        tuned,
        seeded(5, scheme, keep, slot=0 if scheme == "disjoint" else None),
        fingerprint=BASE,
        storage=storage,
        dense=["x.y"] * (kind == "dense"),
        bits={"x.y": torch.rand(shape, generator=generator) < keep} if kind == "bits" else None,
    )
    with tempfile.TemporaryDirectory() as folder:
        again = stored(delta, Path(folder))
    assert again.metadata() == delta.metadata() and again.mask == delta.mask and again.count == delta.count
    if not change.numel():
        assert not delta.parts  # nothing can have changed
        return
    kept, back = delta.dense("x.y"), again.dense("x.y")
    assert bits_of(kept) == bits_of(back)
    if storage == "fp32":
        assert torch.equal(back, torch.where(back != 0, change, 0))
    else:
        error = (back - torch.where(kept != 0, change, 0)).abs()
        relative = 2**-8 * change.abs() if storage == "bf16" else 0.51 / 127 * 1.001 * change.abs().max()
        assert (error <= relative + 1e-45).all()
    if kind == "dense" and storage == "fp32":
        assert torch.equal(back, change)


@pytest.mark.parametrize("storage, one, scales", [("fp32", 4, 0), ("bf16", 2, 0), ("int8", 1, 2)])
def test_a_kept_value_costs_what_is_said(tmp_path, storage, one, scales):
    base, tuned = models({"w": (1000, 300), "b": (77,)}, 1)
    file = tmp_path / "delta.safetensors"
    delta = extract(base, tuned, seeded(), fingerprint=BASE, storage=storage)
    save_file(delta.to_tensors(), file, metadata=delta.metadata())
    header = struct.unpack("<Q", file.read_bytes()[:8])[0]
    groups = math.ceil(30_000 / 256) + 1  # of w, and of b
    assert delta.count == 30_000 + 7
    assert file.stat().st_size - 8 - header == one * delta.count + scales * groups
    assert header < 600 + 2 * 600
    chosen = extract(base, tuned, seeded(), fingerprint=BASE, storage=storage, bits={"b": torch.ones(77).bool()})
    expected = one * (30_000 + 77) + scales * groups + math.ceil(77 / 8)
    assert sum(t.nbytes for t in chosen.to_tensors().values()) == expected


@pytest.mark.parametrize("tail, bf16, int8", [("normal", 0.0017, 0.007), ("student", 0.0017, 0.018)])
@pytest.mark.parametrize("size", [1.0, 1e-9])  # fp16 alone has no scales for the second
def test_errors_of_storage_are_those_of_the_literature(tail, bf16, int8, size):
    generator = np.random.default_rng(0)
    draws = generator.standard_normal(500_000) if tail == "normal" else generator.standard_t(3, 500_000)
    d = torch.from_numpy(draws * size).float()
    for storage, expected in (("bf16", bf16), ("int8", int8)):
        delta = extract({"w": torch.zeros_like(d)}, {"w": d}, seeded(), fingerprint=BASE, storage=storage, dense=["w"])
        error = float((delta.dense("w") - d).norm() / d.norm())
        assert 0.7 * expected < error < 1.3 * expected


@pytest.mark.parametrize("case", VECTORS["cases"], ids=lambda c: f"{c['mask']['scheme']}-{c['storage']}")
def test_another_implementation_stores_the_same_bytes(case):
    """`delta_vector.json` was made without this package, from the specification."""

    def floats(text: str) -> dict[str, Tensor]:
        return {
            VECTORS["name"]: torch.from_numpy(np.frombuffer(bytes.fromhex(text), "<f4").copy()).view(VECTORS["shape"])
        }

    name, base, tuned = VECTORS["name"], floats(VECTORS["base"]), floats(VECTORS["tuned"])
    mask = SeededMask.from_json(case["mask"])
    chosen = None
    if "chosen" in case:
        chosen = torch.zeros(VECTORS["shape"], dtype=torch.bool)
        chosen.view(-1)[case["chosen"]] = True
    else:
        assert mask.positions(int(VECTORS["tensor_id"], 16), base[name].numel(), 0).tolist() == case["positions"]
    delta = extract(
        base,
        tuned,
        mask,
        fingerprint=VECTORS["fingerprint"],
        storage=case["storage"],
        bits=None if chosen is None else {name: chosen},
    )
    assert {key: bits_of(t).hex() for key, t in delta.to_tensors().items()} == case["tensors"]
    assert delta.metadata() == case["metadata"]
    for scale, key in ((1, "merged_sha256"), (0.3, "merged_0.3_sha256")):
        merged = dict(merge(base, [delta], [scale], fingerprint=VECTORS["fingerprint"]))[name]
        assert hashlib.sha256(bits_of(merged)).hexdigest() == case[key]


# --- what is in a delta, and what is not


def test_integers_and_unchanged_tensors_are_left_out():
    base = {"w": torch.zeros(20), "same": torch.ones(20), "seen": torch.tensor(3), "ids": torch.arange(4)}
    tuned = {"w": torch.ones(20), "same": torch.ones(20), "seen": torch.tensor(9), "ids": torch.arange(4)}
    delta = extract(base, tuned, seeded(), fingerprint=BASE)
    assert [*delta.parts] == ["w"] and delta.left_out == ("seen",)
    merged = dict(merge(base, [delta], fingerprint=BASE))
    assert merged.keys() == base.keys() and merged["seen"] == 3 and merged["w"].sum() == 2


@pytest.mark.parametrize("lost", ["nothing", "base", "tuned", "merged"])
def test_tied_weights_are_stored_once(tmp_path, lost):
    """A copied state dict no longer knows which of its tensors are one."""

    def state(w: Tensor, tied: bool) -> dict[str, Tensor]:
        return {"embedding": w, "head.decoder": w if tied else w.clone(), "other": w[:3]}

    w = torch.randn(40, 5)
    base, tuned = state(w, lost != "base"), state(w + 1, lost != "tuned")
    delta = stored(extract(base, tuned, seeded(), fingerprint=BASE), tmp_path)
    assert [*delta.parts] == ["embedding", "other"] and delta.tied == {"head.decoder": "embedding"}
    merged = dict(merge(state(w, lost != "merged"), [delta], fingerprint=BASE))
    assert torch.equal(merged["embedding"], merged["head.decoder"])
    assert (merged["embedding"] != w).sum() == 20
    # `named_parameters()` gives one name alone
    del base["head.decoder"], tuned["head.decoder"]
    alone = extract(base, tuned, seeded(), fingerprint=BASE)
    assert alone.tied == {} and same_bits(dict(merge(state(w, True), [alone], fingerprint=BASE)), merged)


def test_ties_that_contradict_each_other_are_refused():
    w = torch.zeros(40)
    tied = {"a": w, "b": w}
    with pytest.raises(DeltaError, match="a, b: one tensor in one of the models"):
        extract(tied, {"a": w + 1, "b": w + 2}, seeded(), fingerprint=BASE)
    loose = extract({"a": w, "b": w.clone()}, {"a": w + 1, "b": w + 1}, seeded(), fingerprint=BASE)
    with pytest.raises(DeltaError, match="a, b: one tensor in the base"):
        dict(merge(tied, [loose], fingerprint=BASE))


def test_two_tensors_of_one_shape_and_two_tasks_have_masks_of_their_own():
    base, *tuned = models({"q.weight": (64, 64), "v.weight": (64, 64)}, 2)
    one, two = (extract(base, t, seeded(k + 1), fingerprint=BASE) for k, t in enumerate(tuned))
    masks = [d.dense(name) != 0 for d in (one, two) for name in base]
    assert all(m.sum() == 409 for m in masks)
    assert all((a & b).sum() < 100 for i, a in enumerate(masks) for b in masks[:i])


def test_the_order_of_tensors_does_not_matter():
    base, tuned = models({"a": (50,), "b": (60,), "c": (70,)}, 1)
    names = ["c", "a", "b"]
    one = extract(base, tuned, seeded(), fingerprint=BASE)
    two = extract({n: base[n] for n in names}, {n: tuned[n] for n in names}, seeded(), fingerprint=BASE)
    assert one.metadata() == two.metadata() and same_bits(one.to_tensors(), two.to_tensors())


def test_deltas_of_bf16_weights_are_taken_in_fp32():
    base = {"w": torch.full((100,), 1.0, dtype=torch.bfloat16)}
    tuned = {"w": torch.full((100,), 1.0 + 2**-12)}  # between two bf16 values
    delta = extract(base, tuned, seeded(keep=1), fingerprint=BASE)
    assert set(delta.parts["w"].values.tolist()) == {2**-12}
    many = [Delta(seeded(k, keep=1), BASE, "fp32", delta.parts) for k in range(1, 65)]
    merged = dict(merge(base, many, fingerprint=BASE))["w"]
    assert merged.dtype == torch.bfloat16 and (merged == 1 + 2**-6).all()  # one by one, bf16 would lose them all


# --- collisions


def test_collisions_are_counted():
    base, *tuned = models({"w": (1000, 400), "b": (100,)}, 10)
    disjoint = [extract(base, t, seeded(k + 1, "disjoint", slot=k), fingerprint=BASE) for k, t in enumerate(tuned)]
    none = overlap(disjoint)
    assert none.collisions == 0 and none.hits.tolist() == [0, 400_100] + [0] * 9
    assert np.array_equal(none.common, np.diag([40_010] * 10))
    chance = [
        extract(base, t, seeded(k + 1, "bernoulli"), fingerprint=BASE, dense=["b"] * (k == 0))
        for k, t in enumerate(tuned)
    ]
    found = overlap(chance)
    assert found.hits.sum() == 400_100 and abs(found.collisions / 400_100 - 0.264) < 0.003
    share = found.share[~np.eye(10, dtype=bool)]
    assert abs(share.mean() - 0.1) < 0.001 and found.common[0, 0] == len(chance[0].parts["w"].values)
    assert (found.hits * np.arange(11)).sum() == sum(d.count for d in chance) - 100


def test_overlap_of_masks_with_different_chunks_is_that_of_dense_masks():
    base, *tuned = models({"w": (3, 2**17 + 77), "b": (500,)}, 4)
    deltas = mixed(base, tuned)[:3]
    found = overlap(deltas)
    sets = [
        {n: set(d.walk(n).until(t.numel())[0]) for n, t in base.items() if d.parts[n].mask != "dense"} for d in deltas
    ]
    expected = [[sum(len(a[n] & b[n]) for n in a.keys() & b.keys()) for b in sets] for a in sets]
    assert found.common.tolist() == expected


def test_rescaled_deltas_keep_their_mean_and_1_of_T_is_the_average():
    base, *tuned = models({"w": (20, 1000)}, 5)
    d = [t["w"] - base["w"] for t in tuned]
    ratio, gap = [], []
    for seed in range(20):
        masks = [SeededMask.of("stratified", 0.2, seed=seed, task_key=k + 1) for k in range(5)]
        deltas = [extract(base, t, m, fingerprint=BASE) for t, m in zip(tuned, masks, strict=True)]
        merged = dict(merge(base, deltas, fingerprint=BASE))["w"]
        total = merged - base["w"]
        ratio.append(float((total * sum(d)).sum() / (0.2 * sum(d)).mul(sum(d)).sum()))
        gap.append(total - sum(d) / 5)
    assert abs(np.mean(ratio) - 1) < 0.01
    # around the average model there is noise alone, of variance q (1 - q) sum d^2, and it averages out
    noise = math.sqrt(0.2 * 0.8) * float(sum(x**2 for x in d).mean()) ** 0.5
    assert float(torch.stack(gap).std()) == pytest.approx(noise, rel=0.02)
    assert float(torch.stack(gap).mean(0).std()) == pytest.approx(noise / math.sqrt(20), rel=0.02)


# --- refusals


@pytest.fixture
def delta() -> Delta:
    base, tuned = models({"w": (100, 30), "v": (100, 30)}, 1)
    chosen = {"v": base["v"] > 1}
    return extract(base, tuned, seeded(0xABC), fingerprint=BASE, storage="int8", bits=chosen)


@pytest.mark.parametrize("key", ["values.w", "scales.w", "values.v", "scales.v", "bits.v"])
@pytest.mark.parametrize("harm", ["flip", "remove"])
def test_damaged_and_missing_tensors_are_named(delta, key, harm):
    tensors = {k: t.clone() for k, t in delta.to_tensors().items()}
    message = f"tensor `{key}` of the delta of task 0xabc is missing"
    if harm == "flip":
        tensors[key].view(torch.uint8)[3] ^= 1
        message = f"tensor `{key.split('.')[1]}` of the delta of task 0xabc is damaged"
    else:
        del tensors[key]
    with pytest.raises(DeltaError, match=message):
        Delta.from_tensors(tensors, delta.metadata())


def altered(delta: Delta, change: dict, tensor: dict | None = None) -> dict[str, str]:
    """Metadata that say something else, and whose checksum is right."""
    body = {**json.loads(delta.metadata()[BODY]), **change}
    body["tensors"]["w"].update(tensor or {})
    text = json.dumps(body)
    return {BODY: text, CHECKSUM: hashlib.sha256(text.encode()).hexdigest()}


def test_metadata_are_checked(delta):
    tensors, metadata = delta.to_tensors(), delta.metadata()
    for nothing in (None, {}, {"format": "pt"}, {BODY: metadata[BODY]}):
        with pytest.raises(DeltaError, match="this is no delta"):
            Delta.from_tensors(tensors, nothing)
    with pytest.raises(DeltaError, match="metadata of this delta are damaged"):
        Delta.from_tensors(tensors, {**metadata, BODY: metadata[BODY].replace("0xabc", "0xabd").replace("abc", "abd")})
    mask = delta.mask.to_json()
    for change, tensor, message in (
        ({"format": 2}, None, "deltas of format 2"),
        ({"group": 64}, None, "groups of 64"),
        ({"mask": {**mask, "version": 1}}, None, "mask version 1 is not known"),
        ({"mask": {**mask, "scheme": "splitmix"}}, None, "no mask scheme `splitmix`"),
        ({"mask": {**mask, "B": 20}}, None, "tensor `w` .* holds 300 values, but its mask keeps 150"),
        ({}, {"count": 299}, "holds 300 values"),
        ({"storage": "bf16"}, None, "is damaged"),
    ):
        with pytest.raises(DeltaError, match=message):
            Delta.from_tensors(tensors, altered(delta, change, tensor))
    with pytest.raises(DeltaError, match="tensor `values.x` is no part of the delta"):
        Delta.from_tensors({**tensors, "values.x": torch.zeros(3)}, metadata)
    assert Delta.from_tensors(tensors, metadata).metadata() == metadata


def test_merges_that_cannot_be_right_are_refused():
    base, *tuned = models({"w": (100,)}, 2)
    one, two = (extract(base, t, seeded(k + 1), fingerprint=BASE) for k, t in enumerate(tuned))
    for arguments, message in (
        ({"fingerprint": "f" * 64}, "another base model .weights 000000000000, these are ffffffffffff."),
        ({"deltas": [one, two, one]}, "two deltas have the task key 0x1"),
        ({"scales": [1.0]}, "2 deltas and 1 scales"),
        ({"base": {}}, "no tensor `w` of shape"),
        ({"base": {"w": torch.zeros(10, 10)}}, "no tensor `w` of shape"),
    ):
        with pytest.raises(DeltaError, match=message):  # at once, not with the first tensor
            merge(**{"base": base, "deltas": [one, two], "fingerprint": BASE, **arguments})
    with pytest.raises(DeltaError, match="two deltas have the task key"):
        overlap([one, one])
    with pytest.raises(DeltaError, match="another base model"):
        overlap([one, Delta(two.mask, "f" * 64, "fp32", two.parts)])


@pytest.mark.parametrize(
    "change, message",
    [
        ({"tuned": {}}, "`w` is in one of the two models alone"),
        ({"tuned": {"w": torch.zeros(100), "head": torch.zeros(3)}}, "`head` is in one of the two models alone"),
        ({"tuned": {"w": torch.zeros(10, 10)}}, "shape .100,. in the base and .10, 10. tuned"),
        ({"tuned": {"w": torch.full((100,), math.nan)}}, "`w` has changed by values that are not finite"),
        ({"dense": ["v"]}, "no tensor `v`"),
        ({"bits": {"v": torch.ones(100).bool()}}, "no tensor `v`"),
        ({"bits": {"w": torch.ones(99).bool()}}, "mask of `w` must be boolean and of shape"),
        ({"bits": {"w": torch.ones(100)}}, "mask of `w` must be boolean"),
    ],
)
def test_deltas_that_cannot_be_taken_are_refused(change, message):
    arguments = {"base": {"w": torch.zeros(100)}, "tuned": {"w": torch.ones(100)}, **change}
    for storage in ("fp32", "int8"):
        with pytest.raises(DeltaError, match=message):
            extract(mask=seeded(), fingerprint=BASE, storage=storage, **arguments)


def test_a_wrong_base_is_refused_before_anything_is_written(tiny_bert):
    from transformers import AutoModel

    from perpetune.models.backbone import fingerprint

    one, two = (AutoModel.from_pretrained(tiny_bert(width=8, layers=1, seed=seed)) for seed in (0, 1))
    delta = extract(one.state_dict(), two.state_dict(), seeded(), fingerprint=fingerprint(one))
    with pytest.raises(PerpetuneError, match="another base model"):
        merge(two.state_dict(), [delta], fingerprint=fingerprint(two))


def test_windows_of_any_length_give_every_value_once():
    base, tuned = models({"w": (3, 2**17 + 77)}, 1)
    for delta in mixed({**base, "b": torch.zeros(9)}, [{**tuned, "b": torch.ones(9)}] * 4, "int8"):
        size = base["w"].numel()
        generator = random.Random(0)
        stops = sorted({size, *(generator.randrange(size) for _ in range(40)), CHUNK, CHUNK - 1, GROUP})
        pairs = list(zip([0, *stops], stops, strict=False))
        walk, whole = delta.walk("w"), delta.walk("w").until(size)
        pieces = [(start + positions, values) for start, stop in pairs for positions, values in [walk.until(stop)]]
        assert all((p < stop).all() for (p, _), (_, stop) in zip(pieces, pairs, strict=True))
        for piece, expected in zip(zip(*pieces, strict=True), whole, strict=True):
            assert np.array_equal(np.concatenate(piece), expected)
