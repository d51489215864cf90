"""From gradients to directions, which the step multiplies by minus the learning rate; and that rate, as a function of the step.

The rate is an argument of the step and never state of the optimizer: a step that is left out changes nothing, and the
schedule still follows the step number that metrics and checkpoints use. Every transformation is optax's where it has one.

L layers and E experts lead a stacked parameter; what follows are a kernel's inputs and outputs.
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec as P

from itjax.base import tree
from itjax.base.freeze import Fault, contradictions_of_optimizer, nearest
from itjax.base.schema import Optimizer
from itjax.models.model import Axes, Params
from itjax.train import moments

Schedule = Callable[[jax.Array], jax.Array]
Tx: TypeAlias = optax.GradientTransformation  # whose `update` may take the keyword `learning_rate`

MUON_RMS = (
    0.2  # root mean square of Muon's directions, so that AdamW's rates fit them: https://arxiv.org/abs/2502.16982
)
INVERSE_SQRT_SCALE = 10_000  # steps, where there is no warm-up; T5's


# --- the learning rate ------------------------------------------------------------------------------------------------


def learning_rate(config: Optimizer, *, num_steps: int, multiplier: float = 1.0) -> Schedule:
    """The learning rate of step 0, 1, ... : linear warm-up to the peak, then what `schedule` says. `multiplier`: of adapters.

    constant      the peak
    linear        straight to `final` x peak
    cosine        half a cosine to `final` x peak
    wsd           the peak, and over the last share of `decay` straight to `final` x peak: https://arxiv.org/abs/2404.06395
    inverse_sqrt  peak x sqrt(w / step), w the warm-up's steps: https://arxiv.org/abs/1910.10683

    The first step already moves (rate peak / warm-up steps), the last step of a decaying schedule still does.
    """
    peak = config.learning_rate * multiplier
    last = peak * config.final
    warmup = min(math.ceil(config.warmup * num_steps), num_steps)
    left = max(num_steps - warmup, 1)
    fall = max(min(math.ceil(config.decay * num_steps), left), 1)
    scale = warmup or INVERSE_SQRT_SCALE
    after = {
        "constant": optax.constant_schedule(peak),
        "linear": optax.linear_schedule(peak, last, left),
        "cosine": optax.cosine_decay_schedule(peak, left, alpha=config.final),
        "wsd": optax.linear_schedule(peak, last, fall, transition_begin=left - fall),
        "inverse_sqrt": lambda step: jnp.maximum(peak * jnp.sqrt(scale / (step + scale)), last),
    }[config.schedule]
    if not warmup:
        return after
    rise = optax.linear_schedule(peak / warmup, peak, max(warmup - 1, 1))
    return optax.join_schedules([rise, after], [warmup])


# --- the optimizers ---------------------------------------------------------------------------------------------------


def make(config: Optimizer, *, seed: int = 0) -> Tx:
    """The optimizer of a config: gradients clipped by global norm, the kind's direction, weight decay, rates per parameter.

    `seed` is for moments that are rounded at random. Raises Fault for settings that do not go together, and, when the
    state is made, for a pattern that fits no parameter.
    """
    contradictions_of_optimizer(config)
    clip = [optax.clip_by_global_norm(config.clip_norm)] if config.clip_norm else []
    after = _decay(config) + _rates(config)
    if config.kind == "schedule_free_adamw":
        rms = optax.scale_by_rms(config.b2, config.eps, eps_in_sqrt=False, bias_correction=True)
        return optax.chain(*clip, schedule_free(optax.chain(rms, *after), b1=config.b1))
    return optax.chain(*clip, KINDS[config.kind](config, seed), *after)


def _adamw(config: Optimizer, seed: int) -> Tx:
    """Loshchilov and Hutter 2019, https://arxiv.org/abs/1711.05101; the decay follows in `make`."""
    if config.moments != "float32":
        return moments.scale_by_adam(config.b1, config.b2, config.eps, kind=config.moments, seed=seed)
    return optax.scale_by_adam(config.b1, config.b2, config.eps, mu_dtype=jnp.float32)


def _lion(config: Optimizer, seed: int) -> Tx:
    """The sign of a mean of gradients. Chen et al. 2023, https://arxiv.org/abs/2302.06675"""
    return optax.scale_by_lion(config.b1, config.b2)


def _adafactor(config: Optimizer, seed: int) -> Tx:
    """Second moments as sums of rows and columns; steps relative to the parameters' size, no first moment.

    Of each matrix by itself: a stack of layers is as many matrices. Shazeer and Stern 2018, https://arxiv.org/abs/1804.04235
    """
    return per_matrix(
        optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0), optax.scale_by_param_block_rms())
    )


