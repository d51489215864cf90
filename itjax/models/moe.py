"""A mixture of experts: a router sends each token to a few of many feed-forwards, and adds up what they say.

B rows, T positions, D width, F feed-forward of one expert, E experts, C experts that a token chooses. Padding goes to no
expert. Nothing else is left out unless a capacity is set, and then it is counted.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from itjax.models import dispatch, lora, quantize, remat
from itjax.models.activations import gated
from itjax.models.config import Experts, ModelConfig
from itjax.models.dispatch import Groups, Routes
from itjax.models.layers import Draws, Options, Quantized, draw, draw_a, drop, kept
from itjax.models.leaves import KEEP, names_of, shapes_of, travelling, uneven_blocks
from itjax.models.remat import named
from itjax.parallel import exchange, layout
from itjax.parallel.layout import pin

Aux = dict[str, jax.Array]
ROWS = PartitionSpec("batch", "length", None)


class Facts(NamedTuple):
    """What is known of the positions of a packed batch: which document each belongs to, and what it weighs in the loss."""

    segments_BT: jax.Array  # 0 is padding
    weights_BT: jax.Array


class Router(nnx.Module):
    """Scores of all experts for a token, in float32 whatever the activations are in: rounding is not to choose."""

    def __init__(self, config: ModelConfig, experts: Experts, key: jax.Array) -> None:
        D, E = config.dim, experts.number
        self.kernel = nnx.Param(draw(key, (D, E), fan_in=D), axes=("embed", "routes"))
        self.bias = nnx.Param(jnp.zeros((E,)), axes=("routes",)) if experts.bias else None

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        kernel_DE = self.kernel[...].astype(jnp.float32)
        logits_BTE = jnp.einsum("BTD,DE->BTE", x_BTD.astype(jnp.float32), kernel_DE, precision="highest")
        if self.bias is not None:
            logits_BTE += self.bias[...].astype(jnp.float32).reshape(1, 1, -1)
        return pin(logits_BTE, "batch", "length", "routes")


class ExpertProjection(nnx.Module):
    """One linear layer of every expert: y = x · kernel[e] + bias[e] for the rows that belong to expert e.

    `place` is where it stands in the tree of parameters, and adapters and quantised kernels are as in `layers.Projection`:
    with an adapter, every expert has its own.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        axes: tuple[str, str, str],
        *,
        gain: float,
        key: jax.Array,
        place: str,
        options: Options,
        bias: bool,
    ) -> None:
        (E, inputs, outputs), self.lora = shape, options.lora
        kind = lora.stored(options.lora, options.base, place)
        self.kernel = kept(draw(key, shape, fan_in=inputs) * gain, axes, kind=kind, contract=1, lead=1)
        self.bias = nnx.Param(jnp.zeros((E, outputs)), axes=(axes[0], axes[2])) if bias else None
        adapts = lora.adapts(options.lora, place)
        if adapts and options.lora.dora:
            raise ValueError(
                f"lora.dora: {place} is of experts, whose columns are not measured; set lora.targets to others"
            )
        a_axes, b_axes, rank = (axes[0], axes[1], "rank"), (axes[0], "rank", axes[2]), options.lora.rank
        drawn_a = draw_a(jax.random.fold_in(key, 1), (E, inputs, rank), fan_in=inputs)
        self.lora_a = nnx.Param(drawn_a, axes=a_axes) if adapts else None
        self.lora_b = nnx.Param(jnp.zeros((E, rank, outputs)), axes=b_axes) if adapts else None

    def __call__(self, x_MI: jax.Array, groups: Groups, draws: Draws, *, parts: int = 1) -> jax.Array:
        """`parts`: of the inputs, on as many devices, whose results are added up; each adds its part of the bias."""
        y_MO = self._base(x_MI, groups)
        if self.lora_a is not None and self.lora_b is not None:
            a_EIr, b_ErO = self.lora_a[...].astype(x_MI.dtype), self.lora_b[...].astype(x_MI.dtype)
            read_Mr = groups.product(drop(x_MI, self.lora.dropout, draws), a_EIr)
            y_MO += groups.product(read_Mr, b_ErO) * lora.scale(self.lora)
        if self.bias is not None:
            bias_E1O = (self.bias[...] / parts).astype(x_MI.dtype)[:, None]
            y_MO += groups.product(jnp.ones_like(x_MI[:, :1]), bias_E1O)
        return y_MO

    def _base(self, x_MI: jax.Array, groups: Groups) -> jax.Array:
        if not isinstance(self.kernel, Quantized):
            return groups.product(x_MI, self.kernel[...].astype(x_MI.dtype))

        @jax.checkpoint  # the backward pass makes the kernels again from their codes: nothing of their size is kept
        def product(x_MI: jax.Array, leaves: quantize.Leaves) -> jax.Array:
            return groups.product(x_MI, quantize.dequantize(leaves, x_MI.dtype))

        return product(x_MI, self.kernel.leaves())


