"""A small model that was really trained (stories260K of llama2.c): it speaks as published, and is fine-tuned from there.

What is expected was written by llama2.c itself (the text) and worked out in float64 (the logits).
"""

import dataclasses
import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from itjax.base import tree
from itjax.base.records import PackedBatch, TokenizedExample
from itjax.base.schema import Lora, Optimizer, Parallel, Run
from itjax.evaluation.sampler import make_sampler
from itjax.hub.folder import Folder
from itjax.models import lora
from itjax.models.model import Model, Params, join
from itjax.objectives.sft import sft
from itjax.parallel.mesh import mesh_for
from itjax.text import tokenizer
from itjax.text.tokenizer import Tokenizer
from itjax.train import loop
from itjax.train.state import TrainState
from tests import fakes, quick
from tests.models import llama2c

STEPS = 16
LENGTH = 64  # positions in a row: one instruction and its answer
RUN = Run(optimizer=Optimizer(learning_rate=2e-3, schedule="constant", warmup=0.1), parallel=Parallel(data=1))
ADAPTED = dataclasses.replace(RUN, lora=Lora(rank=8, alpha=16.0, learning_rate_multiplier=4.0))

QUESTION = "Tell a story about a {thing}.\n"
ANSWER = "Once upon a time, there was a {thing}. The {thing} was happy."
LEARNED = ("cat", "ball", "tree", "bird", "car", "fish", "doll", "bear", "cake", "flower", "boat", "book")
HELD_OUT = ("dog", "bunny", "hat", "frog")


@pytest.fixture(scope="module")
def folder(shared_data) -> Path:
    return shared_data / "stories260K"


@pytest.fixture(scope="module")
def pretrained(folder) -> tuple[Model, Params]:
    config, params = llama2c.read(folder / "stories260K.bin")
    return quick.build(config), params


@pytest.fixture(scope="module")
def pieces(folder) -> Tokenizer:
    return tokenizer.open(folder / "tok512.model")


@pytest.fixture(scope="module")
@quick.compiled()
def logits(pretrained) -> Callable[[Params, Sequence[np.ndarray]], list[np.ndarray]]:
    """Logits_TV of each of a few texts, which are rows of one batch."""
    model, _ = pretrained

    @jax.jit
    def run(params: Params, batch: PackedBatch) -> jax.Array:
        return model.unembed(params, model.features(params, batch).x_BTD)

    def of(params: Params, texts: Sequence[np.ndarray]) -> list[np.ndarray]:
        rows = [[TokenizedExample(ids_T, ids_T, np.ones(len(ids_T), np.float32))] for ids_T in texts]
        logits_BTV = np.asarray(run(params, fakes.packed(rows, length=LENGTH)))
        return [logits_TV[: len(ids_T)] for logits_TV, ids_T in zip(logits_BTV, texts, strict=True)]

    return of


# --- the published model ----------------------------------------------------------------------------------------------


def test_every_parameter_has_its_place(pretrained):
    model, params = pretrained
    shapes = {path: leaf.shape for path, leaf in tree.flatten(model.abstract).items()}
    assert {path: leaf.shape for path, leaf in tree.flatten(params).items()} == shapes


def test_200_greedy_tokens_are_the_published_text_byte_for_byte(pretrained, pieces, folder):
    model, params = pretrained
    ids = greedy(model, params, 200)
    assert ids == json.loads((folder / "reference.json").read_text())["greedy_token_ids"][1 : len(ids) + 1]
    assert pieces.decode_bytes(ids) == (folder / "expected_greedy_200.txt").read_bytes()


@quick.compiled()
def greedy(model: Model, params: Params, number: int) -> list[int]:
    sampler = make_sampler(model, stop_ids=[llama2c.BOS, llama2c.EOS], max_tokens=number, pad_id=0, vocab=512)
    return sampler(params, [[llama2c.BOS]], 1)[0]


def test_logits_are_those_of_float64(pretrained, pieces, folder, logits):
    texts = [check["text"] for check in json.loads((folder / "reference.json").read_text())["checks"]]
    ids, expected = reference(folder)
    assert [[llama2c.BOS, *pieces.encode(text)] for text in texts] == [ids_T.tolist() for ids_T in ids]
    for logits_TV, expected_TV in zip(logits(pretrained[1], ids), expected, strict=True):
        np.testing.assert_allclose(logits_TV, expected_TV, rtol=0, atol=1e-4)


