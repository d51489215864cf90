"""What decoders differ in: every switch with its meaning, and the default that Llama has.

A family is a set of values here (`families.py`), never a file of code. B rows, T positions, D width, N query heads, K
key/value heads, H head size, F feed-forward, V vocabulary, E experts, L layers.
"""

from dataclasses import dataclass

NORMS = ("pre", "post", "both")
QK_NORMS = ("none", "head", "all")
ACTIVATIONS = ("silu", "gelu_tanh", "swiglu_clamped")
ROPE_SCALINGS = ("none", "linear", "llama3", "yarn", "longrope")


@dataclass(frozen=True)
class Rope:
    """Rotary positions: how fast each pair of a head turns, and how that is stretched for long contexts."""

    theta: float = 1e4
    share: float = 1.0  # of a head's numbers that are turned, the first ones; the others stay as they are
    scaling: str = "none"  # one of ROPE_SCALINGS; the fields below are each for those named
    factor: float = 1.0  # linear, llama3, yarn, longrope: how many times longer the context became
    original_length: int = 0  # llama3, yarn, longrope: the context before it was stretched
    low: float = 1.0  # llama3: turns within the original context below which a pair is slowed by the whole factor
    high: float = 4.0  # llama3: and above which it is left alone
    beta_fast: float = 32.0  # yarn: the same two borders, of a ramp
    beta_slow: float = 1.0
    truncate: bool = True  # yarn: whether the ramp's borders are whole numbers of pairs
    attention_factor: float | None = None  # yarn, longrope: what cosine and sine are multiplied with; None: by formula
    mscale: float = 0.0  # yarn: of that formula; 0: not given
    mscale_all_dim: float = 0.0
    short: tuple[float, ...] = ()  # longrope: divisors of the frequencies in rows up to the original length
    long: tuple[float, ...] = ()  # longrope: and in longer rows


@dataclass(frozen=True)
class Layer:
    """What layers of one decoder may differ in. They all have the same parameters."""

    window: int = 0  # a position sees itself and this many less one before it; 0: everything before it
    rope: str = "global"  # "global", "local" (`ModelConfig.local_rope`) or "none"


@dataclass(frozen=True)
class Experts:
    """A mixture of experts in place of the feed-forward: each token goes to a few of many."""

    number: int  # E
    chosen: int  # experts per token
    renormalize: bool = True  # whether the chosen probabilities are made to add up to 1
    bias: bool = False  # of the router and of every expert (GPT-OSS)


@dataclass(frozen=True)
class ModelConfig:
    """The numbers and switches of a decoder."""

    vocab: int  # rows of the embedding
    layers: int
    dim: int
    heads: int
    kv_heads: int
    head_size: int
    ffn: int  # of one expert, where there are experts
    norm_eps: float
    tie_embeddings: bool
    rope: Rope = Rope()

    family: str = "llama"  # whose names and config a folder of it is written with: a key of `hub.names.FAMILIES`
    ids: int = 0  # ids from here on are rows that pad the vocabulary: they get no probability; 0: all rows are ids
    max_length: int = 0  # the longest context it was made for; 0: not known
    embed_scale: float = 1.0  # what embeddings are multiplied with before the first layer
    logit_softcap: float = 0.0  # c: logits become c·tanh(logits / c); 0: they stay

    norms: str = "pre"  # what of each branch is normed: its input, its output, or both
    norm_offset: float = 0.0  # a norm multiplies by this plus its scale (Gemma: 1)

    pattern: tuple[Layer, ...] = (Layer(),)  # layer l is pattern[l % len(pattern)]
    local_rope: Rope | None = None  # of the layers that say "local"
    qk_norm: str = "none"  # queries and keys are normed per head, over all heads together, or not
    qkv_bias: bool = False
    out_bias: bool = False
    query_scale: float | None = None  # what scores are multiplied with; None: H^-1/2
    attention_softcap: float = 0.0  # the same for attention's scores
    sinks: bool = False  # a learned score per head that takes probability and gives nothing (GPT-OSS)

    activation: str = "silu"  # of the gate; "swiglu_clamped" is GPT-OSS's
    mlp_bias: bool = False
    experts: Experts | None = None

    @property
    def real_ids(self) -> int:
        """How many ids have a probability."""
        return self.ids or self.vocab
