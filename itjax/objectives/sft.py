"""Supervised fine-tuning: the weighted sum of -log p(target), over whatever positions the data gave a weight."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from itjax.base.records import PackedBatch
from itjax.base.schema import Loss
from itjax.kernels.cross_entropy import linear_cross_entropy
from itjax.models.model import Model, Params, join
from itjax.objectives.sums import LossSums
from itjax.parallel import exchange, layout

LossFn = Callable[..., LossSums]  # (params, frozen, batch, key=None); without a key nothing is drawn


def sft(model: Model, *, loss: Loss, num_sources: int = 0) -> LossFn:
    """The loss of a batch of packed rows: `loss` = Σ w·(nll + z_loss·log Z²), `weight` = Σ w.

    `loss.chunk` positions per device have logits at one time. `aux` has "nll" = Σ w·nll, "correct" = Σ w·[the target has
    the highest logit], what the network gives (`model.Features`), and, when `num_sources` are asked for, "source_loss" and
    "source_weight": Σ w·nll and Σ w per source. Experts add their balance and router terms to `loss`, as mean over layers.
    """
    coefficients = {"router_balance": loss.router_balance, "router_z": loss.router_z}

    def loss_fn(params: Params, frozen: Params, batch: PackedBatch, key: jax.Array | None = None) -> LossSums:
        whole = join(params, frozen)
        features = model.features(whole, batch, key)
        entropy = linear_cross_entropy(
            features.x_BTD,
            model.head(whole),
            batch.targets_BT,
            batch.weights_BT,
            vocab=model.config.real_ids,
            z_loss=loss.z_loss,
            softcap=model.config.logit_softcap,
            chunk=loss.chunk,
            shards=(layout.ways("batch", batch.tokens_BT.shape[0]), layout.ways("length", batch.tokens_BT.shape[1])),
            pin=layout.pin,
            add=exchange.added,
        )
        weights_BT = batch.weights_BT.astype(jnp.float32)
        nll_BT = weights_BT * entropy.nll_BT
        aux = {"nll": nll_BT.sum(), "correct": (weights_BT * entropy.hits_BT).sum()}
        if num_sources:
            aux["source_loss"] = _per_source(nll_BT, batch.source_BT, num_sources)
            aux["source_weight"] = _per_source(weights_BT, batch.source_BT, num_sources)
        total = entropy.loss
        for name, sums in features.aux.items():
            aux[name] = sums.mean() if name in coefficients else sums  # over layers
            total += coefficients[name] * aux[name] if name in coefficients else 0.0
        return LossSums(total, weights_BT.sum(), aux)

    return loss_fn


def _per_source(x_BT: jax.Array, source_BT: jax.Array, num_sources: int) -> jax.Array:
    return jax.ops.segment_sum(x_BT.reshape(-1), source_BT.reshape(-1), num_segments=num_sources)
