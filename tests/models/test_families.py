"""Presets are the published decoders; what does not fit together is named."""

import dataclasses
import math
from typing import Any

import jax
import pytest

from itjax.base import tree
from itjax.base.schema import Architecture
from itjax.models import families
from itjax.models.config import Experts, Layer
from itjax.models.model import build
from tests.hub.drawn import shapes

PARAMETERS = {  # of the published weights; of Gemma 3 what is left without the part for images
    "llama2_7b": 6_738_415_616, "llama2_13b": 13_015_864_320, "llama2_70b": 68_976_648_192,
    "llama3_8b": 8_030_261_248, "llama3_70b": 70_553_706_496, "llama31_8b": 8_030_261_248,
    "llama31_70b": 70_553_706_496, "llama31_405b": 405_853_388_800, "llama32_1b": 1_235_814_400,
    "llama32_3b": 3_212_749_824, "smollm2_135m": 134_515_008, "smollm2_360m": 361_821_120,
    "smollm2_1p7b": 1_711_376_384, "smollm3_3b": 3_075_098_624, "mistral_7b_v01": 7_241_732_096,
    "mistral_7b_v03": 7_248_023_552, "mistral_nemo_12b": 12_247_782_400, "mixtral_8x7b": 46_702_792_704,
    "mixtral_8x22b": 140_630_071_296, "qwen25_0p5b": 494_032_768, "qwen25_1p5b": 1_543_714_304,
    "qwen25_3b": 3_085_938_688, "qwen25_7b": 7_615_616_512, "qwen25_14b": 14_770_033_664,
    "qwen25_32b": 32_763_876_352, "qwen25_72b": 72_706_203_648, "qwen3_0p6b": 596_049_920,
    "qwen3_1p7b": 1_720_574_976, "qwen3_4b": 4_022_468_096, "qwen3_8b": 8_190_735_360, "qwen3_14b": 14_768_307_200,
    "qwen3_32b": 32_762_123_264, "qwen3_30b_a3b": 30_532_122_624, "qwen3_235b_a22b": 235_093_634_560,
    "gemma2_2b": 2_614_341_888, "gemma2_9b": 9_241_705_984, "gemma2_27b": 27_227_128_320, "gemma3_270m": 268_098_176,
    "gemma3_1b": 999_885_952, "gemma3_4b": 3_880_263_168, "gemma3_12b": 11_766_034_176, "gemma3_27b": 27_009_346_304,
    "phi3_mini_4k": 3_821_079_552, "phi3_mini_128k": 3_821_079_552, "phi35_mini": 3_821_079_552,
    "phi3_medium_4k": 13_960_238_080, "phi3_medium_128k": 13_960_238_080, "phi4_14b": 14_659_507_200,
    "phi4_mini": 3_836_021_760, "olmo2_1b": 1_484_916_736, "olmo2_7b": 7_298_617_344, "olmo2_13b": 13_716_198_400,
    "olmo2_32b": 32_234_279_936, "gpt_oss_20b": 20_914_757_184, "gpt_oss_120b": 116_829_156_672,
}  # fmt: skip
ONE_OF_EACH = (
    "llama32_1b", "llama31_8b", "smollm3_3b", "mistral_7b_v03", "mixtral_8x7b", "qwen25_0p5b", "qwen3_0p6b",
    "qwen3_30b_a3b", "gemma2_2b", "gemma3_1b", "phi4_mini", "olmo2_1b", "gpt_oss_20b",
)  # fmt: skip


def built(preset: str) -> dict[str, Any]:
    return build(families.PRESETS[preset], dtype="bfloat16", attention="auto", remat="full").abstract


@pytest.mark.parametrize("preset", sorted(set(families.PRESETS) - {"tiny", "small"}))
def test_presets_have_the_published_number_of_parameters(preset):
    config = families.PRESETS[preset]
    assert sum(math.prod(shape) for shape in shapes(config).values()) == PARAMETERS[preset]


@pytest.mark.parametrize("preset", ONE_OF_EACH)
def test_so_have_the_decoders_that_are_built(preset):
    assert tree.num_elements(built(preset)) == PARAMETERS[preset]


