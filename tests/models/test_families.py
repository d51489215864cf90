"""Presets are the published decoders; what does not fit together is named."""

import jax
import pytest

from itjax.base import tree
from itjax.base.schema import Architecture
from itjax.models import families
from itjax.models.model import build


@pytest.mark.parametrize(
    "preset, parameters", [("llama32_1b", 1_235_814_400), ("llama31_8b", 8_030_261_248)]
)  # fmt: skip
def test_published_presets_have_the_published_number_of_parameters(preset, parameters):
    config = families.resolve(preset, Architecture(), vocab=128256)
    model = build(config, dtype="bfloat16", attention="auto", remat="full")
    assert tree.num_elements(model.abstract) == parameters


def test_matmul_parameters_are_the_kernels_and_the_head():
    config = families.PRESETS["llama31_8b"]
    model = build(config, dtype="bfloat16", attention="auto", remat="none")
    kernels = {path: leaf for path, leaf in tree.flatten(model.abstract).items() if path.endswith("kernel")}
    kernels.pop("embed/kernel")
    assert families.matmul_parameters(config) == tree.num_elements(tree.unflatten(kernels))


def test_useful_flops_count_every_example_by_itself():
    config = families.PRESETS["llama31_8b"]
    per_token = families.train_flops(config, [8192]) / 8192
    assert per_token == pytest.approx(744e12 / 14451, rel=1e-3)  # NVIDIA's published pair for 8k pre-training
    assert families.train_flops(config, [10, 20]) == families.train_flops(config, [10]) + families.train_flops(
        config, [20]
    )
    assert families.train_flops(config, [30]) > families.train_flops(config, [10, 20])


def test_overrides_replace_what_they_name():
    config = families.resolve("tiny", Architecture(layers=7, ffn=99, tie_embeddings=False), vocab=300)
    assert (config.layers, config.ffn, config.tie_embeddings, config.vocab) == (7, 99, False, 300)
    assert config.dim == families.PRESETS["tiny"].dim


def test_heads_share_a_new_width_evenly():
    assert families.resolve("tiny", Architecture(dim=256, heads=8), vocab=300).head_size == 32
    assert families.resolve("tiny", Architecture(dim=256, heads=8, head_size=16), vocab=300).head_size == 16


@pytest.mark.parametrize(
    "overrides, message",
    [
        (Architecture(kv_heads=3), r"architecture\.kv_heads: 4 heads cannot share 3"),
        (Architecture(head_size=7), r"architecture\.head_size: 7 is odd"),
        (Architecture(dim=100, heads=6), r"architecture\.heads: 6 heads do not share a dim of 100"),
        (Architecture(vocab=200), r"architecture\.vocab: 200 is smaller than the tokenizer's 300"),
    ],
)
def test_contradictions_are_named(overrides, message):
    with pytest.raises(ValueError, match=message):
        families.resolve("tiny", overrides, vocab=300)


def test_an_unknown_preset_is_answered_with_the_nearest():
    with pytest.raises(ValueError, match=r"model: preset 'llama31_8' is unknown.*'llama31_8b'"):
        families.resolve("llama31_8", Architecture(), vocab=300)


def test_small_presets_have_the_size_they_promise():
    sizes = {}
    for preset, vocab in (("tiny", 1024), ("small", 8192)):
        config = families.resolve(preset, Architecture(), vocab=vocab)
        model = build(config, dtype="float32", attention="auto", remat="none")
        sizes[preset] = tree.num_elements(jax.eval_shape(model.init, jax.random.key(0)))
    assert 0.2e6 < sizes["tiny"] < 0.6e6
    assert 4e6 < sizes["small"] < 6e6
