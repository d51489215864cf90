"""A model is plain trees and functions, and no example knows of another in its row."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from itjax.base import tree
from itjax.models.model import build, join
from tests import fakes

EXAMPLES = [fakes.example(seed, length=length) for seed, length in enumerate([30, 25, 40])]
BATCH = fakes.packed([EXAMPLES], length=100)


def forward(model, params):
    """batch -> logits, compiled once per shape."""
    run = jax.jit(lambda params, batch: model.unembed(params, model.features(params, batch).x_BTD))
    return lambda batch: np.asarray(run(params, batch))


@pytest.fixture(scope="module")
def logits():
    model = fakes.tiny_model()
    return forward(model, fakes.tiny_params())


def test_axes_name_every_dimension_of_every_parameter():
    model = fakes.tiny_model()
    shapes, axes = tree.flatten(model.abstract), tree.flatten(model.axes)
    assert shapes.keys() == axes.keys()
    assert all(len(axes[path]) == len(shapes[path].shape) for path in shapes)
    assert axes["layers/attn/q/kernel"] == PartitionSpec("layers", "embed", "heads", "head_size")
    assert shapes["layers/mlp/gate/kernel"].shape == (2, 32, 48)


def test_drawn_parameters_are_float32_and_shaped_as_announced():
    model = fakes.tiny_model(dtype="bfloat16")
    params = jax.eval_shape(model.init, jax.random.key(0))
    assert tree.flatten(params) == tree.flatten(model.abstract)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {"float32"}


def test_layers_are_drawn_apart_and_a_key_draws_the_same_again():
    model = fakes.tiny_model()
    first, again, other = (model.init(jax.random.key(seed)) for seed in (0, 0, 1))
    kernel_LDF = first["layers"]["mlp"]["gate"]["kernel"]
    assert not np.array_equal(kernel_LDF[0], kernel_LDF[1])
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), first, again))
    assert not np.array_equal(first["embed"]["kernel"], other["embed"]["kernel"])


@pytest.mark.parametrize("name", ["blockwise", "reference"])
def test_another_document_leaves_the_logits_of_its_neighbours_exactly_as_they_were(name):
    model = fakes.tiny_model(attention=name)
    logits = forward(model, fakes.tiny_params())
    before = logits(BATCH)
    for changed in (0, 1, 2, 3):  # 0 is padding
        is_changed = BATCH.segments_BT == changed
        after = logits(BATCH._replace(tokens_BT=np.where(is_changed, 95 - BATCH.tokens_BT, BATCH.tokens_BT)))
        np.testing.assert_array_equal(before[~is_changed], after[~is_changed])
        assert (before[is_changed] != after[is_changed]).any()


def test_the_future_leaves_the_past_exactly_as_it_was(logits):
    other = BATCH._replace(tokens_BT=np.where(np.arange(100)[None] == 20, 5, BATCH.tokens_BT))
    np.testing.assert_array_equal(logits(BATCH)[:, :20], logits(other)[:, :20])


def test_only_distances_between_positions_matter(logits):
    moved = BATCH._replace(positions_BT=BATCH.positions_BT + 1000)
    np.testing.assert_allclose(logits(BATCH), logits(moved), atol=2e-4)
    spread = BATCH._replace(positions_BT=3 * BATCH.positions_BT)
    assert np.abs(logits(BATCH) - logits(spread)).max() > 1e-2


@pytest.mark.parametrize("tie_embeddings", [True, False])
def test_decoding_with_a_cache_is_the_full_forward(tie_embeddings):
    """A prompt of 7 after 3 slots of padding, then 5 tokens one at a time."""
    config = dataclasses.replace(fakes.TINY, tie_embeddings=tie_embeddings)
    model, params = fakes.tiny_model(config), fakes.tiny_params(config)
    one = fakes.example(0, length=12)
    whole = forward(model, params)(fakes.packed([[one]], length=12))[0]
    tokens_BT = np.concatenate([np.zeros(3, np.int32), one.tokens_T])[None]
    cache = model.init_cache(1, 16)._replace(start_B=jnp.array([3]))
    step = jax.jit(model.step)
    for begin, end in [(0, 10), *((t, t + 1) for t in range(10, 15))]:
        last_BV, cache = step(params, cache, tokens_BT[:, begin:end])
        np.testing.assert_allclose(last_BV[0], whole[end - 4], atol=1e-5)


def test_bfloat16_products_are_close_to_float32():
    exact, fast = (fakes.tiny_model(dtype=dtype) for dtype in ("float32", "bfloat16"))
    params = fakes.tiny_params()
    assert fast.features(params, BATCH).x_BTD.dtype == jnp.bfloat16
    np.testing.assert_allclose(forward(exact, params)(BATCH), forward(fast, params)(BATCH), atol=0.1)


def test_a_deep_network_is_a_loop_and_a_shallow_one_on_cpu_is_written_out():
    for layers, loops in [(2, False), (9, True)]:
        model = build(
            dataclasses.replace(fakes.TINY, layers=layers), dtype="float32", attention="auto", remat="none"
        )  # fmt: skip
        lowered = jax.jit(lambda p, m=model: m.features(p, BATCH).x_BTD).lower(model.abstract)
        assert ("stablehlo.while" in lowered.as_text()) == loops


def test_trees_that_overlap_are_not_joined():
    with pytest.raises(AssertionError, match="a/b"):
        join({"a": {"b": 1}}, {"a": {"b": 2}})
