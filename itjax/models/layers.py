"""The parts of a decoder layer: projection and norm, each parameter with its logical axes beside it.

B rows, T positions, D width, N heads, H head size.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from itjax.base.schema import Lora
from itjax.models import lora, quantize, remat
from itjax.models.leaves import KEEP, names_of, names_of_kernel, shapes_of, travelling, uneven_blocks
from itjax.parallel import exchange, layout

TOKENS = ("batch", "length")  # the dimensions of what a linear layer reads, before those of the kernel


@dataclass(frozen=True)
class Options:
    """How linear layers keep their kernels, what is added to them, and how much experts take."""

    lora: Lora = field(default_factory=Lora)  # rank 0: nothing is added
    base: str = "float32"  # "float32", "bfloat16", "int8" or "nf4"
    capacity_factor: float | None = None  # what an expert takes at most, see `moe.Mixture`; None: all that comes


class Draws:
    """Keys for one pass through a layer, each given once; None where nothing is to be drawn."""

    def __init__(self, key: jax.Array | None = None) -> None:
        self._key, self._given = key, 0

    def next(self) -> jax.Array | None:
        self._given += 1
        return None if self._key is None else jax.random.fold_in(self._key, self._given)


class Quantized(nnx.Module):
    """A kernel in few bits: two leaves where a plain one is one. Both shard as the kernel would."""

    def __init__(
        self, kernel: jax.Array, axes: tuple[str, ...], *, kind: str, contract: int, lead: int = 0
    ) -> None:  # fmt: skip
        leaves = quantize.quantize(kernel, kind, contract=contract, lead=lead)
        self.codes = nnx.Param(leaves["codes"], axes=axes)
        self.scales = nnx.Param(leaves["scales"], axes=axes)

    def leaves(self) -> dict[str, jax.Array]:
        return {"codes": self.codes[...], "scales": self.scales[...]}


class Projection(nnx.Module):
    """y = x · kernel + bias. The kernel's first `contract` dimensions meet the last ones of x; both may have several.

    `place` is where it stands in the tree of parameters ("layers/attn/q"): patterns of adapters are about that. With an
    adapter y = x · kernel + scale · (x · A) · B + bias; with DoRA the first two are made as long as `lora_m` says. A · B is
    never added to the kernel here: that would be a second kernel, and for all layers at once where it is done before them.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        axes: tuple[str, ...],
        *,
        contract: int,
        gain: float,
        key: jax.Array,
        place: str,
        options: Options,
        bias: bool = False,
    ) -> None:
        self.contract, self.lora = contract, options.lora
        inputs, outputs = shape[:contract], shape[contract:]
        drawn = draw(key, shape, fan_in=math.prod(inputs)) * gain
        self.kernel = kept(drawn, axes, kind=lora.stored(options.lora, options.base, place), contract=contract)
        self.bias = nnx.Param(jnp.zeros(outputs), axes=axes[contract:]) if bias else None
        rank, adapted = ("rank",), lora.adapts(options.lora, place)
        a_shape, b_shape = (*inputs, options.lora.rank), (options.lora.rank, *outputs)
        a = draw_a(jax.random.fold_in(key, 1), a_shape, fan_in=math.prod(inputs)) if adapted else None
        self.lora_a = nnx.Param(a, axes=axes[:contract] + rank) if adapted else None
        self.lora_b = nnx.Param(jnp.zeros(b_shape), axes=rank + axes[contract:]) if adapted else None
        # `lora.begin` measures the columns, when the kernels have come.
        lengthened = adapted and options.lora.dora
        self.lora_m = nnx.Param(jnp.ones(outputs), axes=axes[contract:]) if lengthened else None

    def __call__(self, x: jax.Array, draws: Draws) -> jax.Array:
        dropped = None if self.lora_a is None else drop(x, self.lora.dropout, draws)
        state = nnx.state(self)
        leaves, names = nnx.to_pure_dict(state), names_of(state)
        bias = leaves.pop("bias", None)
        names.pop("bias", None)
        if self._is_shared(x, leaves, names):
            y = self._on_mesh(x, dropped, leaves, names)
        else:
            y = self._product(x, dropped, leaves)
        return y if bias is None else y + bias.astype(y.dtype).reshape((1,) * (y.ndim - bias.ndim) + bias.shape)

    def _is_shared(self, x: jax.Array, leaves: dict[str, Any], names: dict[str, Any]) -> bool:
        """Whether devices that share a kernel have tokens of their own, for which each needs it whole.

        DoRA needs the length of whole columns, which are split where devices have parts of the inputs.
        """
        if math.prod(layout.scope().values()) == 1 or "lora_m" in leaves or x.ndim - self.contract != len(TOKENS):
            return False
        by_tokens = {axis for axes in layout.split(TOKENS, x.shape[:2]) for axis in axes}
        gathered = exchange.gathered_axes(names, shapes_of(leaves), keep=KEEP)
        return gathered <= by_tokens and uneven_blocks(leaves, names) is None

    def _on_mesh(
        self, x: jax.Array, dropped: jax.Array | None, leaves: dict[str, Any], names: dict[str, Any]
    ) -> jax.Array:
        """The product where the kernel is gathered for it, and its gradient reduce-scattered, by instructions of our own.

        The whole kernel is not kept for the backward pass but gathered again.
        """
        of_kernel = [name if name in KEEP else None for name in names_of_kernel(names)]
        of_x, of_y = (
            PartitionSpec(*TOKENS, *of_kernel[: self.contract]),
            PartitionSpec(*TOKENS, *of_kernel[self.contract :]),
        )
        shapes, dtypes = shapes_of(leaves), travelling(leaves, x.dtype)
        parted = tuple(axis for axes in layout.split(tuple(of_x), x.shape)[len(TOKENS) :] for axis in axes)

        @remat.not_kept
        def product(x: jax.Array, dropped: jax.Array | None, leaves: dict[str, Any]) -> jax.Array:
            whole = exchange.gather(leaves, names, shapes, keep=KEEP, dtypes=dtypes)
            return self._product(x, dropped, jax.tree.map(lambda leaf: remat.named(leaf, remat.WHOLE), whole))

        def on_device(x: jax.Array, dropped: jax.Array | None, leaves: dict[str, Any]) -> jax.Array:
            y = product(x, dropped, leaves)
            return jax.lax.psum(y, parted) if parted else y

        return layout.per_device(
            on_device, x, dropped, leaves, names=(of_x, None if dropped is None else of_x, names), everywhere=False,
            out=(of_y, (*x.shape[: len(TOKENS)], *self._outputs(leaves))),
        )  # fmt: skip

    def _product(self, x: jax.Array, dropped: jax.Array | None, leaves: dict[str, Any]) -> jax.Array:
        """All but the bias. `dropped` is what adapters read."""
        rows = x.shape[: x.ndim - self.contract]
        # One product of two matrices: XLA runs it twice as fast on CPUs as the same sums with three or four dimensions.
        x_RI = x.reshape(math.prod(rows), -1)
        y_RO = self._base(x_RI, leaves["kernel"])
        if dropped is not None:
            y_RO = self._adapted(y_RO, dropped.reshape(x_RI.shape), leaves)
        return y_RO.reshape(*rows, *self._outputs(leaves))

    def _base(self, x_RI: jax.Array, kernel: Any) -> jax.Array:
        if isinstance(kernel, dict):
            return quantize.matmul(x_RI, kernel, self.contract)
        return x_RI @ kernel.astype(x_RI.dtype).reshape(x_RI.shape[1], -1)

    def _adapted(self, y_RO: jax.Array, x_RI: jax.Array, leaves: dict[str, Any]) -> jax.Array:
        """y + scale · (x · A) · B, and the columns of that as long as DoRA says."""
        a, b = leaves["lora_a"], leaves["lora_b"]
        a_Ir = a.astype(x_RI.dtype).reshape(x_RI.shape[1], -1)
        b_rO = b.astype(x_RI.dtype).reshape(a_Ir.shape[1], -1)
        y_RO += (x_RI @ a_Ir) @ b_rO * lora.scale(self.lora)
        if "lora_m" not in leaves:
            return y_RO
        # Their length so far counts as a constant: section 4.3 of the DoRA paper, https://arxiv.org/abs/2402.09353
        whole = jax.lax.stop_gradient(lora.whole(leaves["kernel"], a, b, scale=lora.scale(self.lora)))
        ratio_1O = (leaves["lora_m"] / lora.lengths(whole, self.contract)).reshape(1, -1)
        return (y_RO * ratio_1O).astype(x_RI.dtype)

    def _outputs(self, leaves: dict[str, Any]) -> tuple[int, ...]:
        """The dimensions of the kernel that are left of it: of the whole one, or of what this device has."""
        kernel = leaves["kernel"]
        return (kernel["codes"] if isinstance(kernel, dict) else kernel).shape[self.contract :]


