"""Answers are the most likely continuation, whoever else is in the batch."""

import dataclasses

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

from itjax.evaluation import sampler
from itjax.evaluation.sampler import make_sampler
from itjax.parallel import layout
from tests import fakes

REAL = 90  # ids; the model has a few rows more
PROMPTS = [np.random.default_rng(seed).integers(0, REAL, n).tolist() for seed, n in enumerate([3, 40, 11, 1, 33])]
MAX_TOKENS = 8


@pytest.fixture(scope="module")
def model():
    return fakes.tiny_model()


@pytest.fixture(scope="module")
def params():
    params = fakes.tiny_params()
    kernel_VD = params["embed"]["kernel"].at[REAL:].mul(8.0)  # ids that do not exist would often win
    return {**params, "embed": {"kernel": kernel_VD}}


@pytest.fixture(scope="module")
def continuations(model, params):
    """One token at a time through the full forward pass, no cache, no batch."""
    length = 64
    forward = jax.jit(lambda batch: model.unembed(params, model.features(params, batch).x_BTD))
    answers = []
    for prompt in PROMPTS:
        ids = list(prompt)
        for _ in range(MAX_TOKENS):
            example = dataclasses.replace(fakes.example(0, length=len(ids)), tokens_T=np.array(ids, np.int32))
            logits_V = np.asarray(forward(fakes.packed([[example]], length=length)))[0, len(ids) - 1]
            ids.append(int(logits_V[:REAL].argmax()))
        answers.append(ids[len(prompt) :])
    return answers


def generate(model, params, prompts, *, stop_ids, rows, max_tokens=MAX_TOKENS):
    make = make_sampler(model, stop_ids=stop_ids, max_tokens=max_tokens, pad_id=0, vocab=REAL)
    return make(params, prompts, rows)


def unused(continuations) -> int:
    return next(token for token in range(REAL) if all(token not in answer for answer in continuations))


@pytest.mark.parametrize("rows", [1, 2, 8])
def test_answers_are_those_of_the_full_forward_whatever_the_batch(model, params, continuations, rows):
    assert generate(model, params, PROMPTS, stop_ids=[unused(continuations)], rows=rows) == continuations


def test_an_answer_ends_before_the_first_of_its_stop_ids(model, params, continuations):
    stops = [continuations[0][3], continuations[1][5]]
    answers = generate(model, params, PROMPTS, stop_ids=stops, rows=4)
    for answer, whole in zip(answers, continuations, strict=True):
        ends = [place for place, token in enumerate(whole) if token in stops]
        assert answer == whole[: ends[0] if ends else None]
    assert len(answers[0]) <= 3


def test_ids_that_no_text_has_are_never_given(model, params):
    logits = model.unembed(
        params, model.features(params, fakes.packed([[fakes.example(0, length=40)]], length=40)).x_BTD
    )
    assert (np.asarray(logits).argmax(-1) >= REAL).any()  # they would win
    answers = generate(model, params, PROMPTS, stop_ids=[0], rows=8, max_tokens=30)
    assert all(token < REAL for answer in answers for token in answer)


def test_decoding_stops_when_every_row_has(model, params, continuations):
    """Steps are counted where they happen: in the model."""
    steps = []

    def step(params, cache, tokens_BT):
        jax.debug.callback(lambda: steps.append(1))
        return model.step(params, cache, tokens_BT)

    stop = continuations[0][2]
    first = continuations[0].index(stop)
    counted = dataclasses.replace(model, step=step)
    generate(counted, params, PROMPTS[:1], stop_ids=[stop], rows=3, max_tokens=40)
    jax.effects_barrier()
    assert len(steps) == first + 1  # the prompt's, and one per token before the stop


def test_answers_are_the_same_on_a_mesh(model, params, continuations):
    mesh = Mesh(np.array(jax.devices()).reshape(2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, layout.shardings(model.axes, mesh, model.abstract))
        assert generate(model, placed, PROMPTS[:4], stop_ids=[unused(continuations)], rows=4) == continuations[:4]


def test_prompts_are_padded_on_the_left_to_a_few_lengths():
    tokens_BP, start_B = sampler.left_padded([[5, 6, 7], [8]], rows=3, pad_id=0)
    assert tokens_BP.shape == (3, sampler.SHORTEST)
    assert tokens_BP[:, -3:].tolist() == [[5, 6, 7], [0, 0, 8], [0, 0, 0]]
    assert start_B.tolist() == [29, 31, 32]
    assert sampler.left_padded([[1] * 33], rows=1, pad_id=0)[0].shape == (1, 64)


def test_what_cannot_be_answered_is_named(model, params):
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        generate(model, params, [[1], []], stop_ids=[0], rows=2)
    with pytest.raises(ValueError, match=f"prompt 0 has id {REAL}, outside the vocabulary of {REAL}"):
        generate(model, params, [[REAL]], stop_ids=[0], rows=1)
    with pytest.raises(ValueError, match="no stop ids"):
        generate(model, params, [[1]], stop_ids=[], rows=1)


def test_no_prompts_have_no_answers(model, params):
    assert generate(model, params, [], stop_ids=[0], rows=2) == []
