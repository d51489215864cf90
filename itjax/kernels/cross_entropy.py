"""Cross-entropy of features and a head, in chunks: logits of all positions never exist at one time.

B rows, T positions, D width, V vocabulary; S shards of R = B·T / S positions each, C positions of each in a chunk.
Only positions with a weight are computed. Their gradients are made in the forward pass, where the logits are at hand:
three products per chunk instead of four, and the head's gradient adds up in float32.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

Pin = Callable[..., jax.Array]


def add(x_SVD: jax.Array, *names: str | None) -> jax.Array:
    """The sum over shards, where no mesh splits them."""
    del names
    return x_SVD.sum(axis=0)


class CrossEntropy(NamedTuple):
    """`loss` is what gradients flow through; the rest are facts about each position, 0 where the weight is 0."""

    loss: jax.Array  # () float32: Σ w·(nll + z_loss·log Z²)
    nll_BT: jax.Array  # float32: -log p(target)
    log_z_BT: jax.Array  # float32: log Σ exp(logits)
    hits_BT: jax.Array  # float32: 1 where no logit is above the target's


class _Settings(NamedTuple):
    vocab: int
    z_loss: float
    softcap: float
    chunk: int
    pin: Pin
    add: Pin


def linear_cross_entropy(
    x_BTD: jax.Array,
    head_VD: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    *,
    vocab: int,
    z_loss: float,
    softcap: float = 0.0,
    chunk: int,
    shards: tuple[int, int],
    pin: Pin,
    add: Pin = add,
) -> CrossEntropy:
    """Weighted sums of -log p(target), p = softmax(x · head), without the logits of more than `chunk` positions a shard.

    With a `softcap` c the logits are c·tanh(x · head / c). `vocab` is how many rows of the head are real (the others get
    no probability), `shards` into how many parts the mesh splits rows and positions, `pin(x, *names)` lays an array out on it,
    `add(x, *names)` adds up what the shards have.
    Products are in the dtype of `x`, the rest in float32.
    """
    weights_SR = jax.lax.stop_gradient(_by_shard(weights_BT.astype(jnp.float32), shards))
    out = _sums(
        pin(_by_shard(x_BTD, shards), "shards", None, None),
        head_VD,
        _by_shard(targets_BT, shards),
        weights_SR,
        _Settings(vocab, z_loss, softcap, min(chunk, weights_SR.shape[1]), pin, add),
    )
    facts = [jax.lax.stop_gradient(_by_row(fact_SR, targets_BT.shape, shards)) for fact_SR in out[1:]]
    return CrossEntropy(out.loss, *facts)


def _by_shard(x_BT_: jax.Array, shards: tuple[int, int]) -> jax.Array:
    """(B, T, ...) -> (S, R, ...): what each device has, in a row."""
    (B, T), (rows, positions), rest = x_BT_.shape[:2], shards, x_BT_.shape[2:]
    split = x_BT_.reshape(rows, B // rows, positions, T // positions, *rest)
    return split.swapaxes(1, 2).reshape(rows * positions, -1, *rest)


def _by_row(x_SR: jax.Array, shape: tuple[int, ...], shards: tuple[int, int]) -> jax.Array:
    """The inverse of `_by_shard`."""
    (B, T), (rows, positions) = shape, shards
    return x_SR.reshape(rows, positions, B // rows, T // positions).swapaxes(1, 2).reshape(B, T)


def reference(
    x_BTD: jax.Array,
    head_VD: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    *,
    vocab: int,
    z_loss: float,
    softcap: float = 0.0,
) -> CrossEntropy:
    """The definition, plainly: all logits at one time. The chunked one is tested against it."""
    logits_BTV = jnp.einsum("BTD,VD->BTV", x_BTD, head_VD[:vocab].astype(x_BTD.dtype)).astype(jnp.float32)
    if softcap:
        logits_BTV = softcap * jnp.tanh(logits_BTV / softcap)
    log_z_BT = jax.nn.logsumexp(logits_BTV, axis=-1)
    target_BT = jnp.take_along_axis(logits_BTV, targets_BT[..., None], axis=-1)[..., 0]
    nll_BT = log_z_BT - target_BT
    loss = (weights_BT * (nll_BT + z_loss * log_z_BT**2)).sum()
    is_trained_BT = weights_BT != 0
    facts = (nll_BT, log_z_BT, (target_BT >= logits_BTV.max(axis=-1)).astype(jnp.float32))
    return CrossEntropy(loss, *(jax.lax.stop_gradient(jnp.where(is_trained_BT, fact, 0)) for fact in facts))


class _Chunk(NamedTuple):
    """What the logits of one chunk say, and the gradient of the loss by them."""

    nll_SC: jax.Array
    log_z_SC: jax.Array
    hits_SC: jax.Array
    grad_SCV: jax.Array


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _sums(
    x_SRD: jax.Array, head_VD: jax.Array, targets_SR: jax.Array, weights_SR: jax.Array, settings: _Settings
) -> CrossEntropy:
    return _loop(x_SRD, head_VD, targets_SR, weights_SR, settings, x_moves=False, head_moves=False)[0]


def _sums_forward(x_SRD, head_VD, targets_SR, weights_SR, settings):
    """Inputs say whether a gradient by them is asked for: none of the head is made where the head is frozen."""
    return _loop(
        x_SRD.value,
        head_VD.value,
        targets_SR.value,
        weights_SR.value,
        settings,
        x_moves=x_SRD.perturbed,
        head_moves=head_VD.perturbed,
    )


def _sums_backward(settings, grads, cotangent):
    del settings  # facts per position carry no gradient (see `linear_cross_entropy`), only the loss does
    scale = cotangent.loss
    x_grad_SRD, head_grad_VD = (None if grad is None else grad * scale.astype(grad.dtype) for grad in grads)
    return (x_grad_SRD, head_grad_VD, None, None)


_sums.defvjp(_sums_forward, _sums_backward, symbolic_zeros=True)


def _loop(x_SRD, head_VD, targets_SR, weights_SR, settings, *, x_moves, head_moves):
    """(CrossEntropy of S x R positions, gradients by x and head or None): one chunk of weighted positions after another."""
    S, R, _ = x_SRD.shape
    C, pin = settings.chunk, settings.pin
    places_SR, num_chunks = _weighted_first(weights_SR, C)
    kernel_VD = pin(head_VD.astype(x_SRD.dtype), "vocab", None)  # whole over D: gathered once, not in every chunk
    facts_SR = tuple(pin(jnp.zeros((S, R), jnp.float32), "shards", None) for _ in range(3))
    x_grad_SRD = pin(jnp.zeros_like(x_SRD), "shards", None, None) if x_moves else None
    # A sum on each shard, added at the end.
    head_grad_SVD = pin(jnp.zeros((S, *head_VD.shape), jnp.float32), "shards", "vocab", None) if head_moves else None

    def body(number, carry):
        facts_SR, x_grad_SRD, head_grad_SVD = carry
        places_SC = jax.lax.dynamic_slice_in_dim(places_SR, number * C, C, axis=1)
        x_SCD = pin(_take(x_SRD, places_SC), "shards", None, None)
        weights_SC = _take(weights_SR, places_SC)
        logits_SCV = pin(_logits(x_SCD, kernel_VD), "shards", None, "vocab")
        chunk = _chunk(logits_SCV, _take(targets_SR, places_SC), weights_SC, settings)
        new = (chunk.nll_SC, chunk.log_z_SC, chunk.hits_SC)
        facts_SR = tuple(_put(fact, places_SC, value) for fact, value in zip(facts_SR, new, strict=True))
        grad_SCV = pin(chunk.grad_SCV.astype(x_SRD.dtype), "shards", None, "vocab")
        if x_moves:
            x_grad_SRD = _put(x_grad_SRD, places_SC, pin(_product(grad_SCV, kernel_VD), "shards", None, None))
        if head_moves:
            head_grad_SVD += _outer(grad_SCV, x_SCD)
        return facts_SR, x_grad_SRD, head_grad_SVD

    carry = jax.lax.fori_loop(0, num_chunks, body, (facts_SR, x_grad_SRD, head_grad_SVD))
    facts_SR, x_grad_SRD, head_grad_SVD = carry
    nll_SR, log_z_SR, _ = facts_SR
    loss = (weights_SR * (nll_SR + settings.z_loss * log_z_SR**2)).sum()
    head_grad_VD = settings.add(head_grad_SVD, "vocab", "embed").astype(head_VD.dtype) if head_moves else None
    return CrossEntropy(loss, *facts_SR), (x_grad_SRD, head_grad_VD)


def _weighted_first(weights_SR: jax.Array, chunk: int) -> tuple[jax.Array, jax.Array]:
    """Places of the positions of each shard, those with a weight first, and how many chunks hold those.

    weights  0 2 0 1 1      places  1 3 4 5 5 5      R = 5 marks a place that does not exist      chunk 2: 2 chunks
    """
    S, R = weights_SR.shape
    has_weight_SR = weights_SR != 0
    rank_SR = jnp.where(has_weight_SR, jnp.cumsum(has_weight_SR, axis=1) - 1, R + chunk)
    places_SR = jnp.full((S, -(-R // chunk) * chunk), R, jnp.int32)
    places_SR = _put(places_SR, rank_SR, jnp.broadcast_to(jnp.arange(R, dtype=jnp.int32)[None], (S, R)))
    most = has_weight_SR.sum(axis=1).max()
    return places_SR, (most + chunk - 1) // chunk


def _chunk(logits_SCV: jax.Array, targets_SC: jax.Array, weights_SC: jax.Array, settings: _Settings) -> _Chunk:
    """Softmax in float32; the gradient of w·(-log p + z·log Z²) is w·((1 + 2z·log Z)·p - [v is the target]).

    A soft cap multiplies it by its own derivative, 1 - (logit / c)².
    """
    slope_SCV = None
    if settings.softcap:
        logits_SCV = settings.softcap * jnp.tanh(logits_SCV / settings.softcap)
        slope_SCV = 1.0 - jnp.square(logits_SCV / settings.softcap)
    columns_11V = jnp.arange(logits_SCV.shape[-1], dtype=jnp.int32)[None, None]
    if settings.vocab < logits_SCV.shape[-1]:
        logits_SCV = jnp.where(columns_11V < settings.vocab, logits_SCV, -jnp.inf)
    is_target_SCV = columns_11V == targets_SC[..., None]
    highest_SC1 = logits_SCV.max(axis=-1, keepdims=True)
    exp_SCV = jnp.exp(logits_SCV - highest_SC1)
    total_SC1 = exp_SCV.sum(axis=-1, keepdims=True)
    log_z_SC = (jnp.log(total_SC1) + highest_SC1)[..., 0]
    target_SC = jnp.where(is_target_SCV, logits_SCV, 0.0).sum(axis=-1)  # where V is sharded a gather would move logits
    share_SC = weights_SC * (1.0 + 2.0 * settings.z_loss * log_z_SC)
    grad_SCV = exp_SCV * (share_SC[..., None] / total_SC1) - jnp.where(is_target_SCV, weights_SC[..., None], 0.0)
    if slope_SCV is not None:
        grad_SCV *= slope_SCV
    return _Chunk(log_z_SC - target_SC, log_z_SC, (target_SC >= highest_SC1[..., 0]).astype(jnp.float32), grad_SCV)


def _take(x_SR_: jax.Array, places_SC: jax.Array) -> jax.Array:
    """x[s, places[s, c]]; 0 where there is no such place."""
    return jax.vmap(lambda x, places: x.at[places].get(mode="fill", fill_value=0))(x_SR_, places_SC)


def _put(x_SR_: jax.Array, places_SC: jax.Array, new_SC_: jax.Array) -> jax.Array:
    """x with new[s, c] at places[s, c]; places that do not exist are passed over. No place comes twice."""
    return jax.vmap(lambda x, places, new: x.at[places].set(new, mode="drop"))(x_SR_, places_SC, new_SC_)


def _logits(x_SCD: jax.Array, head_VD: jax.Array) -> jax.Array:
    """float32 logits, as one product of matrices: XLA runs those twice as fast on CPUs as the same sums in 3-D."""
    S, C, D = x_SCD.shape
    logits_RV = jnp.einsum("RD,VD->RV", x_SCD.reshape(S * C, D), head_VD, preferred_element_type=jnp.float32)
    return logits_RV.reshape(S, C, -1)


def _product(grad_SCV: jax.Array, head_VD: jax.Array) -> jax.Array:
    S, C, V = grad_SCV.shape
    return (grad_SCV.reshape(S * C, V) @ head_VD).reshape(S, C, -1)


def _outer(grad_SCV: jax.Array, x_SCD: jax.Array) -> jax.Array:
    """The head's gradient of each shard, float32 whatever the inputs."""
    if grad_SCV.shape[0] == 1:
        return jnp.einsum("CV,CD->VD", grad_SCV[0], x_SCD[0], preferred_element_type=jnp.float32)[None]
    return jnp.einsum("SCV,SCD->SVD", grad_SCV, x_SCD, preferred_element_type=jnp.float32)
