"""Every family computes what transformers computes from the same folder, and transformers opens what is written here.

The models are small and drawn (`drawn.py`); all numbers are float32. B rows, T positions, V vocabulary, P prompts.
"""

import copy
import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")


from itjax.base import tree  # noqa: E402
from itjax.base.records import PackedBatch, TokenizedExample  # noqa: E402
from itjax.base.schema import Loss  # noqa: E402
from itjax.evaluation.sampler import make_sampler  # noqa: E402
from itjax.hub import configs, names, tensors, weights  # noqa: E402
from itjax.hub.folder import CONFIG, Folder  # noqa: E402
from itjax.models.model import Model, Params  # noqa: E402
from itjax.objectives.sft import sft  # noqa: E402
from tests import fakes, quick  # noqa: E402
from tests.parity import drawn  # noqa: E402

NEAR = 1e-4  # of the largest number of what is compared, or of 1; gradients of their own largest where that is smaller
SEEDS, MORE_SEEDS = range(1), range(1, 12)
T = 60  # positions in a row, several times any window
ROWS = ((60,), (45,), (20, 25, 15), (28, 10, 12))  # documents: a whole row, a padded one, packed, packed and padded
PROMPTS = (31, 9, 18, 14)  # tokens
ANSWER = 24

CASES = [
    *((family, seed) for seed in SEEDS for family in drawn.FAMILIES),
    *(pytest.param((family, seed), marks=pytest.mark.slow) for seed in MORE_SEEDS for family in drawn.FAMILIES),
]


@dataclass(frozen=True)
class Case:
    """One drawn model, as transformers has it and as it was read from the folder that transformers wrote."""

    theirs: transformers.PreTrainedModel
    folder: Folder
    ours: Model
    params: Params
    documents: list[list[TokenizedExample]]  # row by row

    @functools.cached_property
    def batch(self) -> PackedBatch:
        return fakes.packed(self.documents, length=T)

    @functools.cached_property
    def computed(self) -> tuple[jax.Array, jax.Array, Params]:
        """Our logits_BTV, mean loss and its gradient, in one program that has the network once."""

        def run(params: Params) -> tuple[jax.Array, jax.Array]:
            features = self.ours.features(params, self.batch)
            known = replace(self.ours, features=lambda *_: features)
            sums = sft(known, loss=Loss(router_balance=0.0))(params, {}, self.batch)
            return sums.loss / sums.weight, self.ours.unembed(params, features.x_BTD)

        (loss, logits_BTV), gradient = jax.jit(jax.value_and_grad(run, has_aux=True))(self.params)
        return logits_BTV, loss, gradient

    @functools.cached_property
    def expected(self) -> tuple[list[list[np.ndarray]], float]:
        """Their logits_TV of every document by itself, and the mean loss, whose gradient their parameters then have."""
        logits, total, weight = [], torch.zeros(()), 0.0
        for row in self.documents:
            logits.append([])
            for document in row:
                logits_TV = self.theirs(torch.tensor(document.tokens_T[None], dtype=torch.long)).logits[0]
                targets_T = torch.tensor(document.targets_T, dtype=torch.long)
                nll_T = torch.nn.functional.cross_entropy(logits_TV, targets_T, reduction="none")
                total = total + (nll_T * torch.tensor(document.weights_T)).sum()
                weight += float(document.weights_T.sum())
                logits[-1].append(logits_TV.detach().numpy())
        loss = total / weight
        self.theirs.zero_grad()
        loss.backward()
        return logits, loss.item()


@pytest.fixture(scope="module", autouse=True)
def frugal():
    """torch has one thread, as other tests run at the same time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with quick.compiled():
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", params=CASES, ids=lambda case: f"{case[0]}-{case[1]}")
def case(request, tmp_path_factory) -> Case:
    family, seed = request.param
    theirs = drawn.model(family, seed)
    path = tmp_path_factory.mktemp(family)
    theirs.save_pretrained(path)
    folder, ours, params = opened(path)
    return Case(theirs, folder, ours, params, documents(seed, vocab=folder.config.vocab))


def opened(path: Path) -> tuple[Folder, Model, Params]:
    folder = Folder.open(path)
    ours = quick.build(folder.config)
    return folder, ours, folder.load(ours.abstract)


def documents(seed: int, *, vocab: int) -> list[list[TokenizedExample]]:
    """Any tokens, targets and weights. Id 0 is their padding, whose embedding torch gives no gradient."""
    rng = np.random.default_rng(seed)

    def document(length: int) -> TokenizedExample:
        tokens_T, targets_T = rng.integers(1, vocab, (2, length), dtype=np.int32)
        weights_T = rng.uniform(size=length) * (rng.uniform(size=length) < 0.7)
        return TokenizedExample(tokens_T, targets_T, weights_T.astype(np.float32))

    return [[document(length) for length in lengths] for lengths in ROWS]


def difference(ours: Any, theirs: Any) -> float:
    """The largest one, of the largest number or of 1."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert ours.shape == theirs.shape
    return float(np.abs(ours - theirs).max() / max(1.0, np.abs(theirs).max()))


