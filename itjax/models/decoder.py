"""The decoder: tokens to features, through one scan over layers that all look alike.

B rows, T positions, D width, N query heads, K key/value heads, H head size, F feed-forward, V vocabulary, L layers,
S slots of a cache.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from itjax.kernels import attention
from itjax.models.families import ModelConfig
from itjax.models.layers import Norm, Projection, angles, draw, rope
from itjax.parallel.layout import pin

Turns = tuple[jax.Array, jax.Array]
Keys = Iterator[jax.Array]
Attend = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]  # (q_BTNH, k_BTKH, v_BTKH) -> o_BTNH

RESIDUAL = ("batch", "length", "embed")

POLICIES = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


class Cache(NamedTuple):
    """Keys and values of the slots filled so far. Row b begins at slot `start_B[b]`; what lies before is padding."""

    k_LBKSH: jax.Array
    v_LBKSH: jax.Array
    filled: jax.Array  # () int32
    start_B: jax.Array  # int32


class Attention(nnx.Module):
    def __init__(self, config: ModelConfig, keys: Keys) -> None:
        D, N, K, H = config.dim, config.heads, config.kv_heads, config.head_size
        self.q = Projection((D, N, H), ("embed", "heads", "head_size"), contract=1, gain=1.0, key=next(keys))
        self.k = Projection((D, K, H), ("embed", "kv_heads", "head_size"), contract=1, gain=1.0, key=next(keys))
        self.v = Projection((D, K, H), ("embed", "kv_heads", "head_size"), contract=1, gain=1.0, key=next(keys))
        self.o = Projection((N, H, D), ("heads", "head_size", "embed"), contract=2, gain=_gain(config), key=next(keys))

    def __call__(self, x_BTD: jax.Array, turns: Turns, attend: Attend) -> jax.Array:
        q_BTNH = pin(rope(self.q(x_BTD), turns), "batch", "length", "heads", "head_size")
        k_BTKH = pin(rope(self.k(x_BTD), turns), "batch", "length", "kv_heads", "head_size")
        v_BTKH = pin(self.v(x_BTD), "batch", "length", "kv_heads", "head_size")
        o_BTNH = pin(attend(q_BTNH, k_BTKH, v_BTKH), "batch", "length", "heads", "head_size")
        return self.o(o_BTNH)


class Mlp(nnx.Module):
    """SwiGLU: one product gates the other."""

    def __init__(self, config: ModelConfig, keys: Keys) -> None:
        D, F = config.dim, config.ffn
        self.gate = Projection((D, F), ("embed", "ffn"), contract=1, gain=1.0, key=next(keys))
        self.up = Projection((D, F), ("embed", "ffn"), contract=1, gain=1.0, key=next(keys))
        self.down = Projection((F, D), ("ffn", "embed"), contract=1, gain=_gain(config), key=next(keys))

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        gate_BTF = pin(self.gate(x_BTD), "batch", "length", "ffn")
        up_BTF = pin(self.up(x_BTD), "batch", "length", "ffn")
        return self.down(jax.nn.silu(gate_BTF) * up_BTF)


class Block(nnx.Module):
    def __init__(self, config: ModelConfig, key: jax.Array) -> None:
        keys = iter(jax.random.split(key, 7))
        self.attn_norm = Norm(config.dim, eps=config.norm_eps)
        self.attn = Attention(config, keys)
        self.mlp_norm = Norm(config.dim, eps=config.norm_eps)
        self.mlp = Mlp(config, keys)

    def __call__(self, x_BTD: jax.Array, turns: Turns, attend: Attend) -> jax.Array:
        x_BTD = pin(x_BTD + self.attn(self.attn_norm(x_BTD), turns, attend), *RESIDUAL)
        return pin(x_BTD + self.mlp(self.mlp_norm(x_BTD)), *RESIDUAL)


class Table(nnx.Module):
    """One vector per token id: the embedding, and the head."""

    def __init__(self, config: ModelConfig, key: jax.Array) -> None:
        shape = (config.vocab, config.dim)
        self.kernel = nnx.Param(draw(key, shape, fan_in=config.dim), axes=("vocab", "embed"))


class Decoder(nnx.Module):
    def __init__(
        self, config: ModelConfig, *, dtype: str, attention: str, remat: str, unroll: int, key: jax.Array
    ) -> None:
        self.config, self.dtype, self.attention, self.remat, self.unroll = config, dtype, attention, remat, unroll
        keys = jax.random.split(key, 2 + config.layers)
        self.embed = Table(config, keys[0])
        # One Block, every parameter of which leads with a dimension of layers.
        self.layers = jax.vmap(lambda key: Block(config, key))(keys[2:])
        self.final_norm = Norm(config.dim, eps=config.norm_eps)
        if not config.tie_embeddings:
            self.head = Table(config, keys[1])

    def features(self, tokens_BT: jax.Array, positions_BT: jax.Array, segments_BT: jax.Array) -> jax.Array:
        """What the head reads at each position, (B, T, D)."""
        turns = self._turns(positions_BT)

        def attend(q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array) -> jax.Array:
            return attention.attend(q_BTNH, k_BTKH, v_BTKH, segments_BT, implementation=self.attention)

        def layer(x_BTD: jax.Array, block: Block) -> tuple[jax.Array, None]:
            return block(x_BTD, turns, attend), None

        if self.remat != "none":
            # A scan does not merge a recomputation with the original, so the guard against that is not needed.
            layer = jax.checkpoint(layer, policy=POLICIES[self.remat], prevent_cse=False)
        x_BTD, _ = jax.lax.scan(layer, self._embed(tokens_BT), self.layers, unroll=self.unroll)
        return self.final_norm(x_BTD)

    def step(self, cache: Cache, tokens_BT: jax.Array) -> tuple[jax.Array, Cache]:
        """Features of the next T tokens, (B, T, D), and the cache that holds them too."""
        (B, T), S = tokens_BT.shape, cache.k_LBKSH.shape[3]
        slots_BT = jnp.broadcast_to(cache.filled + jnp.arange(T)[None], (B, T))
        turns = self._turns(jnp.maximum(slots_BT - cache.start_B[:, None], 0))
        slots_11S = jnp.arange(S)[None, None]
        sees_BTS = (slots_11S <= slots_BT[..., None]) & (slots_11S >= cache.start_B[:, None, None])

        def layer(carry, numbered):
            x_BTD, k_LBKSH, v_LBKSH = carry  # carried and not stacked: written in place, T slots at a time
            number, block = numbered

            def attend(q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array) -> jax.Array:
                nonlocal k_LBKSH, v_LBKSH
                k_LBKSH, k_BKSH = _write(k_LBKSH, k_BTKH, number, cache.filled)
                v_LBKSH, v_BKSH = _write(v_LBKSH, v_BTKH, number, cache.filled)
                return attention.read(q_BTNH, k_BKSH, v_BKSH, sees_BTS)

            x_BTD = block(x_BTD, turns, attend)
            return (x_BTD, k_LBKSH, v_LBKSH), None

        start = (self._embed(tokens_BT), cache.k_LBKSH, cache.v_LBKSH)
        numbers_L = jnp.arange(self.config.layers)
        (x_BTD, k_LBKSH, v_LBKSH), _ = jax.lax.scan(layer, start, (numbers_L, self.layers), unroll=self.unroll)
        return self.final_norm(x_BTD), Cache(k_LBKSH, v_LBKSH, cache.filled + T, cache.start_B)

    def unembed(self, x_D: jax.Array) -> jax.Array:
        """float32 logits of any number of features."""
        return jnp.einsum(
            "...D,VD->...V", x_D, self.head_VD().astype(x_D.dtype), preferred_element_type=jnp.float32
        )  # fmt: skip

    def head_VD(self) -> jax.Array:
        return (self.embed if self.config.tie_embeddings else self.head).kernel[...]

    def _embed(self, tokens_BT: jax.Array) -> jax.Array:
        table_VD = pin(self.embed.kernel[...].astype(self.dtype), "vocab", None)  # whole over D, as rows are read
        return pin(jnp.take(table_VD, tokens_BT, axis=0) * self.config.embed_scale, *RESIDUAL)

    def _turns(self, positions_BT: jax.Array) -> Turns:
        return angles(positions_BT, head_size=self.config.head_size, theta=self.config.rope_theta)


def empty_cache(config: ModelConfig, *, dtype: str, rows: int, length: int) -> Cache:
    """A cache of `length` slots with nothing in it."""
    shape = (config.layers, rows, config.kv_heads, length, config.head_size)
    k_LBKSH, v_LBKSH = (
        pin(jnp.zeros(shape, dtype), "layers", "batch", "kv_heads", "length", "head_size") for _ in range(2)
    )
    return Cache(k_LBKSH, v_LBKSH, jnp.zeros((), jnp.int32), jnp.zeros((rows,), jnp.int32))


def _write(
    cache_LBKSH: jax.Array, new_BTKH: jax.Array, number: jax.Array, slot: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The cache with one layer's new keys or values from `slot` on, and that layer."""
    new_1BKTH = new_BTKH.swapaxes(1, 2)[None].astype(cache_LBKSH.dtype)
    cache_LBKSH = jax.lax.dynamic_update_slice(cache_LBKSH, new_1BKTH, (number, 0, 0, slot, 0))
    return cache_LBKSH, jax.lax.dynamic_index_in_dim(cache_LBKSH, number, keepdims=False)


def _gain(config: ModelConfig) -> float:
    """Two branches per layer are added to the residual stream; this keeps its size independent of depth."""
    return (2 * config.layers) ** -0.5
