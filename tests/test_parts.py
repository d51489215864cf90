"""What does not fit the model is told before any data is read."""

import json

import jax
import jax.numpy as jnp
import pytest

from itjax import parts
from itjax.base.schema import Architecture, Lora, Optimizer, Run
from itjax.hub import configs, names, weights
from tests.fakes import TINY, tiny_model

FAULTS = {
    "settings of a preset": ({"architecture": Architecture(layers=3)}, {}, "config.architecture.layers: .* leave it out"),
    "longer rows": ({"length": 65}, {}, "config.length: 65 positions, and .* was made for 64; set config.length to 64"),
    "unknown family": ({}, {"model_type": "lama"}, "config.model: .*config.json: model_type = 'lama'"),
    "fewer layers than tensors": ({}, {"num_hidden_layers": 1}, r"9 tensors do not fit .*\n.*layers.1.*no such parameter"),
    "more layers than tensors": ({}, {"num_hidden_layers": 3}, r"9 tensors do not fit .*\n.*layers.2.*have none"),
}  # fmt: skip


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A folder without a tokenizer, which is not asked for."""
    place = tmp_path_factory.mktemp("published")
    weights.save(
        place,
        jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), tiny_model().abstract),
        names.entries(TINY),
        dtype="float32",
    )
    return place


def check(place, settings: dict, **fields: object) -> None:
    written = configs.write(TINY, dtype="float32", bos=2, eos=3, pad=0, length=64)
    (place / "config.json").write_text(json.dumps(written | fields))
    parts.check_model(Run(model=str(place), **{"length": 64, **settings}))


def test_what_fits_is_silent(published):
    check(published, {})
    parts.check_model(Run())


def test_a_folder_with_a_large_vocabulary_is_not_taken_for_another_model(published):
    """Ids are counted when the tokenizer is there."""
    with pytest.raises(ValueError, match=r"1 tensor does not fit .*\n.*embed_tokens.weight: .* want \[128256, 32\]"):
        check(published, {}, vocab_size=128_256)


@pytest.mark.parametrize("name", FAULTS)
def test_a_folder_that_does_not_fit_is_one_message(published, name):
    settings, fields, words = FAULTS[name]
    with pytest.raises(ValueError, match=words):
        check(published, settings, **fields)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"optimizer": Optimizer(rates={"layers/atn/q/kernel": 0.5})}, r"rates: .*Did you mean 'layers/attn/q/kernel'"),
        ({"optimizer": Optimizer(decays={"head/*": 0.1})}, r"decays: 'head/\*' fits no parameter that is trained"),
        ({"lora": Lora(rank=2, targets=("layers/atn/q",))}, r"config\.lora\.targets: .*Did you mean 'layers/attn/q'"),
        ({"lora": Lora(rank=2, also=("*nrom*",))}, r"config\.lora\.also: '\*nrom\*' fits nothing"),
        (
            {"lora": Lora(rank=2), "optimizer": Optimizer(rates={"embed/*": 0.1})},
            r"rates: 'embed/\*' fits no parameter",
        ),
    ],
)
def test_patterns_that_fit_nothing_are_told_with_the_nearest_name(settings, message):
    with pytest.raises(ValueError, match=message):
        parts.check_model(Run(**settings))
