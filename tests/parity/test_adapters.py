"""Adapters are those of PEFT: its folders out and in, logits, and gradients, on tiny models of the transformers library."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from itjax.base import tree
from itjax.base.records import PackedBatch
from itjax.base.schema import Lora
from itjax.hub import adapters
from itjax.hub.folder import Folder
from itjax.models import lora as ours
from itjax.models.model import build

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
safetensors_numpy = pytest.importorskip("safetensors.numpy")
torch.set_num_threads(1)

pytestmark = pytest.mark.filterwarnings("ignore")  # of torch and PEFT

SMALL = {
    "vocab_size": 48, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
MOE = {"num_experts_per_tok": 2}
FAMILIES = {
    "llama": ("LlamaConfig", {"tie_word_embeddings": True}),
    "qwen2": ("Qwen2Config", {}),
    "phi3": ("Phi3Config", {}),
    "gemma3_text": ("Gemma3TextConfig", {"sliding_window": 8}),
}
EXPERTS = {
    "mixtral": ("MixtralConfig", MOE | {"num_local_experts": 3}),
    "qwen3_moe": ("Qwen3MoeConfig", MOE | {"num_experts": 3, "moe_intermediate_size": 24}),
    "gpt_oss": ("GptOssConfig", MOE | {"num_local_experts": 3}),
}
KINDS = {
    "plain": Lora(rank=3, alpha=6.0),
    "rank_stabilised": Lora(rank=3, alpha=6.0, rank_stabilized=True),
    "dora": Lora(rank=3, alpha=6.0, dora=True),
}
TOKENS = np.random.default_rng(0).integers(3, 48, (2, 11)).astype(np.int32)
MIX = np.random.default_rng(1).normal(size=(2, 11, 48)).astype(np.float32)


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """A tiny model of a family: the folder that transformers wrote, and its parameters in our tree."""

    @functools.cache
    def make(family):
        kind, more = {**FAMILIES, **EXPERTS}[family]
        folder = tmp_path_factory.mktemp(family)
        torch.manual_seed(0)
        config = getattr(transformers, kind)(**{**SMALL, **more})
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        opened = Folder.open(folder)
        like = build(opened.config, dtype="float32", attention="auto", remat="none").abstract
        return folder, opened.config, opened.load(like)

    return make


def theirs(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)


def batch():
    B, T = TOKENS.shape
    positions = np.tile(np.arange(T, dtype=np.int32), (B, 1))
    ones = np.ones((B, T), np.int32)
    return PackedBatch(TOKENS, TOKENS, ones, positions, np.ones((B, T), np.float32), ones * 0)


@functools.cache
def network(config, lora):
    """(model, what gives its logits)"""
    model = build(config, dtype="float32", attention="auto", remat="none", lora=lora)
    return model, jax.jit(lambda params: model.unembed(params, model.features(params, batch()).x_BTD))


def logits(config, lora, params):
    return network(config, lora)[1](params)


def their_logits(model):
    return model(input_ids=torch.tensor(TOKENS).long()).logits


def adapted(config, lora, params):
    """The base with adapters as they are after some steps: DoRA's lengths are near those of the base."""
    model, _ = network(config, lora)
    rng, base = np.random.default_rng(2), tree.flatten(params)
    drawn = {
        path: jnp.asarray(0.2 * rng.normal(size=leaf.shape).astype(np.float32))
        for path, leaf in tree.flatten(model.abstract).items()
        if path not in base
    }
    flat = tree.flatten(ours.begin(tree.unflatten(base | drawn), lora))
    return tree.unflatten(
        {path: leaf + drawn[path] if path.endswith("lora_m") else leaf for path, leaf in flat.items()}
    )


def close(a, b, atol=1e-5):
    np.testing.assert_allclose(np.asarray(a), b.detach().numpy(), atol=atol, rtol=1e-5)


def written(tmp_path, params, lora, config, folder):
    adapters.write_peft(tmp_path, params, lora, config, base=str(folder))
    return peft.PeftModel.from_pretrained(theirs(folder), tmp_path)


CASES = [
    *((family, kind) for family in FAMILIES for kind in KINDS if family in ("llama", "phi3") or kind == "plain"),
    *((family, "plain") for family in EXPERTS),
]


