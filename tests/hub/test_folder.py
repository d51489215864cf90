"""A model's folder: what it says of itself, and what is refused."""

import functools
import json
import os
import pickle
import shutil
import stat
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from itjax.base import tree
from itjax.hub import configs, folder, names, tensors, weights
from itjax.hub.folder import Folder
from itjax.models.config import ModelConfig
from itjax.text import tokenizer
from tests.fakes import TINY, tiny_model

TEXTS = ["The quick brown fox jumps over the lazy dog."] * 4


@pytest.fixture(scope="module")
def model() -> bytes:
    """A tokenizer of a little more ids than bytes."""
    return tokenizer.train(TEXTS, size=300, controls=("<|im_start|>", "<|im_end|>"))


def config(model: bytes) -> ModelConfig:
    return configs_like(TINY, vocab=tokenizer.SentencePiece(model).size)


def configs_like(config: ModelConfig, *, vocab: int) -> ModelConfig:
    return ModelConfig(**{**vars(config), "vocab": vocab})


@functools.cache
def drawn(config: ModelConfig) -> dict:
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: jnp.array(rng.normal(size=leaf.shape), leaf.dtype), tiny_model(config).abstract)


def publish(place: Path, model: bytes, *, generation: dict | None = None, **fields: object) -> Path:
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    written = configs.write(config(model), dtype="float32", bos=2, eos=3, pad=0, length=64) | fields
    (place / "config.json").write_text(json.dumps(written))
    (place / "tokenizer.model").write_bytes(model)
    if generation is not None:
        (place / "generation_config.json").write_text(json.dumps(generation))
    weights.save(place, drawn(config(model)), names.entries(config(model)), dtype="float32")
    return place


def test_a_folder_is_config_weights_and_tokenizer(tmp_path, model):
    opened = Folder.open(publish(tmp_path / "m", model))
    assert opened.config.vocab == opened.tokenizer.size == config(model).vocab
    assert opened.fields["hidden_size"] == TINY.dim
    assert opened.template is None
    abstract = tiny_model(config(model)).abstract
    loaded = tree.flatten(opened.load(abstract))
    for path, array in tree.flatten(drawn(config(model))).items():
        np.testing.assert_array_equal(loaded[path], array)


def test_rows_of_new_ids_begin_as_the_mean(tmp_path, model):
    opened = Folder.open(publish(tmp_path / "m", model))
    known = opened.tokenizer.size
    grown = configs_like(config(model), vocab=known + 8)
    loaded = opened.load(tiny_model(grown).abstract, num_ids=known + 3)
    table = np.asarray(drawn(config(model))["embed"]["kernel"], np.float64)
    new = loaded["embed"]["kernel"]
    np.testing.assert_allclose(new[known : known + 3], np.tile(table.mean(0), (3, 1)), rtol=1e-4, atol=1e-7)
    np.testing.assert_array_equal(new[known + 3 :], 0)


@pytest.mark.parametrize("declared", [{"300": "<|y|>"}, {"x": {"content": "<|y|>"}}, {"300": {"content": 3}}, [1]])
def test_tokens_that_are_declared_in_another_form_are_refused(tmp_path, model, declared):
    opened = Folder.open(publish(tmp_path / "m", model))
    (tmp_path / "m" / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": declared}))
    with pytest.raises(ValueError, match=r"m: added_tokens_decoder: .* it should be ids, and of each its content"):
        _ = opened.tokenizer


def test_a_folder_without_a_tokenizer_takes_that_of_the_run(tmp_path, model):
    opened = Folder.open(publish(tmp_path / "m", model))
    (tmp_path / "m" / "tokenizer.model").unlink()
    loaded = opened.load(tiny_model(opened.config).abstract, num_ids=opened.config.vocab - 3)
    np.testing.assert_array_equal(loaded["embed"]["kernel"], drawn(opened.config)["embed"]["kernel"])


def test_an_embedding_of_fewer_rows_than_the_config_says_is_no_padding(tmp_path, model):
    """New ids get rows; ids that the folder itself has should have them."""
    known = config(model).vocab
    opened = Folder.open(publish(tmp_path / "m", model, vocab_size=known + 8))
    words = rf"1 tensor does not fit .*\n.*embed_tokens.weight: have F32 \[{known}, 32\], want \[{known + 8}, 32\]"
    with pytest.raises(ValueError, match=words):
        opened.check()
    with pytest.raises(ValueError, match=words):
        opened.load(tiny_model(opened.config).abstract, num_ids=known)


@pytest.mark.parametrize(
    "generation, fields, ids",
    [
        ({"eos_token_id": [3, 5]}, {}, {3, 5}),
        ({"eos_token_id": 5}, {}, {5}),
        ({"top_p": 0.9}, {"eos_token_id": [4]}, {4}),
        (None, {"eos_token_id": 4}, {4}),
        (None, {"eos_token_id": None}, set()),
    ],
)
def test_all_ids_that_end_an_answer_are_known(tmp_path, model, generation, fields, ids):
    assert Folder.open(publish(tmp_path / "m", model, generation=generation, **fields)).stop_ids == ids


@pytest.mark.parametrize("ids", [[1000], -1, "3", [True], [2.0]])
def test_an_end_that_is_no_id_is_refused(tmp_path, model, ids):
    opened = Folder.open(publish(tmp_path / "m", model, generation={"eos_token_id": ids}))
    with pytest.raises(ValueError, match=r"generation_config.json: eos_token_id: .* should be ids below"):
        _ = opened.stop_ids
    with pytest.raises(ValueError, match="eos_token_id"):
        opened.check()


def test_a_folder_of_no_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"there is no config.json"):
        Folder.open(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match=f"{tmp_path}: config.json: model_type = 'bert'"):
        Folder.open(tmp_path)
    for text in ("", "[]", "{" * 10_000, '{"a": 1, "a": 2}'):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match=f"{tmp_path}/config.json: not"):
            Folder.open(tmp_path)


