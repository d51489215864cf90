"""Where each of our parameters lies in a published folder: one table per family.

Ours are stacked: `layers/attn/q/kernel` leads with a dimension of layers, and that of an expert with one of experts behind
it. Theirs is a tensor per layer (and expert), of two dimensions (outputs, inputs).
"""

import fnmatch
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, replace

from itjax.models.config import ModelConfig


@dataclass(frozen=True)
class Entry:
    """One of our parameters and the tensors that hold it.

    `name` has the fields {layer} and {expert} where there is one tensor for each. What remains of our shape behind those
    dimensions is (inputs..., outputs...): the first `contract` of them are inputs.
    """

    path: str  # ours: "layers/attn/q/kernel"
    name: str  # theirs: "model.layers.{layer}.self_attn.q_proj.weight"
    contract: int = 0  # of a kernel: how many dimensions are inputs; 0: a vector or a table, which only takes our shape
    experts: bool = False  # ours leads, behind the layers, with experts; theirs too where `name` has no {expert}
    flip: bool = True  # theirs is (outputs, inputs)
    part: slice | None = None  # of their dimension of outputs, where one tensor holds several parameters
    packed: bool = False  # theirs are two tensors, `name`_blocks and `name`_scales: `hub.mxfp4` makes one of them


Table = Callable[[ModelConfig], Iterable[Entry]]  # names relative to a layer: "self_attn.q_proj.weight"


@dataclass(frozen=True)
class Layout:
    """One way to name the tensors of a family."""

    attention: Table
    mlp: Table
    trunk: str = "model."  # begins all names but the head's
    head: str = "lm_head.weight"


@dataclass(frozen=True)
class Family:
    """A model_type of config.json."""

    architecture: str  # the class that opens its folders
    layouts: tuple[Layout, ...]  # the first is written, all are read


def entries(config: ModelConfig, present: Collection[str] | None = None) -> list[Entry]:
    """Every parameter of the decoder and the tensors that hold it: as they are published or, where the names in a folder
    are given, in the layout of the family that most of them belong to."""
    if present is None:
        return layouts(config)[0]
    known = set(present)
    return max(layouts(config), key=lambda layout: sum(next(tensors(entry, config)) in known for entry in layout))


def layouts(config: ModelConfig) -> list[list[Entry]]:
    """The same in every layout of the family, the one that is written first."""
    return [list(_entries(config, layout)) for layout in FAMILIES[config.family].layouts]


def tensors(entry: Entry, config: ModelConfig) -> Iterator[str]:
    """The names of all tensors that hold the parameter, layers outermost."""
    ends = ("_blocks", "_scales") if entry.packed else ("",)
    for layer in range(config.layers if "{layer}" in entry.name else 1):
        for expert in range(config.experts.number if config.experts and "{expert}" in entry.name else 1):
            yield from (entry.name.format(layer=layer, expert=expert) + end for end in ends)


def duplicates(config: ModelConfig, present: Collection[str] | None = None) -> list[Entry]:
    """Tensors that a folder may hold although another holds the same: the head of a model whose embedding is its head."""
    if not config.tie_embeddings:
        return []
    chosen = entries(replace(config, tie_embeddings=False), present)
    return [replace(entry, path="embed/kernel") for entry in chosen if entry.path == "head/kernel"]


def is_left_out(name: str) -> bool:
    """Whether a tensor of a published folder is no parameter of the decoder, and is rightly left aside."""
    return any(fnmatch.fnmatchcase(name, pattern) for patterns in LEFT_OUT.values() for pattern in patterns)


LEFT_OUT = {  # why -> names
    "rotary frequencies, which config.json says": ("*.rotary_emb.inv_freq",),
    "images, which text alone does not need": (
        "vision_tower.*", "model.vision_tower.*", "multi_modal_projector.*", "model.multi_modal_projector.*",
    ),
}  # fmt: skip


def _entries(config: ModelConfig, layout: Layout) -> Iterator[Entry]:
    yield Entry("embed/kernel", f"{layout.trunk}embed_tokens.weight")
    for entry in (*layout.attention(config), *_norms(config), *layout.mlp(config)):
        yield replace(entry, path=f"layers/{entry.path}", name=f"{layout.trunk}layers.{{layer}}.{entry.name}")
    yield Entry("final_norm/scale", f"{layout.trunk}norm.weight")
    if not config.tie_embeddings:
        yield Entry("head/kernel", layout.head)


# --- norms ------------------------------------------------------------------------------------------------------------

NORMS = {  # what is normed -> ours: theirs
    "pre": {"attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"},
    "post": {"attn_post_norm": "post_attention_layernorm", "mlp_post_norm": "post_feedforward_layernorm"},
    "both": {
        "attn_norm": "input_layernorm",
        "attn_post_norm": "post_attention_layernorm",
        "mlp_norm": "pre_feedforward_layernorm",
        "mlp_post_norm": "post_feedforward_layernorm",
    },
}


def _norms(config: ModelConfig) -> Iterator[Entry]:
    for ours, theirs in NORMS[config.norms].items():
        yield Entry(f"{ours}/scale", f"{theirs}.weight")
    if config.qk_norm != "none":
        yield Entry("attn/q_norm/scale", "self_attn.q_norm.weight")
        yield Entry("attn/k_norm/scale", "self_attn.k_norm.weight")
    if config.sinks:
        yield Entry("attn/sinks", "self_attn.sinks")


# --- attention --------------------------------------------------------------------------------------------------------


def _linear(ours: str, theirs: str, *, contract: int = 1, bias: bool) -> Iterator[Entry]:
    yield Entry(f"{ours}/kernel", f"{theirs}.weight", contract=contract)
    if bias:
        yield Entry(f"{ours}/bias", f"{theirs}.bias")


