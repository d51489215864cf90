"""What a run carries from step to step, and the logical axes of each part of it."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec as P

from itjax.models.model import Axes, Model, Params


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """`params` is what the optimizer moves, `frozen` what it does not ({} when everything is trained).

    Randomness is `fold_in(seed, step)`, so it is no state. The same type holds arrays, their shapes, their logical axes
    or their shardings.
    """

    step: Any  # () int32: steps taken
    params: Params
    frozen: Params
    opt_state: Any


def fresh(params: Params, frozen: Params, tx: optax.GradientTransformation) -> TrainState:
    """The state before the first step."""
    return TrainState(jnp.zeros((), jnp.int32), params, frozen, tx.init(params))


def abstract(model: Model, tx: optax.GradientTransformation) -> TrainState:
    """The shapes and dtypes of a state that trains every parameter; no array is made."""
    return jax.eval_shape(lambda params: fresh(params, {}, tx), model.abstract)


def state_axes(axes: Axes, abstract_params: Params, tx: optax.GradientTransformation, frozen_axes: Axes) -> TrainState:
    """A TrainState of logical axes: whatever the optimizer keeps per parameter lies where the parameter lies."""
    opt_state = jax.eval_shape(tx.init, abstract_params)
    opt_axes = optax.tree_utils.tree_map_params(
        tx, lambda _, spec: spec, opt_state, axes, transform_non_params=lambda _: P()
    )
    return TrainState(P(), axes, frozen_axes, opt_axes)