def kernels(preset: str) -> int:
    """Elements of everything that features are multiplied with."""
    found = {path: leaf for path, leaf in tree.flatten(built(preset)).items() if path.endswith("kernel")}
    table = found.pop("embed/kernel")
    return sum(math.prod(leaf.shape) for leaf in (found if "head/kernel" in found else {**found, "": table}).values())


@pytest.mark.parametrize("preset", ["llama31_8b", "llama32_1b", "gemma2_2b"])
def test_matmul_parameters_are_the_kernels_and_the_head(preset):
    assert families.matmul_parameters(families.PRESETS[preset]) == kernels(preset)


def test_of_experts_only_those_count_that_a_token_is_sent_to():
    config = families.PRESETS["mixtral_8x7b"]
    idle = 32 * 6 * 3 * 4096 * 14336  # layers, of 8 experts those not chosen, three kernels
    assert families.matmul_parameters(config) == kernels("mixtral_8x7b") - idle
    active = families.matmul_parameters(families.PRESETS["gpt_oss_120b"])
    assert active == pytest.approx(5.1e9, rel=0.01)  # as its model card says
    assert families.matmul_parameters(families.PRESETS["qwen3_30b_a3b"]) == pytest.approx(3.0e9, rel=0.02)  # A3B


def test_windows_leave_out_pairs():
    config = dataclasses.replace(families.PRESETS["small"], layers=1, pattern=(Layer(window=4),))
    per_pair = 12 * config.heads * config.head_size
    free = dataclasses.replace(config, pattern=(Layer(),))
    cut = families.train_flops(free, [10]) - families.train_flops(config, [10])
    assert cut == per_pair * (10 - 4) ** 2 / 2  # a triangle
    assert families.train_flops(free, [4]) == families.train_flops(config, [4])
    mixed = dataclasses.replace(config, layers=4, pattern=(Layer(window=4), Layer()))
    uncut = families.train_flops(dataclasses.replace(free, layers=4), [10])
    assert uncut - families.train_flops(mixed, [10]) == 2 * cut


def test_frozen_kernels_need_no_gradient_of_their_own():
    config = families.PRESETS["llama31_8b"]
    all_moves, none_moves = (families.train_flops(config, [8192], moving=moving) for moving in (1.0, 0.0))
    assert all_moves - none_moves == 2 * families.matmul_parameters(config) * 8192


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


def test_overrides_keep_what_a_family_is():
    gemma = families.resolve("gemma3_1b", Architecture(dim=64, heads=4, layers=2, rope_theta=5e4), vocab=300)
    assert (gemma.embed_scale, gemma.head_size) == (8.0, 16)
    assert (gemma.rope.theta, gemma.local_rope.theta) == (5e4, 1e4)
    assert families.resolve("tiny", Architecture(dim=128, rope_theta=2e4), vocab=300).embed_scale == 3.2
    scaled = families.resolve("llama32_1b", Architecture(rope_theta=1e6), vocab=300).rope
    assert (scaled.theta, scaled.scaling, scaled.factor) == (1e6, "llama3", 32.0)


def test_experts_are_as_many_as_an_override_says():
    config = families.resolve("gpt_oss_20b", Architecture(experts=8, experts_per_token=2), vocab=300)
    assert config.experts == Experts(number=8, chosen=2, bias=True)
    assert families.resolve("mixtral_8x7b", Architecture(experts=4), vocab=300).experts == Experts(4, 2)


def test_divisors_of_rotations_fit_one_head_size():
    with pytest.raises(ValueError, match=r"head_size: 64 makes 24 pairs to turn, and the preset has divisors for 48"):
        families.resolve("phi4_mini", Architecture(head_size=64), vocab=300)


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


def test_experts_are_of_presets_that_have_some():
    with pytest.raises(
        ValueError, match=r"architecture\.experts: tiny has no experts; leave it out, or take one of mix"
    ):
        families.resolve("tiny", Architecture(experts=4), vocab=300)
    with pytest.raises(ValueError, match=r"architecture\.experts_per_token: 4 of 3 experts cannot be chosen"):
        families.resolve("gpt_oss_20b", Architecture(experts=3), vocab=300)


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