def _muon(config: Optimizer, seed: int) -> Tx:
    """Kernels of the layers move by their orthogonalised momentum, each matrix by itself; the rest by AdamW at rate x `rest`.

    Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/; scaled as in Liu et al. 2025 (see MUON_RMS).
    """
    kernels = optax.chain(
        optax.contrib.scale_by_muon(beta=config.momentum, weight_dimension_numbers=_dimension_numbers),
        optax.stateless(lambda updates, _: by_path(_to_rms, updates)),
    )
    rest = [optax.scale(config.rest)] if config.rest != 1 else []
    others = optax.chain(optax.scale_by_adam(config.b1, config.b2, config.eps, mu_dtype=jnp.float32), *rest)

    def labels(params: Params) -> Params:
        return by_path(lambda path, x: "kernels" if is_kernel(path, x.ndim) else "others", params)

    return optax.partition({"kernels": kernels, "others": others}, labels)


KINDS: Mapping[str, Callable[[Optimizer, int], Tx]] = {
    "adamw": _adamw,
    "adafactor": _adafactor,
    "lion": _lion,
    "muon": _muon,
}


def is_kernel(path: str, ndim: int) -> bool:
    """Whether Muon moves this parameter: a matrix inside a layer."""
    return path.startswith("layers/") and reading(path, ndim).inputs > 0


def _dimension_numbers(updates: Any) -> Any:
    def one(path: str, x: Any) -> Any:
        if not hasattr(x, "ndim"):
            return x  # optax's mark for a parameter of the other group
        stacked, inputs = reading(path, x.ndim)
        return optax.contrib.MuonDimensionNumbers(
            tuple(range(stacked, stacked + inputs)), tuple(range(stacked + inputs, x.ndim))
        )

    return by_path(one, updates)


def _to_rms(path: str, update: Any) -> Any:
    """Orthogonal matrices of whatever shape, as large as AdamW's directions are."""
    if not hasattr(update, "ndim"):
        return update
    *_, inputs, outputs = viewed_shape(path, update.shape)
    return update * (MUON_RMS * math.sqrt(max(inputs, outputs)))


def schedule_free(base: Tx, *, b1: float) -> optax.GradientTransformationExtraArgs:
    """Defazio et al. 2024, https://arxiv.org/abs/2405.15682: gradients are taken at y, between z that moves and its mean x.

    Parameters are y; `state.evaluated` gives x. Optax's transformation, made anew with the rate of each step; its update
    is divided by the rate, as the step multiplies by it.
    """

    def at(rate: Any) -> optax.GradientTransformationExtraArgs:
        return optax.contrib.schedule_free(optax.chain(base, optax.scale(-rate)), learning_rate=rate, b1=b1)

    def update(
        grads: Params, state: Any, params: Params | None = None, *, learning_rate: jax.Array, **_: Any
    ) -> tuple[Params, Any]:
        updates, state = at(learning_rate).update(grads, state, params)
        return jax.tree.map(lambda u: -u / learning_rate, updates), state

    return optax.GradientTransformationExtraArgs(at(1.0).init, update)


# --- one rule for every parameter -------------------------------------------------------------------------------------


def weight_decays(params: Params, config: Optimizer) -> dict[str, float]:
    """Path -> weight decay: of `decays` where a pattern fits, else none where `no_decay` fits, else `weight_decay`."""
    unused = [pattern for pattern in config.no_decay if pattern not in Optimizer().no_decay]
    _check_patterns(tree.flatten(params), unused, place="config.optimizer.no_decay")
    default = {
        path: 0.0 if tree.matches(path, config.no_decay) else config.weight_decay for path in tree.flatten(params)
    }
    return {**default, **ruled(params, config.decays, place="config.optimizer.decays")}


def multipliers(params: Params, config: Optimizer) -> dict[str, Any]:
    """Path -> what its learning rate is multiplied with: a number, or one per layer that broadcasts over a stack."""
    flat = tree.flatten(params)
    rates = {**dict.fromkeys(flat, 1.0), **ruled(params, config.rates, place="config.optimizer.rates")}
    if config.layer_decay == 1:
        return rates
    return {path: rates[path] * _depth(path, x, num_layers(params), config.layer_decay) for path, x in flat.items()}


