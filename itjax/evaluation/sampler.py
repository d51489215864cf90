"""Greedy answers: a batch of prompts in, the most likely continuation of each out.

B rows, P positions of the prompts, M positions of the answers.
"""

from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from itjax.models.model import Model, Params
from itjax.parallel.layout import pin

SHORTEST = 32  # prompts are padded to this length or a power of two times it, so that few programs are compiled

Generate = Callable[[Params, Sequence[Sequence[int]], int], list[list[int]]]  # (params, prompts, rows)


def make_sampler(model: Model, *, stop_ids: Sequence[int], max_tokens: int, pad_id: int, vocab: int) -> Generate:
    """A function from prompts to answers, `rows` at a time. Ids from `vocab` on are never given.

    An answer ends before its stop id; one of `max_tokens` ids met none. The rows are split over the mesh in scope.
    """
    if not stop_ids:
        raise ValueError("sampler: no stop ids, so no answer would ever end; give at least the end-of-sequence id")

    @jax.jit
    def answer(params: Params, tokens_BP: jax.Array, start_B: jax.Array) -> jax.Array:
        return _answer(model, params, tokens_BP, start_B, stop_ids=stop_ids, max_tokens=max_tokens, vocab=vocab)

    def generate(params: Params, prompts: Sequence[Sequence[int]], rows: int) -> list[list[int]]:
        _check(prompts, vocab)
        answers: list[list[int]] = [[] for _ in prompts]
        for numbers in _groups([len(prompt) for prompt in prompts], rows):
            tokens_BP, start_B = left_padded([prompts[number] for number in numbers], rows=rows, pad_id=pad_id)
            out_BM = np.asarray(answer(params, tokens_BP, start_B))
            for number, out_M in zip(numbers, out_BM, strict=False):  # rows beyond the prompts are filling
                answers[number] = _until_stop(out_M, stop_ids)
        return answers

    return generate


def left_padded(prompts: Sequence[Sequence[int]], *, rows: int, pad_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Prompts that end together, and where each begins; rows beyond the prompts are padding only.

    prompts [[5, 6, 7], [8]], 3 rows    tokens_BP  0 5 6 7     start_B  1
                                                   0 0 0 8              3
                                                   0 0 0 0              4
    """
    width = _bucket(max(len(prompt) for prompt in prompts))
    tokens_BP = np.full((rows, width), pad_id, np.int32)
    start_B = np.full((rows,), width, np.int32)
    for row, prompt in enumerate(prompts):
        start_B[row] = width - len(prompt)
        tokens_BP[row, start_B[row] :] = prompt
    return tokens_BP, start_B


def _answer(
    model: Model,
    params: Params,
    tokens_BP: jax.Array,
    start_B: jax.Array,
    *,
    stop_ids: Sequence[int],
    max_tokens: int,
    vocab: int,
) -> jax.Array:
    """Answers, (B, M): one id after another until every row has met a stop id; what follows a row's stop means nothing."""
    rows, width = tokens_BP.shape
    stops = jnp.asarray(stop_ids, jnp.int32)

    def choose(logits_BV: jax.Array) -> jax.Array:
        return logits_BV[:, :vocab].argmax(axis=-1).astype(jnp.int32)

    def ended(ids_B: jax.Array) -> jax.Array:
        return (ids_B[:, None] == stops[None]).any(axis=-1)

    def unfinished(carry) -> jax.Array:
        number, _, is_done_B, _, _ = carry
        return (number < max_tokens) & ~is_done_B.all()

    def advance(carry):
        number, ids_B, is_done_B, out_BM, cache = carry
        logits_BV, cache = model.step(params, cache, ids_B[:, None])
        ids_B = choose(logits_BV)
        out_BM = jax.lax.dynamic_update_slice(out_BM, ids_B[:, None], (0, number))
        return number + 1, ids_B, is_done_B | ended(ids_B), out_BM, cache

    cache = model.init_cache(rows, width + max_tokens)._replace(start_B=start_B)
    logits_BV, cache = model.step(params, cache, pin(tokens_BP, "batch", "length"))
    ids_B = choose(logits_BV)
    out_BM = jnp.zeros((rows, max_tokens), jnp.int32).at[:, 0].set(ids_B)
    is_done_B = ended(ids_B) | (start_B == width)
    *_, out_BM, _ = jax.lax.while_loop(unfinished, advance, (jnp.int32(1), ids_B, is_done_B, out_BM, cache))
    return pin(out_BM, None, None)  # every host reads all answers


def _check(prompts: Sequence[Sequence[int]], vocab: int) -> None:
    for number, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"sampler: prompt {number} is empty; begin it with the begin-of-sequence id at least")
        if not 0 <= min(prompt) <= max(prompt) < vocab:
            wrong = next(token for token in prompt if not 0 <= token < vocab)
            raise ValueError(
                f"sampler: prompt {number} has id {wrong}, outside the vocabulary of {vocab}; check the tokenizer"
            )


def _groups(lengths: Sequence[int], rows: int) -> Iterator[list[int]]:
    """Numbers of the prompts, `rows` at a time, those of one padded length together."""
    by_length = sorted(range(len(lengths)), key=lambda number: lengths[number])
    while by_length:
        width = _bucket(lengths[by_length[0]])
        group = [number for number in by_length[:rows] if _bucket(lengths[number]) == width]
        yield group
        by_length = by_length[len(group) :]


def _bucket(length: int) -> int:
    width = SHORTEST
    while width < length:
        width *= 2
    return width


def _until_stop(ids: np.ndarray, stop_ids: Sequence[int]) -> list[int]:
    ends = np.flatnonzero(np.isin(ids, stop_ids))
    return ids[: ends[0] if len(ends) else len(ids)].tolist()
