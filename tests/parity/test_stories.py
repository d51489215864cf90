"""The folder made of a llama2.c model is a Llama to transformers: the same logits, and the published text."""

import json

import numpy as np
import pytest

from tests.models import llama2c

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def folder(shared_data):
    return shared_data / "stories260K"


@pytest.fixture(scope="module")
def theirs(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("stories")
    llama2c.convert(folder / "stories260K.bin", folder / "tok512.model", out)
    transformers.logging.disable_progress_bar()
    opened, found = transformers.AutoModelForCausalLM.from_pretrained(
        out, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not any(found.values()), found
    assert isinstance(opened, transformers.LlamaForCausalLM)
    return opened.eval()


def test_its_logits_are_those_of_float64(theirs, folder):
    with np.load(folder / "reference_logits.npz") as reference, torch.no_grad():
        for number in range(3):
            logits_TV = theirs(torch.tensor(reference[f"ids_{number}"][None], dtype=torch.long)).logits[0]
            np.testing.assert_allclose(logits_TV, reference[f"logits_{number}"], rtol=0, atol=1e-4)


def test_its_greedy_tokens_are_the_published_ones(theirs, folder):
    expected = json.loads((folder / "reference.json").read_text())["greedy_token_ids"]
    prompt = torch.tensor([[llama2c.BOS]])
    ids = theirs.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=199, do_sample=False, pad_token_id=0
    )
    assert ids[0].tolist() == expected[:200]