# --- what is computed -------------------------------------------------------------------------------------------------


def test_logits_are_theirs_whole_padded_and_packed(case):
    logits_BTV, _, _ = case.computed
    expected, _ = case.expected
    for number, row in enumerate(expected):
        start = 0
        for logits_TV in row:
            part_TV = logits_BTV[number, start : start + len(logits_TV)]
            assert difference(part_TV, logits_TV) < NEAR, (number, start)
            start += len(logits_TV)


def test_the_loss_and_its_gradient_of_every_parameter_are_theirs(case, tmp_path):
    _, loss, gradient = case.computed
    _, expected = case.expected
    assert difference(loss, expected) < NEAR
    theirs = gradient_of(case, tmp_path)
    ours = tree.flatten(gradient)
    assert ours.keys() == theirs.keys()
    assert tree.num_elements(gradient) == sum(parameter.numel() for parameter in case.theirs.parameters())
    for path, leaf in ours.items():
        largest = float(np.abs(theirs[path]).max())
        assert largest > 0, f"{path}: nothing is compared"
        np.testing.assert_allclose(leaf, theirs[path], rtol=NEAR, atol=NEAR * min(largest, 1.0), err_msg=path)


def gradient_of(case: Case, path: Path) -> dict[str, jax.Array]:
    """Their gradient as the folder of a model whose parameters it is, read as any other."""
    held = copy.deepcopy(case.theirs)
    with torch.no_grad():
        for (name, parameter), computed in zip(held.named_parameters(), case.theirs.parameters(), strict=True):
            assert computed.grad is not None, name
            parameter.copy_(computed.grad)
    held.save_pretrained(path)
    return tree.flatten(Folder.open(path).load(case.ours.abstract))


def test_greedy_answers_are_theirs(case):
    vocab = case.folder.config.vocab
    rng = np.random.default_rng(7)
    prompts = [rng.integers(1, vocab, length).tolist() for length in PROMPTS]
    sampler = make_sampler(case.ours, stop_ids=[vocab], max_tokens=ANSWER, pad_id=0, vocab=vocab)
    assert sampler(case.params, prompts, len(prompts)) == [answer(case.theirs, prompt) for prompt in prompts]


def answer(theirs: transformers.PreTrainedModel, prompt: Sequence[int]) -> list[int]:
    with torch.no_grad():
        ids = theirs.generate(torch.tensor([prompt]), max_new_tokens=ANSWER, do_sample=False, pad_token_id=0)
    return ids[0, len(prompt) :].tolist()


# --- what is written --------------------------------------------------------------------------------------------------


def test_what_is_written_opens_as_the_same_model(case, tmp_path):
    written(case, tmp_path)
    again, found = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, output_loading_info=True, **drawn.PLAINLY
    )
    assert not any(found.values()), found
    assert type(again) is type(case.theirs)
    have, want = again.state_dict(), case.theirs.state_dict()
    assert have.keys() == want.keys()
    for name, tensor in want.items():
        assert torch.equal(have[name], tensor), name
    for document in (case.documents[0][0], case.documents[3][1]):
        tokens_1T = torch.tensor(document.tokens_T[None], dtype=torch.long)
        with torch.no_grad():
            assert torch.equal(again.eval()(tokens_1T).logits, case.theirs(tokens_1T).logits)


def written(case: Case, path: Path) -> None:
    """The folder as this package writes it."""
    fields = configs.write(case.folder.config, dtype="float32", bos=1, eos=2, pad=0, length=T)
    (path / CONFIG).write_text(tensors.dump_json(fields))
    weights.save(path, case.params, names.entries(case.folder.config), dtype="float32")


# --- other ways to keep the same --------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["mixtral", "phi3"])
def test_shards_are_read_as_one(family, tmp_path):
    theirs = drawn.model(family, 0)
    theirs.save_pretrained(tmp_path / "one")
    theirs.save_pretrained(tmp_path / "many", max_shard_size="8KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 3
    _, _, one = opened(tmp_path / "one")
    _, _, many = opened(tmp_path / "many")
    jax.tree.map(np.testing.assert_array_equal, many, one)


def test_bfloat16_is_read_to_the_last_bit(tmp_path):
    theirs = drawn.model("qwen3", 0)
    theirs.save_pretrained(tmp_path / "float32")
    theirs.to(torch.bfloat16).save_pretrained(tmp_path / "bfloat16")
    _, _, whole = opened(tmp_path / "float32")
    _, _, rounded = opened(tmp_path / "bfloat16")
    jax.tree.map(lambda r, w: np.testing.assert_array_equal(r, w.astype(jnp.bfloat16).astype(r.dtype)), rounded, whole)
