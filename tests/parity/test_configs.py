"""transformers opens what is written here as the same decoder, and has the same tensors for it."""

import json
import math
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings

from itjax.hub import configs, names
from itjax.hub.mxfp4 import mxfp4
from itjax.hub.names import FAMILIES
from itjax.models.config import ModelConfig
from itjax.models.families import PRESETS
from tests.hub.drawn import any_decoders, shapes

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
from transformers.integrations.mxfp4 import convert_moe_packed_tensors  # noqa: E402

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


def opened(config: ModelConfig, folder: Path) -> "transformers.PreTrainedConfig":
    """The configuration as transformers reads it from a file."""
    fields = configs.write(config, dtype="float32", bos=None, eos=1, pad=None, length=64)
    (folder / "config.json").write_text(json.dumps(fields))
    return transformers.AutoConfig.from_pretrained(folder)


@pytest.mark.parametrize("kind", [*FAMILIES, *configs.WRAPPERS])
def test_fields_that_are_left_out_have_the_defaults_of_their_class(kind):
    defaults = json.loads(transformers.AutoConfig.for_model(kind).to_json_string(use_diff=False))
    assert configs.read({"model_type": kind}) == configs.read(defaults)


@pytest.mark.parametrize("preset", sorted(set(PRESETS) - {"tiny"}))
def test_transformers_opens_every_preset_as_what_it_is(preset, tmp_path):
    theirs = opened(PRESETS[preset], tmp_path)
    assert theirs.model_type == PRESETS[preset].family
    again = configs.read(json.loads(theirs.to_json_string()))  # in the style of transformers 5
    assert configs._plain(again) == configs._plain(PRESETS[preset])


def expected(config: ModelConfig, layout: list[names.Entry]) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor of a folder, from those of our parameters."""
    ours = shapes(config)
    found: dict[str, list[tuple[names.Entry, tuple[int, ...]]]] = defaultdict(list)
    for entry in layout:
        lead = entry.path.startswith("layers/") + entry.experts
        for name in names.tensors(entry, config):
            found[name].append((entry, ours[entry.path][lead:]))
    return {name: shape(config, held) for name, held in found.items()}


def shape(config: ModelConfig, held: list[tuple[names.Entry, tuple[int, ...]]]) -> tuple[int, ...]:
    entry, ours = held[0]
    if entry.path in ("embed/kernel", "head/kernel"):
        return ours
    stacked = (config.experts.number,) if entry.experts and config.experts and "{expert}" not in entry.name else ()
    outputs = sum(math.prod(shape[entry.contract :]) for _, shape in held)
    if entry.contract == 0:
        return (*stacked, outputs)
    inputs = math.prod(ours[: entry.contract])
    return (*stacked, outputs, inputs) if entry.flip else (*stacked, inputs, outputs)


def on_disk(model: "transformers.PreTrainedModel", folder: Path, **options: bool) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors that a model is saved as."""
    model.save_pretrained(folder, **options)
    header = (folder / "model.safetensors").read_bytes()
    length = int.from_bytes(header[:8], "little")
    tensors = json.loads(header[8 : 8 + length])
    return {name: tuple(tensor["shape"]) for name, tensor in tensors.items() if name != "__metadata__"}


@settings(max_examples=30, deadline=None)
@given(any_decoders)
def test_every_tensor_of_a_saved_model_is_known(tmp_path_factory, config):
    folder = tmp_path_factory.mktemp("folder")
    model = transformers.AutoModelForCausalLM.from_config(opened(config, folder))
    saved = on_disk(model, folder)
    assert saved == expected(config, names.entries(config))
    again = configs.read(json.loads((folder / "config.json").read_text()))
    assert configs._plain(again) == configs._plain(config)
    in_memory = on_disk(model, folder, save_original_format=False)
    assert in_memory == expected(config, names.entries(config, in_memory))


def test_the_decoder_of_a_model_that_sees_images_is_found(tmp_path):
    text = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2, "head_dim": 8}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    wrapper = transformers.Gemma3Config(
        text_config={**text, "num_attention_heads": 4, "num_key_value_heads": 2},
        vision_config={**vision, "model_type": "siglip_vision_model", "image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4,
    )
    model = transformers.Gemma3ForConditionalGeneration(wrapper)
    for original in (True, False):
        saved = on_disk(model, tmp_path, save_original_format=original)
        config = configs.read(json.loads((tmp_path / "config.json").read_text()))
        found = expected(config, names.entries(config, saved))
        assert found.items() <= saved.items()
        repeats = {entry.name for entry in names.duplicates(config, saved)}
        assert all(names.is_left_out(name) for name in saved.keys() - found.keys() - repeats)


def test_four_bits_are_the_numbers_of_transformers():
    draws = np.random.default_rng(0)
    blocks = draws.integers(0, 256, (2, 6, 3, 16), np.uint8)
    scales = draws.integers(100, 140, (2, 6, 3), np.uint8)
    theirs = convert_moe_packed_tensors(torch.from_numpy(blocks), torch.from_numpy(scales), dtype=torch.float32)
    np.testing.assert_array_equal(mxfp4(blocks, scales), theirs.numpy().swapaxes(-1, -2))