class Mixture(nnx.Module):
    """Takes the place of the feed-forward. `options.capacity_factor` limits how many tokens of a row an expert takes.

    It is a multiple of an even share: with 1.25 an expert takes at most 1.25·T·C/E tokens of each row of T positions, first
    choices before second ones and earlier tokens before later ones. None: as many as come. Rows are the unit so that what
    is dropped depends on neither the mesh nor the micro-batches nor the order of rows.
    """

    def __init__(self, config: ModelConfig, keys: Iterator[jax.Array], options: Options) -> None:
        assert config.experts is not None
        self.experts, self.width, self.activation = config.experts, config.ffn, config.activation
        self.capacity_factor = options.capacity_factor
        E, D, F = config.experts.number, config.dim, config.ffn
        self.router = Router(config, config.experts, next(keys))

        def part(name: str, shape: tuple[int, int, int], axes: tuple[str, str, str], gain: float) -> ExpertProjection:
            return ExpertProjection(
                shape, axes, gain=gain, key=next(keys), place=f"layers/mlp/{name}", options=options,
                bias=self.experts.bias,
            )  # fmt: skip

        self.gate = part("gate", (E, D, F), ("experts", "embed", "ffn"), 1.0)
        self.up = part("up", (E, D, F), ("experts", "embed", "ffn"), 1.0)
        self.down = part("down", (E, F, D), ("experts", "ffn", "embed"), (2 * config.layers) ** -0.5)

    def __call__(self, x_BTD: jax.Array, draws: Draws, facts: Facts | None) -> tuple[jax.Array, Aux]:
        """The answers of the chosen experts, and sums for the loss and the metrics; none in decoding, without `facts`."""
        logits_BTE = self.router(x_BTD)
        experts_BTC, weights_BTC = choose(logits_BTE, self.experts)
        if facts is None:
            return self._answers(x_BTD, Routes(experts_BTC, weights_BTC), draws), {}
        experts_BTC = jnp.where((facts.segments_BT > 0)[..., None], experts_BTC, self.experts.number)
        routes = dispatch.limited(Routes(experts_BTC, weights_BTC), self._capacity(x_BTD.shape[1]), self.experts.number)
        dropped = (routes.experts_BTC != experts_BTC).sum().astype(jnp.float32)
        return self._answers(x_BTD, routes, draws), {**sums(logits_BTE, experts_BTC, facts), "dropped": dropped}

    def _capacity(self, length: int) -> int | None:
        """Tokens of a row that an expert takes."""
        if self.capacity_factor is None:
            return None
        return min(length, math.ceil(self.capacity_factor * length * self.experts.chosen / self.experts.number))

    def _answers(self, x_BTD: jax.Array, routes: Routes, draws: Draws) -> jax.Array:
        """The weighted sum of what each token's experts say, computed where the experts are."""
        graphs, states = zip(*(nnx.split(part) for part in (self.gate, self.up, self.down)), strict=True)
        leaves, names = [nnx.to_pure_dict(state) for state in states], [names_of(state) for state in states]
        shapes = [shapes_of(part) for part in leaves]
        dtypes = [travelling(part, x_BTD.dtype) for part in leaves]
        for part, names_of_part in zip(leaves, names, strict=True):
            _check_blocks(part, names_of_part)
        ways = dispatch.ways(rows=x_BTD.shape[0], length=x_BTD.shape[1], experts=self.experts.number, width=self.width)
        capacity = None if routes.slots_BTC is None else self._capacity(x_BTD.shape[1])

        def on_device(x_BTD: jax.Array, routes: Routes, leaves: list[Any], key: jax.Array | None) -> jax.Array:
            whole = exchange.gather(leaves, names, shapes, keep=KEEP, dtypes=dtypes)
            gate, up, down = (nnx.merge(graph, part) for graph, part in zip(graphs, whole, strict=True))
            own = Draws(None if key is None else ways.own(key))

            def feed_forward(x_MD: jax.Array, groups: Groups) -> jax.Array:
                gate_MF, up_MF = (named(part(x_MD, groups, own), remat.HIDDEN) for part in (gate, up))
                y_MD = down(gated(gate_MF, up_MF, self.activation), groups, own, parts=ways.parts)
                return named(y_MD, remat.ANSWERED)

            return dispatch.answers(
                x_BTD, routes, feed_forward, ways, number=self.experts.number, capacity=capacity
            )  # fmt: skip

        key = draws.next()
        names_of_key = None if key is None else PartitionSpec()
        names_of_routes = jax.tree.map(lambda _: ROWS, routes)
        return layout.per_device(
            on_device, x_BTD, routes, leaves, key, names=(ROWS, names_of_routes, names, names_of_key)
        )  # fmt: skip


