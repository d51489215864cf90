"""PEFT folders, by hand: names, shapes, products of the matrices, and what is refused. `tests/parity` has PEFT itself."""

import dataclasses
import json
import math

import jax
import numpy as np
import pytest

from itjax.base.schema import Lora
from itjax.hub import adapters, tensors
from itjax.models.config import Experts, ModelConfig

LLAMA = ModelConfig(
    vocab=24, layers=2, dim=8, heads=4, kv_heads=2, head_size=6, ffn=10, norm_eps=1e-6, tie_embeddings=True
)
PHI = dataclasses.replace(LLAMA, family="phi3", tie_embeddings=False)
QWEN_MOE = dataclasses.replace(LLAMA, family="qwen3_moe", experts=Experts(3, 2), qk_norm="head")
MIXTRAL = dataclasses.replace(LLAMA, family="mixtral", experts=Experts(3, 2))
GPT_OSS = dataclasses.replace(
    LLAMA, family="gpt_oss", experts=Experts(3, 2, bias=True), sinks=True, qkv_bias=True, out_bias=True,
    activation="swiglu_clamped",
)  # fmt: skip
PLAIN = Lora(rank=3, alpha=6.0)
SCALE = 2.0


def drawn(config, lora, places=None):
    """Leaves of adapters, by path."""
    rng, leaves = np.random.default_rng(0), {}
    for module in adapters.modules(config):
        lead = (config.layers, module.experts) if module.experts else (config.layers,)
        for part in module.parts:
            if places is None or part.place in places:
                shapes = {"lora_a": (*part.inputs, lora.rank), "lora_b": (lora.rank, *part.outputs)}
                shapes |= {"lora_m": part.outputs} if lora.dora else {}
                leaves |= {
                    f"{part.place}/{name}": rng.normal(size=lead + shape).astype(np.float32)
                    for name, shape in shapes.items()
                }
    return leaves


def write(folder, leaves, lora, config):
    """(adapter_config.json, tensors by name)"""
    adapters.write_peft(folder, adapters.tree.unflatten(leaves), lora, config, base="published/model")
    with tensors.Reader() as reader:
        found = {
            name: reader.read(tensor, tensors.Box(0, (math.prod(tensor.shape),), (1,))).reshape(tensor.shape)
            for name, tensor in tensors.header(folder / adapters.WEIGHTS).items()
        }
    return json.loads((folder / adapters.CONFIG).read_text()), found


def rewrite(folder, fields=None, named=None):
    """Another config or other tensors in the folder."""
    if fields is not None:
        (folder / adapters.CONFIG).write_text(json.dumps(fields))
    if named is not None:
        (folder / adapters.WEIGHTS).unlink()
        shapes = {name: value.shape for name, value in named.items()}
        tensors.write(folder / adapters.WEIGHTS, shapes, "F32", iter(named.values()))


def delta(leaves, place, layer, scale=SCALE):
    """scale · A · B of ours, as a matrix (inputs, outputs); of experts, one each."""
    a, b = leaves[f"{place}/lora_a"][layer], leaves[f"{place}/lora_b"][layer]
    if "mlp" in place and a.ndim == 3:
        return scale * np.einsum("eir,ero->eio", a, b)
    rank = a.shape[-1]
    return scale * a.reshape(-1, rank) @ b.reshape(rank, -1)


LAYER_1 = "base_model.model.model.layers.1."


def test_an_adapter_lies_where_peft_looks_for_it(tmp_path):
    leaves = drawn(LLAMA, PLAIN)
    fields, found = write(tmp_path, leaves, PLAIN, LLAMA)
    assert len(found) == 2 * 7 * LLAMA.layers
    np.testing.assert_array_equal(
        found[f"{LAYER_1}self_attn.q_proj.lora_A.weight"], leaves["layers/attn/q/lora_a"][1].T
    )
    a, b = (found[f"{LAYER_1}self_attn.o_proj.lora_{n}.weight"] for n in "AB")
    np.testing.assert_allclose(2.0 * (b @ a).T, delta(leaves, "layers/attn/o", 1), rtol=1e-5, atol=1e-5)
    assert fields["target_modules"] == ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    assert (fields["r"], fields["lora_alpha"], fields["base_model_name_or_path"]) == (3, 6, "published/model")


