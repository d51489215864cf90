"""AdamW with a warm-up and a schedule: the update as optax transformations, the learning rate as a function of the step."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from itjax.base import tree
from itjax.base.schema import Optimizer
from itjax.models.model import Params

Schedule = Callable[[jax.Array], jax.Array]


def learning_rate(config: Optimizer, *, num_steps: int) -> Schedule:
    """The learning rate of step 0, 1, ... : linear warm-up to the peak, then constant, linear or cosine to `final` x peak.

    The first step already moves (rate peak / warm-up steps), the last step of a decaying schedule still does.
    """
    peak, last = config.learning_rate, config.learning_rate * config.final
    warmup = min(math.ceil(config.warmup * num_steps), num_steps)
    decay = max(num_steps - warmup, 1)
    after = {
        "constant": optax.constant_schedule(peak),
        "linear": optax.linear_schedule(peak, last, decay),
        "cosine": optax.cosine_decay_schedule(peak, decay, alpha=config.final),
    }[config.schedule]
    if not warmup:
        return after
    rise = optax.linear_schedule(peak / warmup, peak, max(warmup - 1, 1))
    return optax.join_schedules([rise, after], [warmup])


def adamw(config: Optimizer) -> optax.GradientTransformation:
    """Gradient to direction: clipped by global norm, Adam's moments, decoupled weight decay where the pattern allows it.

    The step multiplies by minus the learning rate. Source: Loshchilov and Hutter 2019, https://arxiv.org/abs/1711.05101
    """
    parts = [
        optax.scale_by_adam(config.b1, config.b2, config.eps, mu_dtype=jnp.float32),
    ]
    if config.clip_norm:
        parts.insert(0, optax.clip_by_global_norm(config.clip_norm))
    if config.weight_decay:
        parts.append(optax.add_decayed_weights(config.weight_decay, mask=lambda params: decays(params, config)))
    return optax.chain(*parts)


def decays(params: Params, config: Optimizer) -> Params:
    """The tree of parameters with True where weight decay applies."""
    excluded = tree.select(params, config.no_decay)
    return jax.tree.map(lambda is_excluded: not is_excluded, excluded)
