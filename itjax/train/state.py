"""What a run carries from step to step, and the logical axes of each part of it."""

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec as P

from itjax.base.schema import Optimizer
from itjax.models.model import Axes, Params
from itjax.parallel import memory
from itjax.train import optimizer


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
    average: Params = field(default_factory=dict)  # a running mean of params in float32; {} when none is kept


def fresh(params: Params, frozen: Params, tx: optax.GradientTransformation, *, average: float = 0.0) -> TrainState:
    """The state before the first step. An average (of this decay; 0: none) begins at the first parameters."""
    mean = jax.tree.map(lambda p: jnp.array(p, jnp.float32), params) if average else {}  # copied: both are donated
    return TrainState(jnp.zeros((), jnp.int32), params, frozen, tx.init(params), mean)


def averaged(mean: Params, params: Params, *, decay: float) -> Params:
    """The running mean with the parameters of one more step in it: decay x mean + (1 - decay) x params.

    Its weights add up to 1 from the first step on, as it begins at the first parameters: those count decay^n after n
    steps. A correction for that, as Adam's moments have, would say that they are worth nothing; here they are the model
    that is fine-tuned.
    """
    return jax.tree.map(lambda m, p: m + (1 - decay) * (p.astype(jnp.float32) - m), mean, params) if mean else mean


def abstract(params: Params, frozen: Params, tx: optax.GradientTransformation, *, average: float = 0.0) -> TrainState:
    """The shapes and dtypes of a state with these shapes of parameters; no array is made."""
    return jax.eval_shape(lambda params, frozen: fresh(params, frozen, tx, average=average), params, frozen)


def state_axes(
    axes: Axes, abstract_params: Params, tx: optax.GradientTransformation, frozen_axes: Axes, *, average: float = 0.0
) -> TrainState:
    """A TrainState of logical axes: whatever the optimizer keeps per parameter lies where the parameter lies."""
    opt_axes = optimizer.state_axes(jax.eval_shape(tx.init, abstract_params), abstract_params, axes)
    return TrainState(P(), axes, frozen_axes, opt_axes, axes if average else {})


def evaluated(state: TrainState, config: Optimizer) -> Params:
    """The moving parameters as evaluations and exports take them: their average where the run keeps one."""
    if config.average:
        return state.average
    if config.kind == "schedule_free_adamw":
        return optax.contrib.schedule_free_eval_params(memory.to_device(_schedule_free(state.opt_state)), state.params)
    return state.params


def _schedule_free(opt_state: Any) -> optax.contrib.ScheduleFreeState:
    def is_it(part: Any) -> bool:
        return isinstance(part, optax.contrib.ScheduleFreeState)

    return next(part for part in jax.tree.leaves(opt_state, is_leaf=is_it) if is_it(part))