CASES = {
    "llama": (LLAMA, PLAIN),
    "llama, some": (LLAMA, dataclasses.replace(PLAIN, targets=("layers/attn/k", "layers/mlp/down"))),
    "llama, dora": (LLAMA, dataclasses.replace(PLAIN, dora=True, dropout=0.1)),
    "phi3": (PHI, PLAIN),
    "phi3, some": (PHI, dataclasses.replace(PLAIN, targets=("layers/attn/k", "layers/attn/v", "layers/mlp/up"))),
    "phi3, rank-stabilised dora": (PHI, dataclasses.replace(PLAIN, rank_stabilized=True, dora=True)),
    "qwen3_moe": (QWEN_MOE, PLAIN),
    "mixtral, rank-stabilised": (MIXTRAL, dataclasses.replace(PLAIN, rank_stabilized=True)),
    "gpt_oss": (GPT_OSS, PLAIN),
    "gpt_oss, one": (GPT_OSS, dataclasses.replace(PLAIN, targets=("layers/mlp/down",))),
}


@pytest.mark.parametrize("case", CASES)
def test_out_and_in_again_is_the_same_to_the_last_bit(tmp_path, case):
    config, lora = CASES[case]
    leaves = drawn(config, lora, lora.targets or None)
    write(tmp_path, leaves, lora, config)
    read, again = adapters.read_peft(tmp_path, config)
    assert read == lora
    assert again.keys() == leaves.keys()
    for path in leaves:
        np.testing.assert_array_equal(again[path], leaves[path], err_msg=path)


@pytest.mark.parametrize("stabilized", [False, True])
def test_a_fused_module_has_one_pair_of_the_summed_rank_with_the_same_product(tmp_path, stabilized):
    lora = dataclasses.replace(PLAIN, rank_stabilized=stabilized)
    leaves = drawn(PHI, lora)
    fields, found = write(tmp_path, leaves, lora, PHI)
    a, b = (found[f"{LAYER_1}self_attn.qkv_proj.lora_{n}.weight"] for n in "AB")
    assert (a.shape, b.shape) == ((9, 8), (24 + 12 + 12, 9))
    assert fields["rank_pattern"] == {"self_attn.qkv_proj": 9, "mlp.gate_up_proj": 6}
    alpha = fields["alpha_pattern"]["self_attn.qkv_proj"]
    theirs = alpha / (9**0.5 if stabilized else 9) * (b @ a).T
    scale = 6.0 / (3**0.5 if stabilized else 3)
    ours = np.concatenate([delta(leaves, f"layers/attn/{n}", 1, scale) for n in "qkv"], axis=1)
    np.testing.assert_allclose(theirs, ours, rtol=1e-5, atol=1e-5)


