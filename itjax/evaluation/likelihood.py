"""Held-out loss per source: the training objective on rows that are never trained on."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from itjax.base.schema import Loss
from itjax.data.loader import make_loader
from itjax.data.prepare import HeldOut
from itjax.models.model import Model, Params
from itjax.objectives.sft import sft
from itjax.parallel import layout


def held_out_loss(
    model: Model, held: Sequence[HeldOut], *, mesh: Mesh, rows: int, length: int, chunk: int
) -> Callable[[int, Params], list[dict[str, Any]]]:
    """An evaluator: (step, parameters) -> one line per source with the mean loss of its held-out tokens, in nats."""
    loader = make_loader(
        [part.encoded for part in held],
        weights=[None] * len(held),
        length=length,
        rows=rows,
        steps=None,
        epochs=1,
        window=1000,
        seed=0,
        packing=True,
        reduction="token",
        local_rows=layout.local_rows(mesh, rows),
        workers=0,
    )
    batches = [loader.batch(step) for step in range(loader.num_steps)]
    loss_fn = sft(model, loss=Loss(chunk=chunk, router_balance=0.0), num_sources=len(held))
    sums = jax.jit(lambda params, batch: loss_fn(params, {}, batch))

    def evaluate(step: int, params: Params) -> list[dict[str, Any]]:
        totals = [sums(params, layout.place(batch, mesh, rows=rows)) for batch in batches]
        loss = np.sum([np.asarray(total.aux["source_loss"], np.float64) for total in totals], axis=0)
        weight = np.sum([np.asarray(total.aux["source_weight"], np.float64) for total in totals], axis=0)
        return [
            _line(part, loss[number] / weight[number], count=int(part.encoded.num_trained.sum()))
            for number, part in enumerate(held)
        ]

    return evaluate


def _line(part: HeldOut, mean: float, *, count: int) -> dict[str, Any]:
    assert math.isfinite(mean) or count == 0
    return {
        "task": part.name,
        "split": "heldout",
        "template_split": part.template_split,
        "metric": "loss",
        "value": mean,
        "count": count,
    }