def _depth(path: str, x: Any, layers: int, decay: float) -> Any:
    """decay^(how many layers are above): 1 for the last layer and all that follows it, decay^L for the embedding.

    Clark et al. 2020 (ELECTRA), https://arxiv.org/abs/2003.10555; a tied embedding counts as the embedding.
    """
    if path.startswith("layers/"):
        return np.float32(decay ** np.arange(layers - 1, -1, -1.0)).reshape(-1, *(1,) * (len(x.shape) - 1))
    return decay**layers if path.startswith("embed/") else 1.0


def num_layers(params: Params) -> int:
    """Layers of the stack. Raises Fault where none of it is trained."""
    stacks = [x.shape[0] for path, x in tree.flatten(params).items() if path.startswith("layers/")]
    if not stacks:
        raise Fault("config.optimizer.layer_decay: no parameter of a layer is trained; leave it at 1")
    return stacks[0]


def ruled(params: Params, rules: Mapping[str, float], *, place: str) -> dict[str, float]:
    """Path -> value for the parameters that a pattern fits. Raises Fault where one fits nothing, or two fit one parameter."""
    paths = tree.flatten(params)
    _check_patterns(paths, rules, place=place)
    found: dict[str, float] = {}
    for path in paths:
        fitting = [pattern for pattern in rules if tree.matches(path, [pattern])]
        if len(fitting) > 1:
            raise Fault(f"{place}: {' and '.join(map(repr, fitting))} both fit {path}; make one of them narrower")
        if fitting:
            found[path] = rules[fitting[0]]
    return found


def _check_patterns(paths: Collection[str], patterns: Collection[str], *, place: str) -> None:
    for pattern in patterns:
        if not any(tree.matches(path, [pattern]) for path in paths):
            raise Fault(f"{place}: {pattern!r} fits no parameter that is trained.{nearest(pattern, list(paths))}")


def _decay(config: Optimizer) -> list[Tx]:
    """Decoupled: the step multiplies it by the learning rate, not by gradients' size."""

    def one(decay: float, u: jax.Array, p: jax.Array) -> jax.Array:
        return u + decay * p if decay else u

    if not config.weight_decay and not config.decays:
        return []
    return [_with_rules(lambda params: weight_decays(params, config), one)]


def _rates(config: Optimizer) -> list[Tx]:
    def one(rate: Any, u: jax.Array, p: jax.Array) -> jax.Array:
        return u if isinstance(rate, float) and rate == 1 else u * rate

    if config.layer_decay == 1 and not config.rates:
        return []
    return [_with_rules(lambda params: multipliers(params, config), one)]


def _with_rules(rules: Callable[[Params], dict[str, Any]], one: Callable[[Any, jax.Array, jax.Array], jax.Array]) -> Tx:
    """`one(rule, update, parameter)` for every leaf; the rules are looked up, and checked, when the state is made."""

    def init(params: Params) -> optax.EmptyState:
        rules(params)
        return optax.EmptyState()

    def update(updates: Params, state: Any, params: Params | None = None) -> tuple[Params, Any]:
        assert params is not None
        return jax.tree.map(one, tree.unflatten(rules(params)), updates, params), state

    return optax.GradientTransformation(init, update)


def by_path(function: Callable[..., Any], first: Any, *rest: Any) -> Any:
    """`function(path, leaf, ...)` for every leaf of trees with the same names."""
    flat, others = tree.flatten(first), [tree.flatten(one) for one in rest]
    return tree.unflatten({path: function(path, x, *(one[path] for one in others)) for path, x in flat.items()})


# --- parameters as matrices -------------------------------------------------------------------------------------------


class Reading(NamedTuple):
    """How dimensions are read: `stacked` ones that number matrices, then `inputs`, then outputs; no inputs: vectors."""

    stacked: int
    inputs: int


def reading(path: str, ndim: int) -> Reading:
    """What the dimensions of a parameter are, by its place in the tree.

    layers/attn/q/kernel  (L, D, N, H)      L matrices   D x NH
    layers/attn/o/kernel  (L, N, H, D)      L matrices   NH x D
    layers/mlp/up/kernel  (L, E, D, F)      LE matrices  D x F
    layers/attn/q/lora_b  (L, r, N, H)      L matrices   r x NH
    layers/attn/q/bias    (L, N, H)         L vectors
    embed/kernel          (V, D)            one matrix
    """
    *parents, leaf = path.split(tree.SEPARATOR)
    stacked = int(parents[:1] == ["layers"])
    if parents[:2] == ["layers", "mlp"] and ndim - stacked == (2 if leaf in ("bias", "lora_m") else 3):
        stacked += 1  # experts
    if leaf not in ("kernel", "lora_a", "lora_b") or ndim - stacked < 2:
        return Reading(stacked, 0)
    if leaf == "lora_a":
        return Reading(stacked, ndim - stacked - 1)
    return Reading(stacked, 2 if leaf == "kernel" and parents[-1] == "o" else 1)