def test_a_fused_adapter_of_others_gives_each_part_its_a(tmp_path):
    """Every part has the A of all, and its own rows of B."""
    fields, found = write(tmp_path, drawn(PHI, PLAIN), PLAIN, PHI)
    rng = np.random.default_rng(1)
    for name, value in found.items():
        width = value.shape[1 if "lora_A" in name else 0]
        found[name] = rng.normal(size=(3, width) if "lora_A" in name else (width, 3)).astype(np.float32)
    rewrite(tmp_path, fields | {"rank_pattern": {}, "alpha_pattern": {}}, found)
    lora, leaves = adapters.read_peft(tmp_path, PHI)
    assert lora == PLAIN
    a, b = (found[f"{LAYER_1}self_attn.qkv_proj.lora_{n}.weight"] for n in "AB")
    ours = np.concatenate([delta(leaves, f"layers/attn/{n}", 1) for n in "qkv"], axis=1)
    np.testing.assert_allclose(ours, 2.0 * (b @ a).T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("config", [QWEN_MOE, MIXTRAL, GPT_OSS], ids=lambda config: config.family)
def test_experts_are_one_pair_for_each_parameter(tmp_path, config):
    """Products as PEFT's ParamWrapper makes them, of the outermost (down) and of the one within (gate and up)."""
    leaves = drawn(config, PLAIN)
    fields, found = write(tmp_path, leaves, PLAIN, config)
    assert fields["target_parameters"] == ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]

    def product(name, scale):
        a, b = (found[f"{LAYER_1}mlp.experts.{name}lora_{n}.weight"] for n in "AB")
        a_Eri, b_orE = a.reshape(3, -1, a.shape[1]), b.reshape(len(b), -1, 3)
        return scale * np.einsum("orE,Eri->Eio", b_orE, a_Eri)

    np.testing.assert_allclose(product("", 6 / 3), delta(leaves, "layers/mlp/down", 1), rtol=1e-4, atol=1e-4)
    both = product("base_layer.", fields["alpha_pattern"]["mlp.experts.gate_up_proj"] / 6)
    gate, up = (both[..., 0::2], both[..., 1::2]) if config is GPT_OSS else (both[..., :10], both[..., 10:])
    np.testing.assert_allclose(gate, delta(leaves, "layers/mlp/gate", 1), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(up, delta(leaves, "layers/mlp/up", 1), rtol=1e-4, atol=1e-4)


def test_patterns_of_rank_and_alpha_keep_every_product(tmp_path):
    """A smaller rank is filled with zeros, another scale goes into B."""
    leaves = drawn(LLAMA, PLAIN)
    fields, found = write(tmp_path, leaves, PLAIN, LLAMA)
    found = {
        name: (value[:2] if "lora_A" in name else value[:, :2]) if "o_proj" in name else value
        for name, value in found.items()
    }
    rewrite(tmp_path, fields | {"rank_pattern": {"o_proj": 2}, "alpha_pattern": {"self_attn.(o|v)_proj": 5}}, found)
    lora, read = adapters.read_peft(tmp_path, LLAMA)
    a, b = (found[f"{LAYER_1}self_attn.o_proj.lora_{n}.weight"] for n in "AB")
    assert lora == PLAIN
    np.testing.assert_allclose(delta(read, "layers/attn/o", 1), 5 / 2 * (b @ a).T, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(delta(read, "layers/attn/v", 1), delta(leaves, "layers/attn/v", 1) * 5 / 6, rtol=1e-5)
    np.testing.assert_array_equal(read["layers/attn/q/lora_b"], leaves["layers/attn/q/lora_b"])


def test_embedding_and_norms_travel_as_whole_modules_and_a_tied_head_with_the_embedding(tmp_path):
    lora = dataclasses.replace(PLAIN, targets=("layers/attn/q",), also=("embed/*", "layers/mlp_norm/*"))
    leaves = drawn(LLAMA, PLAIN, lora.targets)
    leaves["embed/kernel"] = np.arange(24 * 8, dtype=np.float32).reshape(24, 8)
    leaves["layers/mlp_norm/scale"] = np.ones((2, 8), np.float32) * 3
    fields, found = write(tmp_path, leaves, lora, LLAMA)
    assert fields["modules_to_save"] == ["lm_head", "model.embed_tokens", "post_attention_layernorm"]
    assert np.array_equal(found["base_model.model.lm_head.weight"], leaves["embed/kernel"])
    read, again = adapters.read_peft(tmp_path, LLAMA)
    assert read.also == ("embed/kernel", "layers/mlp_norm/scale")
    assert all(np.array_equal(again[path], leaves[path]) for path in leaves)
    rewrite(tmp_path, named=found | {"base_model.model.lm_head.weight": leaves["embed/kernel"] + 1})
    with pytest.raises(ValueError, match=r"lm_head.weight differs from the embedding that it is tied to"):
        adapters.read_peft(tmp_path, LLAMA)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"peft_type": "IA3"}, r"adapter_config.json: peft_type: 'IA3' is not read, only 'LORA'; merge it"),
        ({"bias": "all"}, "bias: 'all' is not read"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights: 'pissa' is not read"),
        ({"layers_to_transform": [0]}, "layers_to_transform"),
        ({"r": 0}, "r and lora_alpha: 0 and 6"),
        ({"lora_alpha": None}, "r and lora_alpha: 3 and None"),
        ({"lora_dropout": 1.0}, "lora_dropout: 1.0"),
        ({"alpha_pattern": {"(": 3}}, r"alpha_pattern: '\('.*regular expression"),
        ({"alpha_pattern": {"q_proj": "6"}}, "alpha_pattern: 'q_proj': '6' should be a number"),
    ],
)
def test_settings_that_would_change_the_result_are_refused(tmp_path, change, message):
    fields, _ = write(tmp_path, drawn(LLAMA, PLAIN), PLAIN, LLAMA)
    rewrite(tmp_path, fields | change)
    with pytest.raises(ValueError, match=message):
        adapters.read_peft(tmp_path, LLAMA)