def _attention(config: ModelConfig) -> Iterator[Entry]:
    for name in ("q", "k", "v"):
        yield from _linear(f"attn/{name}", f"self_attn.{name}_proj", bias=config.qkv_bias)
    yield from _linear("attn/o", "self_attn.o_proj", contract=2, bias=config.out_bias)


def _fused_attention(config: ModelConfig) -> Iterator[Entry]:
    """Queries, keys and values one after the other in one tensor."""
    start = 0
    for name, heads in (("q", config.heads), ("k", config.kv_heads), ("v", config.kv_heads)):
        part = slice(start, start + heads * config.head_size)
        yield Entry(f"attn/{name}/kernel", "self_attn.qkv_proj.weight", contract=1, part=part)
        start = part.stop
    yield from _linear("attn/o", "self_attn.o_proj", contract=2, bias=False)


# --- feed-forward -----------------------------------------------------------------------------------------------------


def _mlp(config: ModelConfig) -> Iterator[Entry]:
    for name in ("gate", "up", "down"):
        yield from _linear(f"mlp/{name}", f"mlp.{name}_proj", bias=config.mlp_bias)


def _fused_mlp(config: ModelConfig) -> Iterator[Entry]:
    """Gate and up one after the other in one tensor."""
    for name, part in _halves(config).items():
        yield Entry(f"mlp/{name}/kernel", "mlp.gate_up_proj.weight", contract=1, part=part)
    yield from _linear("mlp/down", "mlp.down_proj", bias=False)


def _halves(config: ModelConfig) -> dict[str, slice]:
    return {"gate": slice(0, config.ffn), "up": slice(config.ffn, 2 * config.ffn)}


def _expert(ours: str, theirs: str) -> Entry:
    return Entry(f"mlp/{ours}/kernel", theirs, contract=1, experts=True)


def _mixtral_mlp(config: ModelConfig) -> Iterator[Entry]:
    yield Entry("mlp/router/kernel", "block_sparse_moe.gate.weight", contract=1)
    for ours, theirs in (("gate", "w1"), ("up", "w3"), ("down", "w2")):
        yield _expert(ours, f"block_sparse_moe.experts.{{expert}}.{theirs}.weight")


def _qwen3_moe_mlp(config: ModelConfig) -> Iterator[Entry]:
    yield Entry("mlp/router/kernel", "mlp.gate.weight", contract=1)
    for name in ("gate", "up", "down"):
        yield _expert(name, f"mlp.experts.{{expert}}.{name}_proj.weight")


def _stacked_mlp(config: ModelConfig) -> Iterator[Entry]:
    """All experts in one tensor, as transformers 5 holds and, where it is asked to, saves them."""
    yield Entry("mlp/router/kernel", "mlp.gate.weight", contract=1)
    for name, part in _halves(config).items():
        yield replace(_expert(name, "mlp.experts.gate_up_proj"), part=part)
    yield _expert("down", "mlp.experts.down_proj")


def _gpt_oss_mlp(config: ModelConfig, *, packed: bool) -> Iterator[Entry]:
    """All experts in one tensor, gate and up in turns. Full numbers are (inputs, outputs), packed ones the other way."""
    yield from _linear("mlp/router", "mlp.router", bias=True)
    for ours, theirs, part in (
        ("gate", "gate_up_proj", slice(0, None, 2)),
        ("up", "gate_up_proj", slice(1, None, 2)),
        ("down", "down_proj", None),
    ):
        yield replace(_expert(ours, f"mlp.experts.{theirs}"), flip=packed, part=part, packed=packed)
        yield Entry(f"mlp/{ours}/bias", f"mlp.experts.{theirs}_bias", experts=True, part=part)


def _gpt_oss_full_mlp(config: ModelConfig) -> Iterator[Entry]:
    return _gpt_oss_mlp(config, packed=False)


def _gpt_oss_packed_mlp(config: ModelConfig) -> Iterator[Entry]:
    return _gpt_oss_mlp(config, packed=True)


# --- families ---------------------------------------------------------------------------------------------------------

PLAIN = Layout(_attention, _mlp)
STACKED = Layout(_attention, _stacked_mlp)

FAMILIES: dict[str, Family] = {
    "llama": Family("LlamaForCausalLM", (PLAIN,)),
    "mistral": Family("MistralForCausalLM", (PLAIN,)),
    "mixtral": Family("MixtralForCausalLM", (Layout(_attention, _mixtral_mlp), STACKED)),
    "qwen2": Family("Qwen2ForCausalLM", (PLAIN,)),
    "qwen3": Family("Qwen3ForCausalLM", (PLAIN,)),
    "qwen3_moe": Family("Qwen3MoeForCausalLM", (Layout(_attention, _qwen3_moe_mlp), STACKED)),
    "gemma2": Family("Gemma2ForCausalLM", (PLAIN,)),
    "gemma3_text": Family(
        "Gemma3ForCausalLM",
        (  # the others are those of folders that see images too
            PLAIN,
            replace(PLAIN, trunk="language_model.model.", head="language_model.lm_head.weight"),
            replace(PLAIN, trunk="model.language_model."),
        ),
    ),
    "phi3": Family("Phi3ForCausalLM", (Layout(_fused_attention, _fused_mlp),)),
    "olmo2": Family("Olmo2ForCausalLM", (PLAIN,)),
    "smollm3": Family("SmolLM3ForCausalLM", (PLAIN,)),
    "gpt_oss": Family(
        "GptOssForCausalLM", (Layout(_attention, _gpt_oss_full_mlp), Layout(_attention, _gpt_oss_packed_mlp))
    ),
}
