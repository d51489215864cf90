"""The loss means the same however the same examples are laid out."""

import dataclasses
import functools
import re
import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from itjax.base import tree
from itjax.base.records import PackedBatch
from itjax.base.schema import Loss
from itjax.models.model import Model, join
from itjax.objectives.sft import sft
from tests import fakes

EXAMPLES = [fakes.example(seed, length=length) for seed, length in enumerate([9, 5, 12, 2, 7])]
PACKED = fakes.packed([[EXAMPLES[0], EXAMPLES[1]], [EXAMPLES[2], EXAMPLES[3], EXAMPLES[4]]], length=24)
APART = fakes.packed([[one] for one in EXAMPLES], length=12)


def sums_and_grads(model: Model, *batches: PackedBatch, chunk: int = 16, z_loss: float = 0.0, num_sources: int = 0):
    """Sums and gradient of batches of one shape, added up."""
    params = fakes.tiny_params(model.config)
    loss_fn = sft(model, loss=Loss(z_loss=z_loss, chunk=chunk), num_sources=num_sources)

    def total(params, batch):
        sums = loss_fn(params, {}, batch)
        return sums.loss, sums

    step = jax.jit(jax.grad(total, has_aux=True))
    grads, sums = functools.reduce(partial(jax.tree.map, jnp.add), [step(params, batch) for batch in batches])
    return sums, tree.flatten(grads)


def assert_same(ours, wanted, *, tolerance: float = 5e-6):
    (sums, grads), (wanted_sums, wanted_grads) = ours, wanted
    assert float(sums.weight) == float(wanted_sums.weight) > 0
    assert float(sums.loss) == pytest.approx(float(wanted_sums.loss), rel=1e-6)
    for path, wanted_grad in wanted_grads.items():
        scale = np.abs(wanted_grad).max()
        assert scale > 0, path
        np.testing.assert_allclose(grads[path], wanted_grad, atol=tolerance * scale, err_msg=path)


@pytest.fixture(scope="module")
def packed():
    return sums_and_grads(fakes.tiny_model(), PACKED)


@pytest.mark.parametrize("name", ["blockwise", "reference"])
def test_a_packed_batch_has_the_gradient_of_its_examples_one_by_one(name):
    model = fakes.tiny_model(attention=name)
    alone = [fakes.packed([[one]], length=12) for one in EXAMPLES]
    assert_same(sums_and_grads(model, PACKED), sums_and_grads(model, *alone))


def test_a_packed_batch_has_the_gradient_of_the_unpacked_one(packed):
    assert_same(sums_and_grads(fakes.tiny_model(), APART), packed)


def test_more_padding_changes_nothing(packed):
    longer = PackedBatch(*(np.pad(x, ((0, 2), (0, 24))) for x in PACKED))
    longer = longer._replace(tokens_BT=np.where(longer.segments_BT == 0, 17, longer.tokens_BT))  # any id may pad
    assert_same(sums_and_grads(fakes.tiny_model(), longer), packed)


def test_the_order_of_rows_changes_nothing(packed):
    assert_same(sums_and_grads(fakes.tiny_model(), PackedBatch(*(x[::-1] for x in PACKED))), packed)


@pytest.mark.parametrize("chunk", [7, 4096])
def test_the_size_of_chunks_changes_nothing(packed, chunk):
    assert_same(sums_and_grads(fakes.tiny_model(), PACKED, chunk=chunk), packed)


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_recomputing_activations_changes_nothing(packed, remat):
    model = fakes.tiny_model(remat=remat)
    text = str(jax.make_jaxpr(lambda p: model.features(p, PACKED).x_BTD)(model.abstract))
    assert "remat" in text or "checkpoint" in text
    assert_same(sums_and_grads(model, PACKED), packed)


def test_the_loss_is_the_plain_sum_over_all_logits():
    model = fakes.tiny_model()
    params, z_loss = fakes.tiny_params(), 1e-2

    def plain(params):
        logits = model.unembed(params, model.features(params, PACKED).x_BTD)
        log_z = jax.nn.logsumexp(logits, axis=-1)
        picked = jnp.take_along_axis(logits, PACKED.targets_BT[..., None], axis=-1)[..., 0]
        return (PACKED.weights_BT * (log_z - picked + z_loss * log_z**2)).sum()

    sums, grads = sums_and_grads(model, PACKED, z_loss=z_loss)
    loss, wanted = jax.value_and_grad(plain)(params)
    assert_same((sums, grads), (dataclasses.replace(sums, loss=loss), tree.flatten(wanted)))
    assert float(sums.loss) > float(sums.aux["nll"])


def test_untied_heads_and_embeddings_both_learn():
    config = dataclasses.replace(fakes.TINY, tie_embeddings=False)
    _, grads = sums_and_grads(fakes.tiny_model(config), PACKED)
    assert float(jnp.abs(grads["head/kernel"]).max()) > 0
    assert float(jnp.abs(grads["embed/kernel"]).max()) > 0