class Payload:
    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


READ = ("config.json", "generation_config.json", "tokenizer.model", "tokenizer.json", "tokenizer_config.json",
        "chat_template.jinja", "chat_template.json", "special_tokens_map.json", "model.safetensors",
        "model.safetensors.index.json")  # fmt: skip
CODE = (
    "modeling_evil.py",
    "configuration_evil.py",
    "pytorch_model.bin",
    "training_args.bin",
    "optimizer.pt",
    "scheduler.pt",
)


@pytest.mark.parametrize("name", READ)
def test_a_pickle_in_place_of_any_file_is_never_opened_as_one(tmp_path, model, name):
    place, marker = publish(tmp_path / "m", model), tmp_path / "marker"
    (place / name).write_bytes(pickle.dumps(Payload(marker)))

    def everything() -> None:
        opened = Folder.open(place)
        _ = (opened.stop_ids, opened.tokenizer, opened.template, opened.fingerprint())
        opened.load(tiny_model(config(model)).abstract)

    with pytest.raises(ValueError, match=name.split(".")[0]):
        everything()
    assert not marker.exists()


def test_code_that_a_folder_brings_along_is_left_alone(tmp_path, model):
    auto = {"AutoModelForCausalLM": "modeling_evil.Evil", "AutoConfig": "configuration_evil.Evil"}
    place, marker = publish(tmp_path / "m", model, auto_map=auto), tmp_path / "marker"
    for name in CODE:
        text = f"import pathlib; pathlib.Path({str(marker)!r}).touch()".encode()
        (place / name).write_bytes(text if name.endswith(".py") else pickle.dumps(Payload(marker)))
    Folder.open(place).load(tiny_model(config(model)).abstract)
    assert not marker.exists()


# --- what a folder is known by ----------------------------------------------------------------------------------------


def test_a_copy_has_the_same_fingerprint_and_every_change_another(tmp_path, model):
    first = Folder.open(publish(tmp_path / "a", model)).fingerprint()
    copy = publish(tmp_path / "b", model)
    assert Folder.open(copy).fingerprint() == first
    found = tensors.of_folder(copy)
    for name in ("model.norm.weight", "model.layers.1.mlp.up_proj.weight"):
        raw = bytearray((copy / "model.safetensors").read_bytes())
        raw[found[name].start + 1] ^= 1
        (copy / "model.safetensors").write_bytes(raw)
        assert Folder.open(copy).fingerprint() != first
        raw[found[name].start + 1] ^= 1
        (copy / "model.safetensors").write_bytes(raw)
    assert Folder.open(copy).fingerprint() == first
    assert Folder.open(publish(copy, model, rope_theta=2e4)).fingerprint() != first


@pytest.mark.parametrize("num_ids, rows", [(100, 100), (99, 100), (31_000, 32_000), (151_669, 151_936), (50, 1_000)])
def test_a_tokenizer_may_leave_a_few_rows_unused(num_ids, rows):
    folder.check_vocabulary(num_ids, rows, place="config.tokenizer")


@pytest.mark.parametrize(
    "num_ids, rows, words",
    [
        (101, 100, "config.tokenizer: the tokenizer has 101 ids and the embedding 100 rows; .*config.new_tokens"),
        (
            32_000,
            128_256,
            "32000 ids and the embedding 128256 rows, so this is probably the tokenizer of another model",
        ),
    ],
)
def test_a_tokenizer_of_another_model_is_refused(num_ids, rows, words):
    with pytest.raises(ValueError, match=words):
        folder.check_vocabulary(num_ids, rows, place="config.tokenizer")


# --- new folders ------------------------------------------------------------------------------------------------------


def test_a_new_folder_is_there_whole_or_not_at_all(tmp_path):
    with folder.new(tmp_path / "above" / "out") as place:
        (place / "a").touch()
        assert not (tmp_path / "above" / "out").exists()
    assert [path.name for path in (tmp_path / "above").iterdir()] == ["out"]
    mask = os.umask(0o022)
    os.umask(mask)
    assert stat.S_IMODE((tmp_path / "above" / "out").stat().st_mode) == 0o777 & ~mask
    with pytest.raises(FileNotFoundError), folder.new(tmp_path / "other") as place:
        (place / "not there" / "a").touch()
    assert [path.name for path in tmp_path.iterdir()] == ["above"]


def test_a_folder_that_holds_something_is_not_written_over(tmp_path):
    (tmp_path / "empty").mkdir()
    with folder.new(tmp_path / "empty") as place:
        (place / "a").touch()
    for name in ("empty", "empty/a"):
        with pytest.raises(ValueError, match="is there already and not empty"), folder.new(tmp_path / name):
            pass