class Norm(nnx.Module):
    """x over the root mean square of its last dimensions, times (offset + scale): as many dimensions as the scale has."""

    def __init__(self, shape: Sequence[int], axes: tuple[str, ...], *, eps: float, offset: float) -> None:
        self.eps, self.offset = eps, offset
        self.scale = nnx.Param(jnp.full(shape, 1.0 - offset), axes=axes)

    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.scale[...]
        normed = tuple(range(x.ndim - scale.ndim, x.ndim))
        wide = x.astype(jnp.float32)  # squares overflow what bfloat16 resolves
        wide *= jax.lax.rsqrt(jnp.square(wide).mean(axis=normed, keepdims=True) + self.eps)
        scale = (self.offset + scale.astype(jnp.float32)).reshape((1,) * (x.ndim - scale.ndim) + scale.shape)
        return (wide * scale).astype(x.dtype)


def draw(key: jax.Array, shape: tuple[int, ...], *, fan_in: int) -> jax.Array:
    """Normal numbers that keep the size of what they are multiplied with."""
    return jax.random.normal(key, shape) * fan_in**-0.5


def draw_a(key: jax.Array, shape: tuple[int, ...], *, fan_in: int) -> jax.Array:
    """An adapter's A: uniform within 1/sqrt(inputs), as PEFT draws it."""
    return jax.random.uniform(key, shape, minval=-(fan_in**-0.5), maxval=fan_in**-0.5)


def drop(x: jax.Array, rate: float, draws: Draws) -> jax.Array:
    """x with a share of its numbers at zero and the others larger for it; as it is where nothing is drawn."""
    key = draws.next() if rate else None
    if key is None:
        return x
    return jnp.where(jax.random.bernoulli(key, 1 - rate, x.shape), x / (1 - rate), 0)


def kept(kernel: jax.Array, axes: tuple[str, ...], *, kind: str, contract: int, lead: int = 0) -> nnx.Param | Quantized:
    """A kernel as the base is kept: a float leaf, or the leaves of a quantised one."""
    if kind in quantize.KINDS:
        return Quantized(kernel, axes, kind=kind, contract=contract, lead=lead)
    return nnx.Param(kernel.astype(kind), axes=axes)