def test_nothing_to_learn_gives_zeros_and_not_nan():
    sums, grads = sums_and_grads(fakes.tiny_model(), PACKED._replace(weights_BT=0 * PACKED.weights_BT))
    assert float(sums.loss) == float(sums.weight) == 0
    assert all((np.asarray(grad) == 0).all() for grad in grads.values())


def test_losses_per_source_add_up_to_the_loss():
    sums, _ = sums_and_grads(fakes.tiny_model(), PACKED, num_sources=3)
    by_hand = [float(PACKED.weights_BT[(PACKED.source_BT == source)].sum()) for source in range(3)]
    assert sums.aux["source_weight"].tolist() == by_hand
    assert float(sums.aux["source_loss"].sum()) == pytest.approx(float(sums.loss), rel=1e-6)
    assert (np.asarray(sums.aux["source_loss"]) > 0).all()


def test_adapters_and_their_base_are_joined():
    model, params = fakes.tiny_model(), fakes.tiny_params()
    moving = {"final_norm": params["final_norm"]}
    frozen = {name: part for name, part in params.items() if name != "final_norm"}
    assert jax.tree.structure(join(moving, frozen)) == jax.tree.structure(params)
    whole, split = (sft(model, loss=Loss(chunk=16))(*parts, PACKED).loss for parts in ((params, {}), (moving, frozen)))
    assert float(whole) == float(split)


def test_logits_of_all_positions_never_exist():
    rows, length, vocab, chunk = 4, 32, 2048, 32
    config = dataclasses.replace(fakes.TINY, vocab=vocab)
    model = fakes.tiny_model(config)
    batch = fakes.packed([[fakes.example(row, length=length, vocab=vocab)] for row in range(rows)], length=length)
    loss_fn = sft(model, loss=Loss(chunk=chunk))
    step = jax.jit(jax.grad(lambda params, batch: loss_fn(params, {}, batch).loss))
    sizes = _array_sizes(step.lower(model.abstract, batch).compile().as_text())
    plain = jax.jit(jax.grad(lambda params, batch: model.unembed(params, model.features(params, batch).x_BTD).sum()))
    assert max(_array_sizes(plain.lower(model.abstract, batch).compile().as_text())) >= rows * length * vocab
    assert max(sizes) < rows * length * vocab // 2
    assert chunk * vocab in sizes  # the logits of one chunk


def _array_sizes(hlo: str) -> set[int]:
    return {int(np.prod([int(n) for n in dims.split(",")])) for dims in re.findall(r"(?:f32|bf16)\[([\d,]+)\]", hlo)}


MESHES = """
import dataclasses, jax, numpy as np
from jax.sharding import AxisType, Mesh
from itjax.base import tree
from itjax.base.schema import Loss
from itjax.objectives.sft import sft
from itjax.parallel import layout
from tests import fakes

config = dataclasses.replace(fakes.TINY, tie_embeddings=False, layers=9)  # a loop, as on accelerators
batch = fakes.packed([[fakes.example(row, length=20), fakes.example(row + 9, length=9)] for row in range(8)], length=32)
wanted, drawn = None, fakes.tiny_params(config)
for shape, remat in [((1, 1, 1), "none"), ((2, 2, 2), "none"), ((1, 4, 2), "full"), ((1, 1, 8), "none")]:
    devices = np.array(jax.devices()[: int(np.prod(shape))]).reshape(shape)
    mesh = Mesh(devices, ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    model = fakes.tiny_model(config, remat=remat)
    loss_fn = sft(model, loss=Loss(z_loss=1e-3, chunk=16))
    with jax.set_mesh(mesh):
        placed = layout.shardings(model.axes, mesh, model.abstract)
        step = jax.jit(jax.value_and_grad(lambda p, b: loss_fn(p, {}, b).loss), out_shardings=(None, placed))
        params = jax.device_put(drawn, placed)
        loss, grads = jax.device_get(step(params, layout.place(batch, mesh, rows=len(batch.tokens_BT))))
    wanted = wanted or (loss, grads)
    assert abs(loss / wanted[0] - 1) < 1e-6, (shape, remat, loss, wanted[0])
    for path, grad in tree.flatten(wanted[1]).items():
        error = np.abs(tree.flatten(grads)[path] - grad).max() / np.abs(grad).max()
        assert error < 1e-5, (shape, remat, path, error)
print("same on every mesh")
"""


def test_every_mesh_has_the_same_gradient_and_xla_never_rematerializes_an_array_to_lay_it_out():
    ran = subprocess.run([sys.executable, "-c", MESHES], capture_output=True, text=True, check=False)
    assert "same on every mesh" in ran.stdout, ran.stderr
    assert "rematerialization" not in ran.stderr
