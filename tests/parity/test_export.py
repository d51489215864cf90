"""Folders that transformers writes come in and go out again, bit for bit; what is exported opens there with the same logits."""

import json

import numpy as np
import pytest

transformers = pytest.importorskip("transformers")
torch = pytest.importorskip("torch")

from itjax import export  # noqa: E402
from itjax.hub import configs, names, weights  # noqa: E402
from itjax.hub.folder import Folder  # noqa: E402
from itjax.models.model import build  # noqa: E402
from itjax.text import formats, tokenizer  # noqa: E402
from tests import test_export as runs  # noqa: E402

SHAPE = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
IDS = np.random.default_rng(0).integers(3, 90, (2, 24))


def theirs(place, *, shard="5GB", dtype=torch.float32, kind="llama", **fields):
    """A model of random numbers, as transformers saves it."""
    config = transformers.AutoConfig.for_model(kind, **{**SHAPE, **fields})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.1 + (0.5 if parameter.ndim == 1 else 0))
    model.save_pretrained(place, max_shard_size=shard)
    return model


def saved_again(opened: Folder, params, place, *, dtype, shard_bytes=10**9):
    place.mkdir()
    weights.save(place, params, names.entries(opened.config), dtype=dtype, shard_bytes=shard_bytes)
    fields = configs.write(opened.config, dtype=dtype, bos=1, eos=2, pad=0, length=64)
    (place / "config.json").write_text(json.dumps(fields))


@pytest.mark.parametrize(
    "kind, dtype, fields",
    [
        ("llama", "float32", {"tie_word_embeddings": False}),
        ("llama", "bfloat16", {"tie_word_embeddings": True}),
        ("phi3", "float32", {}),  # fused
        (
            "qwen3_moe",
            "float16",
            {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8},
        ),
    ],
)
def test_every_tensor_goes_in_and_out_bit_by_bit(tmp_path, kind, dtype, fields):
    model = theirs(tmp_path / "in", shard="20KB", dtype=getattr(torch, dtype), kind=kind, **fields)
    opened = Folder.open(tmp_path / "in")
    network = build(opened.config, dtype="float32", attention="auto", remat="none")
    params = opened.load(network.abstract)
    saved_again(opened, params, tmp_path / "out", dtype=dtype, shard_bytes=20_000)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=getattr(torch, dtype))
    before, after = model.state_dict(), again.state_dict()
    assert before.keys() == after.keys()
    for name in before:
        assert torch.equal(before[name], after[name]), name
    if dtype == "float32":
        with torch.no_grad():
            wanted = again(torch.tensor(IDS)).logits.numpy()
        np.testing.assert_allclose(export.reads(network, IDS.astype(np.int32))(params), wanted, atol=1e-4)


def test_an_exported_run_opens_in_transformers(tmp_path):
    """`tiny`, scaled embeddings and all: the same ids for a conversation, the same logits, the same end of an answer."""
    chatml = tokenizer.train(runs.TEXTS, size=300, controls=formats.CHATML_CONTROLS)
    runs.trained(tmp_path / "run", chatml)
    runs.exported(tmp_path / "run", tmp_path / "out", "--dtype=float32")
    restored = export.restored(runs.settings(tmp_path / "run", tmp_path / "out"))
    pieces = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    prompts = export.prompts_of(restored.format, restored.tokenizer)
    for messages, wanted in zip(export.QUESTIONS, prompts, strict=True):
        turns = [{"role": message.role, "content": message.content} for message in messages]
        assert pieces.apply_chat_template(turns, add_generation_prompt=True, return_dict=False) == wanted
        ours = export.reads(restored.model, np.array([wanted], np.int32))(restored.params)
        with torch.no_grad():
            logits = model(torch.tensor([wanted])).logits.numpy()
        np.testing.assert_allclose(np.asarray(ours)[..., : logits.shape[-1]], logits, atol=1e-4)
    assert set(model.generation_config.eos_token_id) == Folder.open(tmp_path / "out").stop_ids