def viewed_shape(path: str, shape: Sequence[int]) -> tuple[int, ...]:
    """The shape as stacked matrices (..., inputs, outputs) or vectors (..., n)."""
    stacked, inputs = reading(path, len(shape))
    middle = stacked + inputs
    sides = (shape[stacked:middle], shape[middle:]) if inputs else (shape[stacked:],)
    return (*shape[:stacked], *(math.prod(side) for side in sides))


def per_matrix(tx: Tx) -> Tx:
    """The transformation of every matrix or vector by itself, for one that treats each leaf of a tree alone.

    Its state is a tree of states, one per parameter; all matrices of a parameter share what is a single number.
    """

    def over(path: str, shape: Sequence[int], function: Callable[..., Any], state_at: str) -> Callable[..., Any]:
        stacked, _ = reading(path, len(shape))
        one = jax.eval_shape(tx.init, jax.ShapeDtypeStruct(viewed_shape(path, shape)[stacked:], jnp.float32))
        axes = jax.tree.map(lambda x: 0 if x.ndim else None, one)
        for _ in range(stacked):
            ins, outs = (0, axes) if state_at == "out" else ((0, axes, 0), (0, axes))
            function = jax.vmap(function, in_axes=ins, out_axes=outs)
        return function

    def begin(path: str, p: jax.Array) -> Any:
        return over(path, p.shape, tx.init, "out")(p.reshape(viewed_shape(path, p.shape)))

    def init(params: Params) -> Any:
        return by_path(begin, params)

    def update(grads: Params, state: Any, params: Params | None = None) -> tuple[Params, Any]:
        assert params is not None

        def one(path: str, g: jax.Array, kept: Any, p: jax.Array) -> tuple[jax.Array, Any]:
            shape = viewed_shape(path, g.shape)
            direction, kept = over(path, g.shape, tx.update, "both")(g.reshape(shape), kept, p.reshape(shape))
            return direction.reshape(g.shape), kept

        results = by_path(one, grads, state, params)
        return by_path(lambda _, pair: pair[0], results), by_path(lambda _, pair: pair[1], results)

    return optax.GradientTransformation(init, update)


# --- where an optimizer's state lies ----------------------------------------------------------------------------------


def state_axes(opt_state: Any, shapes: Params, axes: Axes) -> Any:
    """The logical axes of everything that an optimizer keeps, by the parameter whose path its own place ends with.

    As the parameter where the shapes agree, or agree but for the last dimension, which blocks divide; factors of a matrix
    by the side they are of; all else is whole.
    """
    specs, arrays = tree.flatten(axes), tree.flatten(shapes)

    def one(keys: Any, kept: Any) -> P:
        path = _parameter(keys, arrays)
        if path is None:
            return P()
        shape, names = arrays[path].shape, (*specs[path], *(None,) * (len(arrays[path].shape) - len(specs[path])))
        if kept.shape == shape or (len(kept.shape) == len(shape) and kept.shape[:-1] == shape[:-1]):
            return P(*names)
        return _factor_axes(path, shape, names, kept.shape, field=jax.tree_util.keystr(keys[-1:]))

    return jax.tree_util.tree_map_with_path(one, opt_state)


def _parameter(keys: Sequence[Any], paths: Collection[str]) -> str | None:
    """The parameter that a place in a state belongs to, if any: the longest run of names that is a path."""
    names = [str(key.key) for key in keys if isinstance(key, jax.tree_util.DictKey)]
    return next((path for start in range(len(names)) if (path := tree.SEPARATOR.join(names[start:])) in paths), None)


def _factor_axes(path: str, shape: Sequence[int], names: Sequence[Any], kept: Sequence[int], *, field: str) -> P:
    """Of what is kept of a matrix: all of it, (..., inputs, outputs), or one side. Optax's rows are the shorter side."""
    stacked, inputs = reading(path, len(shape))
    viewed, leading = viewed_shape(path, shape), names[:stacked]
    sides, of_sides = viewed[stacked:], (names[stacked], names[stacked + inputs])
    if tuple(kept) == viewed:
        return P(*leading, *of_sides[: len(sides)])
    if len(kept) != stacked + 1 or tuple(kept[:-1]) != viewed[:stacked] or kept[-1] not in sides:
        return P()
    side = sides.index(kept[-1]) if len(set(sides)) == len(sides) else int(field == ".v_col")
    return P(*leading, of_sides[side])