def choose(logits_BTE: jax.Array, experts: Experts) -> tuple[jax.Array, jax.Array]:
    """The experts with the highest scores, best first, and what their answers are multiplied with.

    That is the probability of each among all, or, renormalised, among the chosen.
    """
    chosen_BTC, experts_BTC = jax.lax.top_k(logits_BTE, experts.chosen)
    if experts.renormalize:
        return experts_BTC, jax.nn.softmax(chosen_BTC, axis=-1)
    return experts_BTC, jnp.exp(chosen_BTC - jax.nn.logsumexp(logits_BTE, axis=-1, keepdims=True))


def sums(logits_BTE: jax.Array, experts_BTC: jax.Array, facts: Facts) -> Aux:
    """What the router adds to the loss and to the metrics: float32 sums over tokens, so that they add over batches.

    router_balance  Σ_d w_d · Σ_e f_e·P_e over documents d: w_d is the document's summed loss weight, f_e = E/C times the
                    share of its choices that were e, P_e the mean probability of e. 1 per weight when all are chosen alike.
                    Only P has a gradient. Equations 17 to 20 of DeepSeek-V3, https://arxiv.org/abs/2412.19437
    router_z        Σ_d w_d · mean of logsumexp(logits)^2. Section 2.2 of ST-MoE, https://arxiv.org/abs/2202.08906
    expert_tokens   (E,) how many tokens chose each

    Documents and not batches are balanced, and weigh what they weigh in the loss: so divided by the summed weight of a step
    these are the same for any packing, padding and number of micro-batches.
    """
    E, C = logits_BTE.shape[-1], experts_BTC.shape[-1]
    weights_BT, shares_BTE = jax.vmap(lambda *row: _per_token(*row, number=E))(*facts, experts_BTC)
    balance_BT = E / C * (shares_BTE * jax.nn.softmax(logits_BTE, axis=-1)).sum(axis=-1)
    z_BT = jax.nn.logsumexp(logits_BTE, axis=-1) ** 2
    return {
        "router_balance": (weights_BT * balance_BT).sum(),
        "router_z": (weights_BT * z_BT).sum(),
        "expert_tokens": jnp.zeros(E).at[experts_BTC.reshape(-1)].add(1.0, mode="drop"),
    }


def _per_token(
    segments_T: jax.Array, weights_T: jax.Array, experts_TC: jax.Array, *, number: int
) -> tuple[jax.Array, jax.Array]:
    """For every token of a row, of its document: the weight per token, and choices of each expert per token.

    segments 1 1 2 0, weights 0 1 3 0    weights per token  .5 .5 3 0
    """
    S = len(segments_T) + 1  # as many numbers as segments of a row can have
    is_real_T = segments_T > 0
    tokens_S = jnp.zeros(S).at[segments_T].add(1.0)
    weight_S = jnp.zeros(S).at[segments_T].add(weights_T.astype(jnp.float32))
    choices_SE = jnp.zeros((S, number)).at[segments_T[:, None], experts_TC].add(1.0, mode="drop")
    weights_T = jnp.where(is_real_T, (weight_S / jnp.maximum(tokens_S, 1))[segments_T], 0)
    return weights_T, choices_SE[segments_T] / tokens_S[segments_T][:, None]


def _check_blocks(leaves: dict[str, Any], names: dict[str, Any]) -> None:
    if uneven := uneven_blocks(leaves, names):
        ways, blocks = uneven
        raise ValueError(
            f"parallel.{ways[-1]}: {layout.scope()[ways[-1]]} devices do not divide the {blocks} blocks of an expert's "
            "nf4 kernel; take lora.base=int8, or fewer devices"
        )