@pytest.mark.parametrize("family, kind", CASES)
def test_peft_opens_our_folder_and_computes_the_same(base, tmp_path, family, kind):
    folder, config, params = base(family)
    whole = adapted(config, KINDS[kind], params)
    expected = logits(config, KINDS[kind], whole)
    without = {path: leaf * 0 if path.endswith("lora_b") else leaf for path, leaf in tree.flatten(whole).items()}
    assert np.abs(expected - logits(config, KINDS[kind], tree.unflatten(without))).max() > 0.05
    close(expected, their_logits(written(tmp_path, whole, KINDS[kind], config, folder)))


@pytest.mark.parametrize(
    "family, kind", [("llama", "plain"), ("phi3", "plain"), ("phi3", "rank_stabilised"), ("phi3", "dora")]
)
def test_we_open_their_folder_and_compute_the_same(base, tmp_path, family, kind):
    """Of Phi-3, one A for queries, keys and values; and a pattern gives some modules another rank and scale."""
    folder, config, params = base(family)
    wanted = KINDS[kind]
    model = peft.get_peft_model(
        theirs(folder),
        peft.LoraConfig(
            r=4, lora_alpha=6, target_modules="all-linear", use_rslora=wanted.rank_stabilized, use_dora=wanted.dora,
            init_lora_weights=False, task_type="CAUSAL_LM", rank_pattern={"o_proj": 2}, alpha_pattern={"o_proj": 5},
        ),
    )  # fmt: skip
    model.save_pretrained(tmp_path)
    lora, leaves = adapters.read_peft(tmp_path, config)
    assert (lora.rank, lora.alpha, lora.targets) == (4, 6.0, ())
    whole = tree.unflatten(tree.flatten(params) | {path: jnp.asarray(leaf) for path, leaf in leaves.items()})
    close(logits(config, lora, whole), their_logits(model.eval()))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("at_first", [True, False])
def test_gradients_are_those_of_peft(base, tmp_path, kind, at_first):
    folder, config, params = base("llama")
    lora = KINDS[kind]
    whole = adapted(config, lora, params)
    if at_first:
        flat = tree.flatten(whole)
        zeros = {path: jnp.zeros_like(leaf) for path, leaf in flat.items() if path.endswith("lora_b")}
        whole = ours.begin(tree.unflatten(flat | zeros), lora)
    model = written(tmp_path, whole, lora, config, folder)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    (their_logits(model) * torch.tensor(MIX)).sum().backward()

    moving, frozen = ours.split(whole, ours.moving(whole, lora))

    def loss(moving):
        return (logits(config, lora, tree.unflatten(tree.flatten(moving) | tree.flatten(frozen))) * MIX).sum()

    gradients = jax.grad(loss)(moving)
    new = tmp_path / "gradients"
    new.mkdir()
    adapters.write_peft(new, gradients, lora, config, base="")
    named = safetensors_numpy.load_file(new / "adapter_model.safetensors")
    compared = 0
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            name = name.replace(".default", "").replace("magnitude_vector.weight", "magnitude_vector")
            close(named[name], parameter.grad, atol=2e-4)
            compared += 1
            if at_first and "lora_A" in name:
                assert not named[name].any()
    assert compared == len(named) > 20


def test_counts_are_those_of_peft(base, tmp_path):
    folder, config, params = base("llama")
    whole = adapted(config, KINDS["plain"], params)
    moving, _ = ours.split(whole, ours.moving(whole, KINDS["plain"]))
    model = written(tmp_path, whole, KINDS["plain"], config, folder)
    assert ours.num_parameters(moving) == sum(p.numel() for name, p in model.named_parameters() if "lora_" in name)


def test_embedding_and_norms_that_were_trained_travel_too(base, tmp_path):
    folder, config, params = base("llama")
    lora = dataclasses.replace(KINDS["plain"], targets=("layers/attn/q",), also=("embed/*", "*norm*"))
    flat = tree.flatten(adapted(config, lora, params))
    for path in flat:
        if ours.tree.matches(path, lora.also):
            flat[path] = flat[path] * 1.3
    whole = tree.unflatten(flat)
    close(logits(config, lora, whole), their_logits(written(tmp_path, whole, lora, config, folder)))
    read, leaves = adapters.read_peft(tmp_path, config)
    assert read.targets == ("layers/attn/q",)
    for path in ("embed/kernel", "final_norm/scale", "layers/attn_norm/scale", "layers/attn/q/lora_b"):
        np.testing.assert_array_equal(leaves[path], flat[path])
    assert json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"] == ["q_proj"]
