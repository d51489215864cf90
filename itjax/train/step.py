"""One optimizer step as a pure function: sums over all micro-batches, one division, one update."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from itjax.base.records import PackedBatch
from itjax.models.model import Params
from itjax.objectives.sums import LossSums
from itjax.parallel import layout
from itjax.train.optimizer import Schedule
from itjax.train.state import TrainState

LossFn = Callable[[Params, Params, PackedBatch], LossSums]  # (params, frozen, batch)
Metrics = dict[str, jax.Array]


def grad_sums(loss_fn: LossFn, state: TrainState, batch: PackedBatch, accumulate: int) -> tuple[Params, LossSums]:
    """The gradient of the summed loss and the sums themselves, float32, over all micro-batches of the batch."""

    def one(micro: PackedBatch) -> tuple[Params, LossSums]:
        def total(params: Params) -> tuple[jax.Array, LossSums]:
            sums = loss_fn(params, state.frozen, micro)
            return sums.loss, sums

        grads, sums = jax.grad(total, has_aux=True)(state.params)
        return jax.tree.map(lambda x: x.astype(jnp.float32), (grads, sums))

    if accumulate == 1:
        return one(batch)
    micro_batches = jax.tree.map(lambda x: _micro(x, accumulate), batch)
    shapes = jax.eval_shape(one, jax.tree.map(lambda x: x[0], micro_batches))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    sums, _ = jax.lax.scan(lambda total, micro: (jax.tree.map(jnp.add, total, one(micro)), None), zeros, micro_batches)
    return sums


def _micro(x_BT: jax.Array, accumulate: int) -> jax.Array:
    """[B, T] -> [A, B/A, T]. Micro-batch a takes rows a, a+A, a+2A, ...: so every device keeps the rows it holds."""
    rows, length = x_BT.shape
    x_BAT = x_BT.reshape(rows // accumulate, accumulate, length)
    return layout.pin(jnp.moveaxis(x_BAT, 1, 0), None, "batch", "length")


def make_train_step(
    loss_fn: LossFn, tx: optax.GradientTransformation, *, learning_rate: Schedule, accumulate: int
) -> Callable[[TrainState, PackedBatch], tuple[TrainState, Metrics]]:
    """The function that the loop runs and that the plan compiles: (state, batch) -> (state, metrics).

    The loss and the gradient are sums over the whole step, divided once by the summed weight. A step whose gradient is
    not finite, or that has no trained token, leaves parameters and moments as they were and says so in `skipped`.
    """

    def train_step(state: TrainState, batch: PackedBatch) -> tuple[TrainState, Metrics]:
        grads, sums = grad_sums(loss_fn, state, batch, accumulate)
        has_weight = sums.weight > 0
        per_weight = jnp.where(has_weight, 1 / jnp.where(has_weight, sums.weight, 1.0), 0.0)
        grads = jax.tree.map(lambda g: g * per_weight, grads)  # the mean: the one division of the step
        loss, grad_norm, rate = sums.loss * per_weight, optax.tree.norm(grads), learning_rate(state.step)
        is_sound = has_weight & jnp.isfinite(loss) & jnp.isfinite(grad_norm)

        def update() -> tuple[Params, Any]:
            directions, opt_state = tx.update(grads, state.opt_state, state.params)
            return jax.tree.map(lambda p, d: p - (rate * d).astype(p.dtype), state.params, directions), opt_state

        params, opt_state = jax.lax.cond(is_sound, update, lambda: (state.params, state.opt_state))
        metrics = {
            "loss": loss,
            "grad_norm": grad_norm,
            "learning_rate": rate,
            "tokens": (batch.segments_BT > 0).sum(),
            "trained_tokens": (batch.weights_BT > 0).sum(),
            "weight": sums.weight,
            "skipped": ~is_sound,
        }
        return TrainState(state.step + 1, params, state.frozen, opt_state), metrics

    return train_step
