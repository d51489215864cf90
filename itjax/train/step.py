"""One optimizer step as a pure function: sums over all micro-batches, one division, one update.

B rows, T positions, A micro-batches, E experts.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from itjax.base.records import PackedBatch
from itjax.models.model import Params
from itjax.objectives.sums import LossSums
from itjax.parallel import layout, memory
from itjax.train.optimizer import Schedule
from itjax.train.state import TrainState, averaged

LossFn = Callable[[Params, Params, PackedBatch, jax.Array | None], LossSums]  # (params, frozen, batch, key)
Metrics = dict[str, jax.Array]

COUNTS = ("dropped",)  # sums that are read as they are; all others are means, per weight
EXPERTS = "expert_tokens"  # tokens of every expert; the metric is `expert_load`


def grad_sums(
    loss_fn: LossFn, state: TrainState, batch: PackedBatch, accumulate: int, key: jax.Array | None = None
) -> tuple[Params, LossSums]:
    """The gradient of the summed loss and the sums themselves, float32, over all micro-batches of the batch.

    Micro-batch a draws from `fold_in(key, a)`; without a key nothing is drawn.
    """

    def one(number: jax.Array | int, micro: PackedBatch) -> tuple[Params, LossSums]:
        own = None if key is None else jax.random.fold_in(key, number)

        def total(params: Params) -> tuple[jax.Array, LossSums]:
            sums = loss_fn(params, state.frozen, micro, own)
            return sums.loss, sums

        grads, sums = jax.grad(total, has_aux=True)(state.params)
        return jax.tree.map(lambda x: x.astype(jnp.float32), (grads, sums))

    if accumulate == 1:
        return one(0, batch)
    micro_batches = jax.tree.map(lambda x: _micro(x, accumulate), batch)
    shapes = jax.eval_shape(one, 0, jax.tree.map(lambda x: x[0], micro_batches))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    sums, _ = jax.lax.scan(
        lambda total, micro: (jax.tree.map(jnp.add, total, one(*micro)), None),
        zeros,
        (jnp.arange(accumulate), micro_batches),
    )
    return sums


def _micro(x_BT: jax.Array, accumulate: int) -> jax.Array:
    """[B, T] -> [A, B/A, T]. Micro-batch a takes rows a, a+A, a+2A, ...: so every device keeps the rows it holds."""
    rows, length = x_BT.shape
    x_BAT = x_BT.reshape(rows // accumulate, accumulate, length)
    return layout.pin(jnp.moveaxis(x_BAT, 1, 0), None, "batch", "length")


def make_train_step(
    loss_fn: LossFn,
    tx: optax.GradientTransformation,
    *,
    learning_rate: Schedule,
    accumulate: int,
    seed: int | None = None,
    average: float = 0.0,
    offload: bool = False,
) -> Callable[[TrainState, PackedBatch], tuple[TrainState, Metrics]]:
    """The function that the loop runs and that the plan compiles: (state, batch) -> (state, metrics).

    The loss and the gradient are sums over the whole step, divided once by the summed weight. A step whose gradient is
    not finite, or that has no trained token, leaves parameters, moments and average as they were and says so in `skipped`.
    The metric `loss` is Σ w·nll / Σ w where the objective gives "nll": without what coefficients add to it (`z_loss`, the
    experts' balance), so that runs with other ones compare.

    `seed` is for losses that draw: micro-batch a of step s gets the key `fold_in(fold_in(key(seed), s), a)`. None: the
    loss gets no key and the program has no random numbers. `average` is the decay of `TrainState.average`, 0 for none.
    With `offload` the optimizer's state comes from the memory of the host, and goes back by the shardings of the results.
    """
    extended = optax.with_extra_args_support(tx)

    def train_step(state: TrainState, batch: PackedBatch) -> tuple[TrainState, Metrics]:
        key = None if seed is None else jax.random.fold_in(jax.random.key(seed), state.step)
        grads, sums = grad_sums(loss_fn, state, batch, accumulate, key)
        has_weight = sums.weight > 0
        per_weight = jnp.where(has_weight, 1 / jnp.where(has_weight, sums.weight, 1.0), 0.0)
        grads = jax.tree.map(lambda g: g * per_weight, grads)  # the mean: the one division of the step
        objective, grad_norm, rate = sums.loss * per_weight, optax.tree.norm(grads), learning_rate(state.step)
        is_sound = has_weight & jnp.isfinite(objective) & jnp.isfinite(grad_norm)

        before = memory.to_device(state.opt_state) if offload else state.opt_state
        old = (state.params, before, state.average)

        def moved() -> tuple[Params, Any, Params]:
            directions, opt_state = extended.update(grads, before, state.params, learning_rate=rate)
            params = jax.tree.map(lambda p, d: p - (rate * d).astype(p.dtype), state.params, directions)
            return params, opt_state, averaged(state.average, params, decay=average)

        # On CPUs a branch takes a quarter less memory than a choice number by number; accelerators choose in place, and would
        # keep the results of both branches beside the state.
        params, opt_state, mean = jax.lax.platform_dependent(
            cpu=lambda: jax.lax.cond(is_sound, moved, lambda: old),
            default=lambda: jax.tree.map(lambda new, old: jnp.where(is_sound, new, old), moved(), old),
        )
        means = readings(sums.aux, per_weight)
        metrics = {
            **means,
            "loss": means.get("nll", objective),
            "grad_norm": grad_norm,
            "learning_rate": rate,
            "tokens": (batch.segments_BT > 0).sum(),
            "trained_tokens": (batch.weights_BT > 0).sum(),
            "weight": sums.weight,
            "skipped": ~is_sound,
        }
        return TrainState(state.step + 1, params, state.frozen, opt_state, mean), metrics

    return train_step


def readings(aux: Mapping[str, jax.Array], per_weight: jax.Array) -> Metrics:
    """What the further sums of an objective come to: means per weight, counts as they are, experts by the fullest one."""
    metrics = {name: x.sum() if name in COUNTS else x * per_weight for name, x in aux.items() if name != EXPERTS}
    if EXPERTS in aux:
        metrics["expert_load"] = expert_load(aux[EXPERTS])
    return metrics


def expert_load(tokens_E: jax.Array) -> jax.Array:
    """Tokens of the fullest expert over the mean of all: 1 when they are even, E when one has everything, 0 without any.

    Of several layers, (L, E), the least even one.
    """
    mean = tokens_E.mean(-1)
    return (tokens_E.max(-1) / jnp.where(mean > 0, mean, 1.0)).max()
