"""Every parameter has its tensors, and every tensor its parameters."""

import dataclasses
from collections import defaultdict

import pytest
from hypothesis import given, settings

from itjax.base import tree
from itjax.hub import names
from itjax.hub.names import FAMILIES
from itjax.models.config import Experts, ModelConfig
from itjax.models.families import PRESETS
from itjax.models.model import build
from tests.hub.drawn import any_decoders, shapes


def model(family: str) -> ModelConfig:
    """Two layers of a decoder of the family."""
    presets = (preset for preset in PRESETS.values() if preset.family == family)
    sizes = {"vocab": 40, "layers": 2, "dim": 32, "heads": 4, "kv_heads": 2, "head_size": 8, "ffn": 24}
    config = dataclasses.replace(next(presets), **sizes)
    return dataclasses.replace(
        config, experts=config.experts and dataclasses.replace(config.experts, number=3, chosen=2)
    )


def by_path(config: ModelConfig, present=None) -> dict[str, names.Entry]:
    return {entry.path: entry for entry in names.entries(config, present)}


def holders(layout: list[names.Entry], config: ModelConfig) -> dict[str, list[names.Entry]]:
    """The parameters that lie in each tensor."""
    found = defaultdict(list)
    for entry in layout:
        for name in names.tensors(entry, config):
            found[name].append(entry)
    return dict(found)


@settings(max_examples=100, deadline=None)
@given(any_decoders)
def test_every_parameter_has_an_entry(config):
    for layout in names.layouts(config):
        assert sorted(entry.path for entry in layout) == sorted(shapes(config))


@settings(max_examples=12, deadline=None)
@given(any_decoders)
def test_the_parameters_are_those_of_the_decoder(config):
    abstract = build(config, dtype="float32", attention="auto", remat="none").abstract
    assert {path: leaf.shape for path, leaf in tree.flatten(abstract).items()} == shapes(config)


@settings(max_examples=30, deadline=None)
@given(any_decoders)
def test_parameters_share_a_tensor_without_overlap(config):
    for layout in names.layouts(config):
        for name, sharing in holders(layout, config).items():
            outputs = max((entry.part.stop or 0 for entry in sharing if entry.part), default=0) or 2 * config.ffn
            taken = [index for entry in sharing for index in range(outputs)[entry.part or slice(None)]]
            assert sorted(taken) == list(range(outputs)), name


def test_the_names_are_those_of_published_folders():
    llama = by_path(model("llama"))
    assert llama["layers/attn/q/kernel"].name == "model.layers.{layer}.self_attn.q_proj.weight"
    assert (llama["layers/attn/q/kernel"].contract, llama["layers/attn/o/kernel"].contract) == (1, 2)
    assert llama["layers/mlp_norm/scale"].name == "model.layers.{layer}.post_attention_layernorm.weight"
    assert llama["final_norm/scale"].name == "model.norm.weight"
    gemma = by_path(model("gemma2"))
    assert gemma["layers/mlp_norm/scale"].name == "model.layers.{layer}.pre_feedforward_layernorm.weight"
    olmo = by_path(model("olmo2"))
    assert olmo["layers/attn_post_norm/scale"].name == "model.layers.{layer}.post_attention_layernorm.weight"
    assert olmo["layers/mlp_post_norm/scale"].name == "model.layers.{layer}.post_feedforward_layernorm.weight"
    mixtral = by_path(model("mixtral"))
    assert mixtral["layers/mlp/up/kernel"].name == "model.layers.{layer}.block_sparse_moe.experts.{expert}.w3.weight"


def test_queries_keys_and_values_of_phi3_lie_in_a_row():
    phi = by_path(model("phi3"))
    parts = {name: phi[f"layers/attn/{name}/kernel"].part for name in ("q", "k", "v")}
    assert parts == {"q": slice(0, 32), "k": slice(32, 48), "v": slice(48, 64)}
    assert phi["layers/mlp/up/kernel"].part == slice(24, 48)
    assert phi["layers/mlp/up/kernel"].name == phi["layers/mlp/gate/kernel"].name


def test_gate_and_up_of_gpt_oss_take_turns():
    oss = by_path(model("gpt_oss"))
    gate, up = oss["layers/mlp/gate/kernel"], oss["layers/mlp/up/bias"]
    assert [list(range(6))[entry.part] for entry in (gate, up)] == [[0, 2, 4], [1, 3, 5]]
    assert not gate.flip
    assert gate.experts


@pytest.mark.parametrize("family", FAMILIES)
def test_a_layout_is_known_by_its_names(family):
    config = model(family)
    for layout in names.layouts(config):
        assert names.entries(config, list(holders(layout, config))) == layout


def test_packed_experts_are_two_tensors():
    config = model("gpt_oss")
    present = [name for name in holders(names.layouts(config)[1], config) if "gate_up_proj" in name]
    gate = by_path(config, present)["layers/mlp/gate/kernel"]
    assert gate.packed
    assert gate.flip
    assert list(names.tensors(gate, config))[:2] == [
        "model.layers.0.mlp.experts.gate_up_proj_blocks",
        "model.layers.0.mlp.experts.gate_up_proj_scales",
    ]


def test_a_tied_head_may_be_there_twice():
    config = model("llama")
    assert names.duplicates(dataclasses.replace(config, tie_embeddings=False)) == []
    tied = dataclasses.replace(config, tie_embeddings=True)
    assert names.duplicates(tied) == [names.Entry("embed/kernel", "lm_head.weight")]
    assert "head/kernel" not in by_path(tied)
    images = ["language_model.model.embed_tokens.weight", "language_model.model.norm.weight"]
    assert names.duplicates(model("gemma3_text"), images)[0].name == "language_model.lm_head.weight"


def test_what_is_no_parameter_is_left_aside():
    assert names.is_left_out("model.layers.3.self_attn.rotary_emb.inv_freq")
    assert names.is_left_out("vision_tower.vision_model.embeddings.patch_embedding.weight")
    assert not names.is_left_out("model.layers.3.self_attn.q_proj.weight")
    assert not names.is_left_out("score.weight")


def test_experts_are_tensors_of_their_own_where_the_name_says_so():
    config = dataclasses.replace(model("qwen3_moe"), experts=Experts(3, 2))
    entry = by_path(config)["layers/mlp/down/kernel"]
    assert list(names.tensors(entry, config)) == [
        f"model.layers.{layer}.mlp.experts.{expert}.down_proj.weight" for layer in range(2) for expert in range(3)
    ]
