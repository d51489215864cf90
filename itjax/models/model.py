"""A network as plain things: what it is made of, how to draw it, how to run it.

Outside this folder parameters are nested dicts of arrays (`layers/attn/q/kernel`) and nothing knows of modules.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
from flax import nnx
from jax.sharding import PartitionSpec

from itjax.base import tree
from itjax.base.records import PackedBatch
from itjax.base.schema import Lora
from itjax.kernels import attention as attention_kernels
from itjax.models import lora as adapters
from itjax.models.config import ModelConfig
from itjax.models.decoder import Cache, Decoder, empty_cache
from itjax.models.layers import Options

Params = dict[str, Any]  # nested; stacked layers lead with L
Axes = dict[str, Any]  # the same tree, leaves are PartitionSpecs of logical names

NO_LORA = Lora()
UNROLLED_ON_CPU = 8  # layers; a loop of 4 small ones takes 1.4 times as long as the same layers written out


class Features(NamedTuple):
    """What the head reads, and sums over tokens, by name: of experts, see `moe.Mixture`; none in a dense decoder."""

    x_BTD: jax.Array
    aux: dict[str, jax.Array]


@dataclass(frozen=True)
class Model:
    """Everything the rest of the package needs to know of a network."""

    config: ModelConfig
    abstract: Params  # ShapeDtypeStruct leaves
    axes: Axes
    init: Callable[[jax.Array], Params]
    features: Callable[..., Features]  # (params, batch, key=None); the key is for what is drawn, None: nothing is
    head: Callable[[Params], jax.Array]  # the float32 (V, D) matrix, for losses that never make all logits
    unembed: Callable[[Params, jax.Array], jax.Array]  # x_..D -> float32 logits_..V
    init_cache: Callable[[int, int], Cache]  # (rows, length)
    step: Callable[[Params, Cache, jax.Array], tuple[jax.Array, Cache]]  # next tokens_BT -> last position's logits_BV


def build(
    config: ModelConfig,
    *,
    dtype: str,
    attention: str,
    remat: str,
    lora: Lora = NO_LORA,
    base: str = "float32",
    capacity_factor: float | None = None,
    platform: str | None = None,
) -> Model:
    """The decoder of a config, products in `dtype`, to run on a platform ("cpu", "gpu", "tpu"; None: jax's own). No array is made.

    Parameters are float32, except that with adapters what stays frozen is kept as `base` says. `capacity_factor` bounds
    what an expert takes, see `moe.Mixture`.
    """
    platform = platform or jax.default_backend()
    attention_kernels.check(attention)
    options = Options(lora, base, capacity_factor)
    unroll = config.layers if platform == "cpu" and config.layers <= UNROLLED_ON_CPU else 1

    def make(key: jax.Array) -> Decoder:
        return Decoder(
            config, dtype=dtype, attention=attention, platform=platform, remat=remat, unroll=unroll, options=options,
            key=key,
        )  # fmt: skip

    def drawn(key: jax.Array) -> Params:
        return adapters.keep(nnx.to_pure_dict(nnx.state(make(key))), lora, base=base)

    graph, state = nnx.split(nnx.eval_shape(make, jax.random.key(0)))

    def live(params: Params) -> Decoder:
        return nnx.merge(graph, params)

    def features(params: Params, batch: PackedBatch, key: jax.Array | None = None) -> Features:
        x_BTD, aux = live(params).features(
            batch.tokens_BT, batch.positions_BT, batch.segments_BT, batch.weights_BT, key if lora.dropout else None
        )
        return Features(x_BTD, aux)

    def step(params: Params, cache: Cache, tokens_BT: jax.Array) -> tuple[jax.Array, Cache]:
        decoder = live(params)
        x_BTD, cache = decoder.step(cache, tokens_BT)
        return decoder.unembed(x_BTD[:, -1]), cache

    return Model(
        config=config,
        abstract=jax.eval_shape(drawn, jax.random.key(0)),
        axes=_axes(state),
        init=jax.jit(drawn),
        features=features,
        head=lambda params: live(params).head_VD(),
        unembed=lambda params, x: live(params).unembed(x),
        init_cache=lambda rows, length: empty_cache(config, dtype=dtype, rows=rows, length=length),
        step=step,
    )


def join(params: Params, frozen: Params) -> Params:
    """Two trees of parameters with no leaf in common, as one."""
    moving, still = tree.flatten(params), tree.flatten(frozen)
    assert not moving.keys() & still.keys(), sorted(moving.keys() & still.keys())
    return tree.unflatten({**moving, **still})


def _axes(state: nnx.State) -> Axes:
    """Logical axes from beside each parameter; those of stacked layers lead with "layers"."""
    axes = {}
    for path, variable in nnx.to_flat_state(state):
        names = variable.get_metadata()["axes"]
        stacked = ("layers",) if path[0] == "layers" else ()
        axes[tree.SEPARATOR.join(map(str, path))] = PartitionSpec(*stacked, *names)
    return tree.unflatten(axes)
