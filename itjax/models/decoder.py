"""The decoder: tokens to features, through one scan over layers that all have the same parameters.

What families differ in are switches of `ModelConfig`, each used once here or in the part that it is about. B rows, T
positions, D width, N query heads, K key/value heads, H head size, F feed-forward, V vocabulary, L layers, S slots of a cache.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from itjax.kernels import attention
from itjax.models import attending, remat
from itjax.models.activations import gated
from itjax.models.config import Layer, ModelConfig
from itjax.models.layers import Draws, Norm, Options, Projection, draw
from itjax.models.moe import Facts, Mixture
from itjax.models.remat import named
from itjax.models.rope import Turns, angles, turn
from itjax.parallel import exchange, stripes
from itjax.parallel.layout import pin

Keys = Iterator[jax.Array]
Aux = dict[str, jax.Array]
Attend = Callable[..., jax.Array]  # (q_BTNH, k_BTKH, v_BTKH, sinks_N) -> o_BTNH

RESIDUAL = ("batch", "length", "embed")


class Cache(NamedTuple):
    """Keys and values of the slots filled so far. Row b begins at slot `start_B[b]`; what lies before is padding."""

    k_LBKSH: jax.Array
    v_LBKSH: jax.Array
    filled: jax.Array  # () int32
    start_B: jax.Array  # int32


class Sight(NamedTuple):
    """What a layer knows of the positions: how they turn, and what they see."""

    turns: Turns | None
    attend: Attend


class Attention(nnx.Module):
    def __init__(self, config: ModelConfig, keys: Keys, options: Options) -> None:
        D, N, K, H = config.dim, config.heads, config.kv_heads, config.head_size
        queries, others, bias = ("embed", "heads", "head_size"), ("embed", "kv_heads", "head_size"), config.qkv_bias

        def reads(name: str, shape: tuple[int, ...], axes: tuple[str, ...]) -> Projection:
            return Projection(
                shape, axes, contract=1, gain=1.0, key=next(keys), bias=bias, place=f"layers/attn/{name}", options=options
            )  # fmt: skip

        self.q, self.k, self.v = (
            reads("q", (D, N, H), queries),
            reads("k", (D, K, H), others),
            reads("v", (D, K, H), others),
        )
        self.o = Projection(
            (N, H, D), ("heads", "head_size", "embed"), contract=2, gain=_gain(config), key=next(keys),
            bias=config.out_bias, place="layers/attn/o", options=options,
        )  # fmt: skip
        self.q_norm, self.k_norm = _head_norm(config, N, "heads"), _head_norm(config, K, "kv_heads")
        self.sinks = nnx.Param(jnp.zeros((N,)), axes=("heads",)) if config.sinks else None

    def __call__(self, x_BTD: jax.Array, sight: Sight, draws: Draws) -> jax.Array:
        q_BTNH, k_BTKH, v_BTKH = self.q(x_BTD, draws), self.k(x_BTD, draws), self.v(x_BTD, draws)
        if self.q_norm is not None and self.k_norm is not None:
            q_BTNH, k_BTKH = self.q_norm(q_BTNH), self.k_norm(k_BTKH)
        if sight.turns is not None:
            q_BTNH, k_BTKH = turn(q_BTNH, sight.turns), turn(k_BTKH, sight.turns)
        o_BTNH = sight.attend(
            named(pin(q_BTNH, "batch", "length", "heads", "head_size"), remat.HEADS),
            named(pin(k_BTKH, "batch", "length", "kv_heads", "head_size"), remat.HEADS),
            named(pin(v_BTKH, "batch", "length", "kv_heads", "head_size"), remat.HEADS),
            None if self.sinks is None else self.sinks[...],
        )
        return self.o(pin(o_BTNH, "batch", "length", "heads", "head_size"), draws)


class Mlp(nnx.Module):
    """One product gates the other."""

    def __init__(self, config: ModelConfig, keys: Keys, options: Options) -> None:
        D, F, self.activation = config.dim, config.ffn, config.activation

        def part(name: str, shape: tuple[int, ...], axes: tuple[str, ...], gain: float) -> Projection:
            return Projection(
                shape, axes, contract=1, gain=gain, key=next(keys), bias=config.mlp_bias, place=f"layers/mlp/{name}",
                options=options,
            )  # fmt: skip

        self.gate = part("gate", (D, F), ("embed", "ffn"), 1.0)
        self.up = part("up", (D, F), ("embed", "ffn"), 1.0)
        self.down = part("down", (F, D), ("ffn", "embed"), _gain(config))

    def __call__(self, x_BTD: jax.Array, draws: Draws, facts: Facts | None) -> tuple[jax.Array, Aux]:
        gate_BTF = named(pin(self.gate(x_BTD, draws), "batch", "length", "ffn"), remat.HIDDEN)
        up_BTF = named(pin(self.up(x_BTD, draws), "batch", "length", "ffn"), remat.HIDDEN)
        return self.down(gated(gate_BTF, up_BTF, self.activation), draws), {}


class Block(nnx.Module):
    def __init__(self, config: ModelConfig, key: jax.Array, options: Options) -> None:
        keys = iter(jax.random.split(key, 8))
        before, after = config.norms != "post", config.norms != "pre"
        self.attn_norm = _norm(config) if before else None
        self.attn = Attention(config, keys, options)
        self.attn_post_norm = _norm(config) if after else None
        self.mlp_norm = _norm(config) if before else None
        self.mlp = Mlp(config, keys, options) if config.experts is None else Mixture(config, keys, options)
        self.mlp_post_norm = _norm(config) if after else None

    def __call__(self, x_BTD: jax.Array, sight: Sight, draws: Draws, facts: Facts | None) -> tuple[jax.Array, Aux]:
        x_BTD = named(x_BTD, remat.INPUT)
        y_BTD = self.attn(_normed(self.attn_norm, x_BTD), sight, draws)
        x_BTD = named(pin(x_BTD + _normed(self.attn_post_norm, y_BTD), *RESIDUAL), remat.BETWEEN)
        y_BTD, aux = self.mlp(_normed(self.mlp_norm, x_BTD), draws, facts)
        return pin(x_BTD + _normed(self.mlp_post_norm, y_BTD), *RESIDUAL), aux


class Table(nnx.Module):
    """One vector per token id: the embedding, and the head."""

    def __init__(self, config: ModelConfig, key: jax.Array) -> None:
        shape = (config.vocab, config.dim)
        self.kernel = nnx.Param(draw(key, shape, fan_in=config.dim), axes=("vocab", "embed"))


class Decoder(nnx.Module):
    def __init__(
        self,
        config: ModelConfig,
        *,
        dtype: str,
        attention: str,
        platform: str,
        remat: str,
        unroll: int,
        options: Options,
        key: jax.Array,
    ) -> None:
        self.config, self.dtype, self.remat, self.unroll = config, dtype, remat, unroll
        self.attention, self.platform = attention, platform
        keys = jax.random.split(key, 2 + config.layers)
        self.embed = Table(config, keys[0])
        # One Block, every parameter of which leads with a dimension of layers.
        self.layers = jax.vmap(lambda key: Block(config, key, options))(keys[2:])
        self.final_norm = _norm(config)
        self.head = None if config.tie_embeddings else Table(config, keys[1])

    def features(
        self,
        tokens_BT: jax.Array,
        positions_BT: jax.Array,
        segments_BT: jax.Array,
        weights_BT: jax.Array,
        key: jax.Array | None = None,
    ) -> tuple[jax.Array, Aux]:
        """What the head reads at each position, (B, T, D), and sums by name, each with a dimension of layers.

        `key` is for what is drawn on the way (dropout of adapters); None: nothing is. Inside, positions are in the order
        of stripes, which is another one where the mesh splits rows.
        """
        of_rows = (tokens_BT, positions_BT, segments_BT, weights_BT)
        tokens_BT, positions_BT, segments_BT, weights_BT = map(stripes.striped, of_rows)
        turns = self._turns(positions_BT, length=tokens_BT.shape[1])
        facts = Facts(segments_BT, weights_BT)

        def sight(kind: Layer) -> Sight:
            scores = attending.scores_of(self.config, kind)

            def attend(q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, sinks_N: jax.Array | None) -> jax.Array:
                return attending.attend(
                    q_BTNH,
                    k_BTKH,
                    v_BTKH,
                    segments_BT,
                    sinks_N,
                    wanted=self.attention,
                    platform=self.platform,
                    scores=scores,
                )

            return Sight(turns[kind.rope], attend)

        def layer(kind: Layer, x_BTD: jax.Array, block: Block, number: jax.Array) -> tuple[jax.Array, Aux]:
            draws = Draws(None if key is None else jax.random.fold_in(key, number))
            return block(x_BTD, sight(kind), draws, facts)

        x_BTD, aux = self._through(layer, self._embed(tokens_BT), policy=self.remat)
        return stripes.natural(self.final_norm(x_BTD)), aux

    def step(self, cache: Cache, tokens_BT: jax.Array) -> tuple[jax.Array, Cache]:
        """Features of the next T tokens, (B, T, D), and the cache that holds them too."""
        (B, T), S = tokens_BT.shape, cache.k_LBKSH.shape[3]
        slots_BT = jnp.broadcast_to(cache.filled + jnp.arange(T)[None], (B, T))
        turns = self._turns(jnp.maximum(slots_BT - cache.start_B[:, None], 0), length=S)
        slots_11S = jnp.arange(S)[None, None]
        sees_BTS = (slots_11S <= slots_BT[..., None]) & (slots_11S >= cache.start_B[:, None, None])

        def layer(kind: Layer, carry: Any, block: Block, number: jax.Array) -> tuple[Any, Aux]:
            x_BTD, k_LBKSH, v_LBKSH = carry  # carried and not stacked: written in place, T slots at a time
            near_BTS = slots_11S > slots_BT[..., None] - (kind.window or S)

            def attend(q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, sinks_N: jax.Array | None) -> jax.Array:
                nonlocal k_LBKSH, v_LBKSH
                k_LBKSH, k_BKSH = _write(k_LBKSH, k_BTKH, number, cache.filled)
                v_LBKSH, v_BKSH = _write(v_LBKSH, v_BTKH, number, cache.filled)
                return attention.read(
                    q_BTNH,
                    k_BKSH,
                    v_BKSH,
                    sees_BTS & near_BTS,
                    scores=attending.scores_of(self.config, kind),
                    sinks_N=sinks_N,
                )

            x_BTD, _ = block(x_BTD, Sight(turns[kind.rope], attend), Draws(), None)
            return (x_BTD, k_LBKSH, v_LBKSH), {}

        start = (self._embed(tokens_BT), cache.k_LBKSH, cache.v_LBKSH)
        (x_BTD, k_LBKSH, v_LBKSH), _ = self._through(layer, start, policy="none")
        return self.final_norm(x_BTD), Cache(k_LBKSH, v_LBKSH, cache.filled + T, cache.start_B)

    def unembed(self, x_D: jax.Array) -> jax.Array:
        """float32 logits of any number of features."""
        logits_V = jnp.einsum(
            "...D,VD->...V", x_D, self.head_VD().astype(x_D.dtype), preferred_element_type=jnp.float32
        )  # fmt: skip
        cap = self.config.logit_softcap
        return cap * jnp.tanh(logits_V / cap) if cap else logits_V

    def head_VD(self) -> jax.Array:
        return (self.embed if self.head is None else self.head).kernel[...]

    def _through(self, layer: Callable[..., tuple[Any, Aux]], carry: Any, *, policy: str) -> tuple[Any, Aux]:
        """The carry behind all layers, and what each gave beside it, stacked.

        Layers differ in nothing but their `Layer`, so a scan goes from one period of the pattern to the next. Layers
        behind the last whole period (Gemma 3 has 26 in periods of 6) follow it.
        """
        period = periodic(self.config)
        whole, size = self.config.layers // len(period), len(period)
        numbers_L = jnp.arange(self.config.layers)

        def run(carry: Any, group: tuple[Block, jax.Array], kinds: Sequence[Layer], prevent_cse: bool) -> Any:
            gave = []
            for place, kind in enumerate(kinds):
                block, number = jax.tree.map(lambda x, place=place: x[place], group)

                def one(carry: Any, block: Block, number: jax.Array, kind: Layer = kind) -> tuple[Any, Aux]:
                    return layer(kind, carry, block, number)

                carry, aux = remat.layer(one, policy, prevent_cse=prevent_cse)(carry, block, number)
                gave.append(aux)
            return carry, jax.tree.map(lambda *leaves: jnp.stack(leaves), *gave)

        stacked = (self.layers, numbers_L)
        groups = stacked
        if whole * size != self.config.layers:
            groups = jax.tree.map(lambda x: x[: whole * size], groups)
        groups = jax.tree.map(lambda x: x.reshape(whole, size, *x.shape[1:]), groups)
        # A scan does not merge a recomputation with the original, so the guard against that is not needed inside.
        carry, aux = jax.lax.scan(
            lambda carry, group: run(carry, group, period, False), carry, groups, unroll=max(1, self.unroll // size)
        )
        aux = jax.tree.map(lambda x: x.reshape(whole * size, *x.shape[2:]), aux)
        if rest := self.config.layers - whole * size:
            last = jax.tree.map(lambda x: x[whole * size :], stacked)
            carry, more = run(carry, last, period[:rest], True)
            aux = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), aux, more)
        return carry, aux

    def _embed(self, tokens_BT: jax.Array) -> jax.Array:
        x_BTD = exchange.look_up(self.embed.kernel[...], tokens_BT, dtype=self.dtype)
        return pin(x_BTD * self.config.embed_scale, *RESIDUAL)

    def _turns(self, positions_BT: jax.Array, *, length: int) -> dict[str, Turns | None]:
        ropes = {"global": self.config.rope, "local": self.config.local_rope}
        used = {kind.rope for kind in self.config.pattern} - {"none"}
        turns: dict[str, Turns | None] = {"none": None}
        for name in sorted(used):
            rope = ropes[name]
            assert rope is not None, f"a layer says {name!r} and the config has no such rope"
            turns[name] = angles(positions_BT, rope, head_size=self.config.head_size, length=length)
        return turns


def periodic(config: ModelConfig) -> tuple[Layer, ...]:
    """The shortest pattern that says the same of every layer."""
    kinds = [config.pattern[number % len(config.pattern)] for number in range(config.layers)]
    return next(
        tuple(kinds[:size])
        for size in range(1, config.layers + 1)
        if all(kind == kinds[number % size] for number, kind in enumerate(kinds))
    )


def empty_cache(config: ModelConfig, *, dtype: str, rows: int, length: int) -> Cache:
    """A cache of `length` slots with nothing in it."""
    shape = (config.layers, rows, config.kv_heads, length, config.head_size)
    k_LBKSH, v_LBKSH = (
        pin(jnp.zeros(shape, dtype), "layers", "batch", "kv_heads", "slots", "head_size") for _ in range(2)
    )
    return Cache(k_LBKSH, v_LBKSH, jnp.zeros((), jnp.int32), jnp.zeros((rows,), jnp.int32))


def _write(
    cache_LBKSH: jax.Array, new_BTKH: jax.Array, number: jax.Array, slot: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The cache with one layer's new keys or values from `slot` on, and that layer."""
    new_1BKTH = new_BTKH.swapaxes(1, 2)[None].astype(cache_LBKSH.dtype)
    cache_LBKSH = jax.lax.dynamic_update_slice(cache_LBKSH, new_1BKTH, (number, 0, 0, slot, 0))
    return cache_LBKSH, jax.lax.dynamic_index_in_dim(cache_LBKSH, number, keepdims=False)


def _norm(config: ModelConfig) -> Norm:
    return Norm((config.dim,), ("norm",), eps=config.norm_eps, offset=config.norm_offset)


def _head_norm(config: ModelConfig, heads: int, axis: str) -> Norm | None:
    """Of queries or keys: of each head by itself with one scale for all, of all heads together, or none."""
    shapes = {"head": ((config.head_size,), ("head_size",)), "all": ((heads, config.head_size), (axis, "head_size"))}
    if config.qk_norm == "none":
        return None
    shape, axes = shapes[config.qk_norm]
    return Norm(shape, axes, eps=config.norm_eps, offset=config.norm_offset)


def _normed(norm: Norm | None, x_BTD: jax.Array) -> jax.Array:
    return x_BTD if norm is None else norm(x_BTD)


def _gain(config: ModelConfig) -> float:
    """Two branches per layer are added to the residual stream; this keeps its size independent of depth."""
    return (2 * config.layers) ** -0.5