def reference(folder: Path) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Three texts, and the logits behind each of their tokens."""
    with np.load(folder / "reference_logits.npz") as found:
        return [found[f"ids_{n}"] for n in range(3)], [found[f"logits_{n}"] for n in range(3)]


def test_a_folder_made_of_it_opens_as_the_same_model(pretrained, pieces, folder, logits, tmp_path):
    model, params = pretrained
    llama2c.convert(folder / "stories260K.bin", folder / "tok512.model", tmp_path)
    opened = Folder.open(tmp_path)
    assert opened.config == model.config
    assert opened.tokenizer.fingerprint() == pieces.fingerprint()
    assert opened.stop_ids == {llama2c.EOS}
    ids, _ = reference(folder)
    for again_TV, logits_TV in zip(logits(opened.load(model.abstract), ids), logits(params, ids), strict=True):
        np.testing.assert_array_equal(again_TV, logits_TV)


# --- fine-tuned from there --------------------------------------------------------------------------------------------


def rows(pieces: Tokenizer, things: Sequence[str]) -> PackedBatch:
    """An instruction about each thing; the answer is learned, and that it ends."""
    return fakes.packed([[example(pieces, thing)] for thing in things], length=LENGTH)


def example(pieces: Tokenizer, thing: str) -> TokenizedExample:
    asked = [llama2c.BOS, *pieces.encode(QUESTION.format(thing=thing))]
    ids = np.array([*asked, *pieces.encode_more([ANSWER.format(thing=thing)])[0], llama2c.EOS], np.int32)
    return TokenizedExample(ids[:-1], ids[1:], (np.arange(1, len(ids)) >= len(asked)).astype(np.float32))


@dataclass(frozen=True)
class Training:
    """The train step that runs have, and what it makes of parameters in a few steps on the instructions."""

    run: Run
    model: Model
    learned: PackedBatch
    held_out: PackedBatch

    @functools.cached_property
    def compiled(self) -> loop.Compiled:
        return loop.compile_step(self.run, self.model, self.mesh, num_steps=STEPS)

    @functools.cached_property
    def mesh(self) -> Mesh:
        return mesh_for(self.run.parallel, jax.devices()[:1])

    @functools.cached_property
    @quick.compiled()
    def mean_loss(self) -> Callable[[Params, PackedBatch], jax.Array]:
        loss_fn = sft(self.model, loss=self.run.loss)

        def mean(params: Params, batch: PackedBatch) -> jax.Array:
            sums = loss_fn(params, {}, batch)
            return sums.loss / sums.weight

        return jax.jit(mean)

    def begin(self, params: Params) -> TrainState:
        with jax.set_mesh(self.mesh):
            return loop.first(self.run, self.model, self.compiled, lambda like: placed(params, like))

    def after(self, state: TrainState) -> TrainState:
        with jax.set_mesh(self.mesh):
            for _ in range(STEPS):
                state, _ = self.compiled.step(state, self.learned)
        return state


def placed(params: Params, like: Params) -> Params:
    """Copies where the run keeps them, which it may then write over."""
    places = tree.flatten(like)
    flat = tree.flatten(params)
    return tree.unflatten({path: jax.device_put(np.array(x), places[path].sharding) for path, x in flat.items()})


@pytest.fixture(scope="module")
def training(pretrained, pieces) -> Training:
    return Training(RUN, pretrained[0], rows(pieces, LEARNED), rows(pieces, HELD_OUT))


def test_fine_tuning_lowers_the_held_out_loss_of_a_trained_model(pretrained, training):
    model, params = pretrained
    before = training.mean_loss(params, training.held_out)
    after = training.mean_loss(training.after(training.begin(params)).params, training.held_out)
    drawn = model.init(jax.random.key(0))
    untrained = training.mean_loss(training.after(training.begin(drawn)).params, training.held_out)
    assert before < 0.6 * np.log(model.config.vocab)  # it knows the language, and not that instructions are answered
    assert after < 0.25 * before
    assert untrained > 2 * after  # as many steps do not make up for what it knew


def test_adapters_lower_it_too_and_the_base_stays(pretrained, training):
    plain, params = pretrained
    model = quick.build(plain.config, lora=ADAPTED.lora)
    adapted = dataclasses.replace(training, run=ADAPTED, model=model)
    start = adapted.begin(params)
    before = training.mean_loss(params, training.held_out)
    assert adapted.mean_loss(join(start.params, start.frozen), training.held_out) == before
    state = adapted.after(start)
    jax.tree.map(np.testing.assert_array_equal, state.frozen, params)
    merged = lora.merge(join(state.params, state.frozen), ADAPTED.lora, dtype="float32")
    assert training.mean_loss(merged, training.held_out) < 0.5 * before
