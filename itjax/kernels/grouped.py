"""One product for many groups of rows, each with a matrix of its own: what experts compute.

M rows sorted by group, E groups, I inputs, O outputs. The first sizes_E[0] rows meet kernel_EIO[0], the next sizes_E[1]
rows kernel_EIO[1], and so on. Rows after the last group are zeros and cost nothing.

    rows     a a a b b . d d -        sizes  3 2 0 2, and one row of padding
    kernels  A A A B B   D D

TPUs have an instruction for it. Elsewhere XLA multiplies every row with every matrix and masks (16 times the products
for 32 groups of 64 rows on CPUs, with jax 0.10 and 0.12), so there a loop walks over blocks of rows of one group.
"""

import jax
import jax.numpy as jnp

FEWEST, MOST = 8, 256  # rows in a block: about one group's share, between these


def reference(x_MI: jax.Array, kernel_EIO: jax.Array, sizes_E: jax.Array) -> jax.Array:
    """The same by masks, one group after the other."""
    ends_E = jnp.cumsum(sizes_E)
    rows_M1 = jnp.arange(x_MI.shape[0])[:, None]
    y_MO = jnp.zeros((x_MI.shape[0], kernel_EIO.shape[2]), x_MI.dtype)
    for group, kernel_IO in enumerate(kernel_EIO):
        is_here_M1 = (rows_M1 >= ends_E[group] - sizes_E[group]) & (rows_M1 < ends_E[group])
        y_MO += jnp.where(is_here_M1, x_MI @ kernel_IO, 0)
    return y_MO


@jax.custom_vjp
def product(x_MI: jax.Array, kernel_EIO: jax.Array, sizes_E: jax.Array) -> jax.Array:
    """Every row times the matrix of its group, (M, O) in the type of x. Inside of `shard_map` all arguments vary alike."""
    return jax.lax.platform_dependent(x_MI, kernel_EIO, sizes_E, tpu=_instruction, default=_blocks)


def _forward(x_MI: jax.Array, kernel_EIO: jax.Array, sizes_E: jax.Array) -> tuple[jax.Array, tuple]:
    return product(x_MI, kernel_EIO, sizes_E), (x_MI, kernel_EIO, sizes_E)


def _backward(kept: tuple, dy_MO: jax.Array) -> tuple[jax.Array, jax.Array, None]:
    x_MI, kernel_EIO, sizes_E = kept
    dkernel_EIO = jax.lax.platform_dependent(
        x_MI, dy_MO, sizes_E, tpu=_instruction_outer, default=_blocks_outer
    )  # fmt: skip
    return product(dy_MO, kernel_EIO.swapaxes(1, 2), sizes_E), dkernel_EIO.astype(kernel_EIO.dtype), None


product.defvjp(_forward, _backward)


# --- the instruction --------------------------------------------------------------------------------------------------


def _instruction(x_MI: jax.Array, kernel_EIO: jax.Array, sizes_E: jax.Array) -> jax.Array:
    return _only_groups(jax.lax.ragged_dot(x_MI, kernel_EIO, sizes_E), sizes_E)


def _instruction_outer(x_MI: jax.Array, dy_MO: jax.Array, sizes_E: jax.Array) -> jax.Array:
    numbers = jax.lax.RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), [0], [])
    return jax.lax.ragged_dot_general(
        x_MI, dy_MO, sizes_E, numbers, preferred_element_type=jnp.float32
    )  # fmt: skip


# --- blocks -----------------------------------------------------------------------------------------------------------


def _blocks(x_MI: jax.Array, kernel_EIO: jax.Array, sizes_E: jax.Array) -> jax.Array:
    """A block may run into the next groups. They come later and write over what it put there."""
    M, (E, _, outputs) = len(x_MI), kernel_EIO.shape
    block = _block_size(M, E)
    x_MI = jnp.pad(x_MI, ((0, block), (0, 0)))  # the last block may run out of the rows
    group_G, start_G, blocks = _plan(sizes_E, block, limit=M // block + E)

    def write(number: jax.Array, y_MO: jax.Array) -> jax.Array:
        x_bI = jax.lax.dynamic_slice_in_dim(x_MI, start_G[number], block)
        kernel_IO = jax.lax.dynamic_index_in_dim(kernel_EIO, group_G[number], keepdims=False)
        return jax.lax.dynamic_update_slice_in_dim(y_MO, x_bI @ kernel_IO, start_G[number], axis=0)

    y_MO = jax.lax.fori_loop(0, blocks, write, _zeros((M + block, outputs), x_MI.dtype, like=x_MI))
    return _only_groups(y_MO[:M], sizes_E)


def _blocks_outer(x_MI: jax.Array, dy_MO: jax.Array, sizes_E: jax.Array) -> jax.Array:
    """Σ over the rows of each group of x ⊗ dy, (E, I, O) float32."""
    M, E = len(x_MI), len(sizes_E)
    block = _block_size(M, E)
    x_MI, dy_MO = (jnp.pad(array, ((0, block), (0, 0))) for array in (x_MI, dy_MO))
    group_G, start_G, blocks = _plan(sizes_E, block, limit=M // block + E)
    ends_E = jnp.cumsum(sizes_E)

    def add(number: jax.Array, total_EIO: jax.Array) -> jax.Array:
        group, start = group_G[number], start_G[number]
        x_bI = jax.lax.dynamic_slice_in_dim(x_MI, start, block)
        dy_bO = jax.lax.dynamic_slice_in_dim(dy_MO, start, block)
        is_here_b1 = (start + jnp.arange(block) < ends_E[group])[:, None]
        sum_IO = jnp.einsum("bI,bO->IO", x_bI, jnp.where(is_here_b1, dy_bO, 0), preferred_element_type=jnp.float32)
        return total_EIO.at[group].add(sum_IO)

    return jax.lax.fori_loop(0, blocks, add, _zeros((E, x_MI.shape[1], dy_MO.shape[1]), jnp.float32, like=x_MI))


def _block_size(rows: int, groups: int) -> int:
    """About the rows of one group, a power of two."""
    share = max(1, rows // groups)
    return min(MOST, max(FEWEST, 1 << (share - 1).bit_length()))


def _plan(sizes_E: jax.Array, block: int, *, limit: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The group and the first row of every block, in order, and how many blocks there are.

    sizes 5 0 2 and blocks of 4    groups  0 0 2     starts  0 4 5     3 blocks
    """
    blocks_E = -(-sizes_E // block)
    last_E = jnp.cumsum(blocks_E)
    number_G = jnp.arange(limit)
    group_G = (number_G[:, None] >= last_E[None]).sum(axis=1).clip(max=len(sizes_E) - 1)
    first_E, start_E = last_E - blocks_E, jnp.cumsum(sizes_E) - sizes_E
    return group_G, start_E[group_G] + (number_G - first_E[group_G]) * block, last_E[-1]


# --- both -------------------------------------------------------------------------------------------------------------


def _only_groups(y_MO: jax.Array, sizes_E: jax.Array) -> jax.Array:
    """Zeros in the rows after the last group."""
    return jnp.where((jnp.arange(y_MO.shape[0]) < sizes_E.sum())[:, None], y_MO, 0)


def _zeros(shape: tuple[int, ...], dtype: jnp.dtype, *, like: jax.Array) -> jax.Array:
    """Zeros that vary over the same mesh axes as another array, which loops inside of `shard_map` insist on."""
    axes = tuple(jax.typeof(like).manual_axis_type.varying)
    zeros = jnp.zeros(shape, dtype)
    return jax.lax.pcast(zeros, axes, to="varying") if axes else zeros