def test_tensors_that_do_not_fit_are_refused(tmp_path):
    _, found = write(tmp_path, drawn(LLAMA, PLAIN), PLAIN, LLAMA)
    name = f"{LAYER_1}self_attn.q_proj.lora_A.weight"
    without = {other: value for other, value in found.items() if other != name}
    for named, message in (
        (found | {f"{LAYER_1}mlp.experts.0.w1.lora_A.weight": found[name]}, "1 tensors have no place here.*merge it"),
        (without, r"self_attn.q_proj has no adapter in layers \[1\]"),
        (found | {name: found[name][:, :5]}, r"shape \(3, 5\), and this model takes floats of anyx8"),
        (found | {name: found[name][:2]}, "A has rank 2 and B 3"),
        ({}, "adapts no linear layer of this model"),
    ):
        rewrite(tmp_path, named=named)
        with pytest.raises(ValueError, match=message):
            adapters.read_peft(tmp_path, LLAMA)
    with pytest.raises(ValueError, match=r"there is no adapter_config.json"):
        adapters.read_peft(tmp_path / "elsewhere", LLAMA)


def test_what_peft_has_no_place_for_is_exported_merged(tmp_path):
    lora = dataclasses.replace(PLAIN, also=("layers/attn/q/kernel",))
    leaves = drawn(LLAMA, PLAIN) | {"layers/attn/q/kernel": np.ones((2, 8, 4, 6), np.float32)}
    with pytest.raises(ValueError, match=r"lora.also: layers/attn/q/kernel .* export the merged model"):
        write(tmp_path, leaves, lora, LLAMA)
    lora = dataclasses.replace(PLAIN, dora=True, targets=("layers/attn/q",))
    with pytest.raises(ValueError, match=r"lora.targets: layers/attn/k has no DoRA adapter.*self_attn.qkv_proj"):
        write(tmp_path, drawn(PHI, lora, lora.targets), lora, PHI)


@pytest.mark.parametrize("path, shape", [("layers/attn/o/kernel", (4, 8, 16)), ("layers/mlp/down/kernel", (3, 8, 16))])
def test_kernels_of_a_folder_are_quantised_by_their_inputs(path, shape):
    """One layer at a time: two dimensions of inputs, and experts."""
    leaves = jax.eval_shape(lambda kernel: adapters.quantiser(MIXTRAL, "int8")(path, kernel), np.ones(shape))
    assert leaves["scales"].shape == ((1, 1, 16) if "attn" in path else (3, 1, 16))
