"""Every experiment in configs/ freezes, says what its recipe says, and is a model and an optimizer that exist."""

from pathlib import Path

import jax
import pytest

from itjax import parts
from itjax.base import freeze, tree
from itjax.base.schema import Run
from itjax.models import families, lora
from itjax.models.model import build
from itjax.text.formats import FORMATS
from itjax.train import optimizer
from itjax.train.state import abstract, state_axes

FOLDER = Path(__file__).parents[1] / "configs"
CONFIGS = sorted(path.stem for path in FOLDER.glob("*.py"))
PROMISED = (
    "quickstart", "sft_files", "sft_llama31_8b", "lora_llama31_8b", "sft_llama31_70b", "sft_llama32_1b", "sft_qwen3_0p6b",
    "sft_qwen3_30b_a3b", "tulu3_8b", "alpaca_7b",
)  # fmt: skip
VOCAB = 1024  # the tokenizer's; any will do

# Hyperparameters as published, by the sources that the configs name: peak rate, epochs, schedule, warm-up, length.
PUBLISHED = {
    "alpaca_7b": (2e-5, 3, "cosine", 0.03, 512),
    "tk_instruct": (5e-5, 2, "constant", 0.0, 1024 + 128),
    "tulu2_7b": (2e-5, 3, "linear", 0.03, 4096),
    "tulu3_8b": (5e-6, 2, "linear", 0.03, 4096),
    "olmo2_7b": (1e-5, 2, "linear", 0.03, 4096),
    "zephyr_7b": (2e-5, 1, "cosine", 0.1, 2048),
    "zephyr_7b_qlora": (2e-4, 1, "cosine", 0.1, 2048),
    "smollm3_3b": (2e-5, 5, "cosine", 0.03, 65536),
    "lima_7b": (1e-5, 15, "linear", 0.0, 2048),
}


def load(name: str) -> Run:
    config = freeze.config_from(FOLDER / f"{name}.py").to_dict()
    return freeze.freeze(config if config["files"] or config["sources"] else {**config, "files": "data/*.jsonl"})


def peak(run: Run) -> float:
    """The highest rate that the run has, of adapters where it has some."""
    return run.optimizer.learning_rate * (run.lora.learning_rate_multiplier if run.lora.rank else 1)


def test_what_was_promised_is_there():
    assert set(PROMISED) <= set(CONFIGS)
    assert set(PUBLISHED) <= set(CONFIGS)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_freezes_and_says_how_to_run_it(name):
    run = load(name)
    assert run.rows % run.accumulate == 0
    assert run.run_dir == f"runs/{name}"  # two of them never write into one folder
    assert run.format == "auto" or run.format in FORMATS
    text = (FOLDER / f"{name}.py").read_text()
    assert f"python -m itjax.main --config=configs/{name}.py" in text.split('"""')[1]


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_recipe_has_the_published_numbers(name):
    run = load(name)
    assert (run.epochs, run.optimizer.schedule, run.optimizer.warmup, run.length) == PUBLISHED[name][1:]
    assert peak(run) == pytest.approx(PUBLISHED[name][0])


def test_what_else_is_published():
    assert {load(name).optimizer.weight_decay for name in ("alpaca_7b", "tulu2_7b")} == {0}
    assert {load(name).optimizer.clip_norm for name in ("tulu2_7b", "tulu3_8b")} == {0}
    adapters = load("zephyr_7b_qlora").lora
    assert (adapters.rank, adapters.alpha, adapters.dropout, adapters.targets) == (16, 16, 0.05, ())
    lima = load("lima_7b").optimizer
    assert (lima.b1, lima.b2, lima.weight_decay) == (0.9, 0.95, 0.1)
    assert lima.learning_rate * lima.final == pytest.approx(1e-6)
    assert load("lima_7b").rows == 64
    assert load("zephyr_7b").rows == 16 * 8
    assert load("tk_instruct").rows == 1 * 2 * 8
    assert load("tk_instruct").sources["tasks"].mixture.cap == 100


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_is_a_state_with_a_place_for_every_array(name):
    run = load(name)
    config = families.resolve(run.model, run.architecture, vocab=VOCAB)
    model = build(config, dtype="bfloat16", attention="auto", remat=run.remat, lora=run.lora, base=parts.base(run))
    moves = lora.moving(model.abstract, run.lora)
    (params, frozen), (axes, frozen_axes) = (lora.split(part, moves) for part in (model.abstract, model.axes))
    tx = optimizer.make(run.optimizer)
    state = abstract(params, frozen, tx)
    places = state_axes(axes, params, tx, frozen_axes)
    assert jax.tree.structure(state) == jax.tree.structure(places, is_leaf=lambda x: isinstance(x, jax.P))
    assert bool(frozen) == bool(run.lora.rank)
    assert 8 <= bytes_of(state.opt_state) / tree.num_elements(params) < 8.01  # two float32 moments of what moves


def bytes_of(some) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(some))


def test_presets_have_the_size_that_their_names_say():
    sizes = {
        "sft_llama31_8b": 8.03e9,
        "sft_llama31_70b": 70.6e9,
        "sft_llama32_1b": 1.24e9,
        "sft_qwen3_0p6b": 0.596e9,
        "sft_qwen3_30b_a3b": 30.5e9,
    }
    for name, size in sizes.items():
        run = load(name)
        published = families.PRESETS[run.model]
        model = build(published, dtype="bfloat16", attention="auto", remat=run.remat)
        assert tree.num_elements(model.abstract) == pytest.approx(size, rel=0.005), name
