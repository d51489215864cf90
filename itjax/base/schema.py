"""A whole run as frozen data: every setting, its type, its default and its bounds, in one place.

Settings read as in a config file: `optimizer.learning_rate`, `parallel.fsdp`, `sources.alpaca.weight`.
A field that may be None has no fixed default: what happens then stands beside it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


def bounded(default: Any, **bounds: Any) -> Any:
    """A field with bounds that `freeze` checks: at_least, above, at_most, below, choices."""
    return field(default=default, metadata=bounds)


REDUCTIONS = ("token", "example", "source")
TRUNCATIONS = ("drop", "keep_start", "keep_end", "middle_out", "proportional", "drop_oldest_turns", "error")
LEARN = ("all", "last", "flag")
BAD_ROWS = ("error", "skip")
UNITS = ("examples", "tokens", "trained_tokens")
RATES = ("proportional", "equal", "unimax")
EXHAUSTED = ("repeat", "stop", "drop")
SCHEDULES = ("constant", "linear", "cosine", "wsd", "inverse_sqrt")
OPTIMIZERS = ("adamw", "adafactor", "lion", "muon", "schedule_free_adamw")
MOMENTS = ("float32", "bfloat16", "int8")
REMAT = ("none", "dots", "narrow", "attention", "full", "offload")
BASES = ("auto", "float32", "bfloat16", "int8", "nf4")


@dataclass(frozen=True)
class Stage:
    """Other weights from an optimizer step on: a curriculum is a few of these."""

    start: int = bounded(0, at_least=0)  # the first step (from 0) that these weights are for
    weights: Mapping[str, float] = field(default_factory=dict)  # source -> weight; 0: not drawn; not named: its own


@dataclass(frozen=True)
class Mixture:
    """How often each source comes. An explicit `weight` of a source stands; `rates` divides the rest.

    A size is a source's number of examples, tokens or trained tokens: `unit`. `exhausted` is said by the outermost
    mixture for all.
    """

    unit: str = bounded("examples", choices=UNITS)  # what weights and rates are shares of
    rates: str = bounded("proportional", choices=RATES)  # of sources without a weight
    cap: float | None = bounded(None, above=0)  # K: a larger source counts as this large
    temperature: float = bounded(1.0, above=0)  # T: size^(1/T); above 1 lifts small sources
    budget: float | None = bounded(None, above=0)  # UniMax: how much is drawn in all, in `unit`
    max_epochs: float = bounded(4.0, above=0)  # UniMax: passes over a source at most
    exhausted: str = bounded("repeat", choices=EXHAUSTED)  # when a source has had its own `max_epochs`
    stages: Mapping[str, Stage] = field(default_factory=dict)  # name -> stage, in the order of their starts


@dataclass(frozen=True)
class Source:
    """Where rows come from: files on disk, an embedded task family, or a mixture of further sources."""

    files: str = ""  # globs, separated by commas
    task: str = ""  # an embedded family: "triage", "arithmetic", "functions", "support"
    sources: Mapping[str, "Source"] = field(default_factory=dict)  # a nested mixture, weighted by `mixture`
    mixture: Mixture = field(default_factory=Mixture)  # of the nested sources, or of several files
    examples: int = bounded(0, at_least=0)  # how many rows: of an embedded family; of files at most (0: all)
    weight: float | None = bounded(None, above=0)  # share, in the mixture's unit; None: the mixture's rates decide
    scale: float = bounded(1.0, above=0)  # counts as so many times its size where rates go by size, before the cap
    held_out: bool = False  # never trained on: a whole task, or an evaluation, whose loss is followed
    max_epochs: float | None = bounded(None, above=0)  # passes at most; None: as many as it takes

    # what a row's fields mean
    shape: str = "auto"  # messages, instruction, prompt, sharegpt, transcript, text, oasst, ...: docs/files.md
    columns: Mapping[str, str] = field(default_factory=dict)  # field -> column of the file that holds it

    # how rows are asked
    kind: str = ""  # a kind of task of the library: "qa", "classification", "translation", ...
    templates: str = ""  # files of one's own template family, instead of `kind`
    phrasings: str = "seen"  # which phrasings: "seen", "heldout", "all" or one name
    few_shot: int = bounded(0, at_least=0)  # worked examples before a question, at most
    inverted: float = bounded(0.0, at_least=0, at_most=1)  # share of examples whose answer is asked for its question


@dataclass(frozen=True)
class Filters:
    """What is looked for in the data when it is audited, or filtered for training. See `Run.filters`."""

    duplicates_of: str = bounded("both", choices=("prompt", "response", "both"))  # what makes two rows the same
    similarity: float = bounded(0.8, above=0, at_most=1)  # Jaccard of word 5-grams from which rows are near-duplicates
    leakage_files: str = ""  # evaluation files that must not be trained on: globs, separated by commas
    coverage: float = bounded(0.5, at_least=0, at_most=1)  # leaked: more than this share is covered by shared 8-grams
    personal: str = bounded("mask", choices=("drop", "mask", "tag"))  # what becomes of personal data
    personal_kinds: tuple[str, ...] = ()  # "email", "phone", ...: docs/audit.md; empty: all but URLs
    personal_finder: str = ""  # module:function of one's own, text -> (start, stop, kind)s: for names and places
    toxic: str = bounded("drop", choices=("drop", "tag"))  # what becomes of toxic rows
    toxic_roles: tuple[str, ...] = ()  # whose turns are looked at, e.g. ("assistant",); empty: everybody's
    toxic_classifier: str = ""  # module:function of one's own, text -> score from 0 to 1
    toxic_threshold: float = bounded(0.5, at_least=0, at_most=1)  # score from which a turn is toxic
    word_lists: str = ""  # files of words that make a text toxic, one a line; globs, separated by commas
    min_words: int = bounded(1, at_least=0)  # of an answer
    max_words: int = bounded(0, at_least=0)  # of an answer; 0: any number
    max_repetition: float = bounded(0.5, at_least=0, at_most=1)  # share of an answer that repeats itself, at most
    languages: tuple[str, ...] = ()  # ISO 639-1 codes of the languages kept; empty: all
    actions: Mapping[str, str] = field(default_factory=dict)  # finding of the quality stage -> "drop" or "tag"


@dataclass(frozen=True)
class Architecture:
    """Numbers of the decoder. None: what the preset says."""

    layers: int | None = bounded(None, at_least=1)
    dim: int | None = bounded(None, at_least=1)
    heads: int | None = bounded(None, at_least=1)
    kv_heads: int | None = bounded(None, at_least=1)
    head_size: int | None = bounded(None, at_least=2)
    ffn: int | None = bounded(None, at_least=1)
    vocab: int | None = bounded(None, at_least=1)  # None: the tokenizer's size, rounded up
    rope_theta: float | None = bounded(None, above=0)
    tie_embeddings: bool | None = None
    experts: int | None = bounded(None, at_least=1)  # of a preset that has experts
    experts_per_token: int | None = bounded(None, at_least=1)


@dataclass(frozen=True)
class Loss:
    reduction: str = bounded("token", choices=REDUCTIONS)  # what the weights add up to: contracts, "The loss"
    prompt_weight: float = bounded(0.0, at_least=0, at_most=1)  # weight of what is not to be emitted
    z_loss: float = bounded(0.0, at_least=0)  # coefficient of log(Z)^2
    chunk: int = bounded(1024, at_least=1)  # tokens whose logits exist at one time
    router_balance: float = bounded(
        0.001, at_least=0
    )  # coefficient of the experts' balance loss, where there are experts
    router_z: float = bounded(0.0, at_least=0)  # coefficient of the router's log(Z)^2


@dataclass(frozen=True)
class Optimizer:
    """How gradients move parameters; docs/optimizers.md says which kind is for what."""

    kind: str = bounded("adamw", choices=OPTIMIZERS)
    learning_rate: float = bounded(2e-5, above=0)  # the peak
    schedule: str = bounded("cosine", choices=SCHEDULES)
    warmup: float = bounded(0.03, at_least=0, at_most=1)  # share of all steps
    decay: float = bounded(
        0.1, at_least=0, at_most=1
    )  # wsd: share of all steps, the last ones, on which the rate falls
    final: float = bounded(0.0, at_least=0, at_most=1)  # last learning rate, as a share of the peak
    b1: float = bounded(0.9, at_least=0, below=1)
    b2: float = bounded(0.95, at_least=0, below=1)
    eps: float = bounded(1e-8, above=0)
    moments: str = bounded("float32", choices=MOMENTS)  # how adamw keeps its two: 8, 4 or 2 bytes per parameter
    offload: bool = False  # moments lie in the host's memory between steps, and come to the device for the update
    momentum: float = bounded(0.95, at_least=0, below=1)  # muon: of the kernels
    rest: float = bounded(
        1.0, above=0
    )  # muon: times learning_rate, for what is no kernel of a layer and moves by AdamW
    rates: Mapping[str, float] = field(default_factory=dict)  # pattern of parameters -> times learning_rate
    layer_decay: float = bounded(1.0, above=0, at_most=1)  # each layer moves so much as the one above it
    weight_decay: float = bounded(0.0, at_least=0)
    no_decay: tuple[str, ...] = ("*norm*", "embed*", "*bias", "*sinks", "*lora_m")  # patterns that never decay
    decays: Mapping[str, float] = field(default_factory=dict)  # pattern -> its own weight decay, before the two above
    clip_norm: float = bounded(1.0, at_least=0)  # global norm of the gradient; 0: no clipping
    average: float = bounded(
        0.0, at_least=0, below=1
    )  # decay of a running mean that is evaluated and exported; 0: none
    max_skips: int = bounded(3, at_least=0)  # steps in a row left out for a non-finite gradient before the run aborts


@dataclass(frozen=True)
class Lora:
    """Low-rank adapters: the base stays as it is, and every adapted kernel W acts as W + scale·A·B.

    Sources: Hu et al. 2021, https://arxiv.org/abs/2106.09685; Kalajdzievski 2023 (rank-stabilised),
    https://arxiv.org/abs/2312.03732; Liu et al. 2024 (DoRA), https://arxiv.org/abs/2402.09353
    """

    adapter: str = ""  # a PEFT folder to start from, which then decides rank, alpha, targets and the like
    rank: int = bounded(0, at_least=0)  # 0: no adapters, all parameters are trained
    alpha: float = bounded(32.0, above=0)  # scale = alpha / rank
    dropout: float = bounded(0.0, at_least=0, below=1)  # of what A reads
    targets: tuple[
        str, ...
    ] = ()  # patterns of the layers adapted: "layers/attn/*"; empty: all linear ones but the head
    rank_stabilized: bool = False  # scale = alpha / sqrt(rank)
    dora: bool = False  # the norm of each adapted column is a parameter of its own
    also: tuple[str, ...] = ()  # patterns of further parameters that are trained in full: "*norm*", "embed/*"
    learning_rate_multiplier: float = bounded(10.0, above=0)  # times optimizer.learning_rate
    base: str = bounded("auto", choices=BASES)  # how the base is kept; auto: in the dtype of activations


@dataclass(frozen=True)
class Parallel:
    """Sizes of the mesh axes; -1 takes what is left (one axis at most)."""

    data: int = bounded(-1, at_least=-1)
    fsdp: int = bounded(1, at_least=-1)
    expert: int = bounded(1, at_least=-1)
    context: int = bounded(1, at_least=-1)
    tensor: int = bounded(1, at_least=-1)
    capacity_factor: float | None = bounded(
        None, above=0
    )  # slots of an expert per row, times its even share; None: any
    flags: Mapping[str, str] = field(default_factory=dict)  # options of XLA for the train step: parallel/flags.py


@dataclass(frozen=True)
class Checkpoint:
    every: int = bounded(100, at_least=1)  # steps; the last step is always saved
    keep: int = bounded(2, at_least=1)
    asynchronous: bool = True


@dataclass(frozen=True)
class Evaluation:
    every: int = bounded(0, at_least=0)  # steps between held-out losses; 0: only at the end
    examples: int = bounded(32, at_least=0)  # held-out examples per source; 0: none
    fraction: float = bounded(0.2, above=0, below=1)  # at most this share of a source is held out
    generate: int = bounded(
        0, at_least=0
    )  # prompts per family and phrasing group answered and scored, before and after
    max_tokens: int = bounded(256, at_least=1)  # longest answer


@dataclass(frozen=True)
class Log:
    every: int = bounded(1, at_least=1)  # steps between lines of metrics.jsonl
    tensorboard: bool = True
    wandb: str = ""  # project name; empty: off
    progress: bool = True


@dataclass(frozen=True)
class Run:
    """One training run. `itjax.base.freeze` makes it from a config file and names the path of whatever is wrong."""

    run_dir: str = "runs/default"
    seed: int = bounded(0, at_least=0)
    steps: int = bounded(0, at_least=0)  # give steps or epochs; 0: the other decides
    epochs: float = bounded(0.0, at_least=0)
    allow_change: bool = False  # resume although settings or data that shape the result have changed

    # data
    data_dir: str = ""  # the folder, local or remote, that relative file names start from; empty: the working directory
    files: str = ""  # globs separated by commas; a source per file, beside `sources`
    eval_files: str = ""  # held-out data; empty: a few rows of each source are held out
    sources: Mapping[str, Source] = field(default_factory=dict)
    mixture: Mixture = field(default_factory=Mixture)  # of all sources
    bad_rows: str = bounded("error", choices=BAD_ROWS)  # rows that cannot be read or written in the format
    max_bad_rows: float = bounded(0.01, at_least=0, at_most=1)  # share of a source that may be skipped
    filters: tuple[str, ...] = ()  # stages of the audit that rows must pass to be trained on, in order
    audit: Filters = field(default_factory=Filters)  # what those stages look for
    tokenizer: str = "auto"  # a SentencePiece model; auto: made from the data
    vocab_size: int = bounded(8192, at_least=270)  # of an automatic tokenizer
    split_digits: bool = True  # of an automatic tokenizer: every digit a token of its own
    format: str = (
        "auto"  # chat format; auto: the model folder's own, else chatml where the tokenizer has its tokens, else plain
    )
    learn: str = bounded(
        "all", choices=LEARN
    )  # assistant turns that are learned: all, the last, or where a flag says so
    learn_separator: bool = False  # whether what follows a turn's terminator is learned with it, as TRL does
    reasoning: str = bounded(
        "", choices=("", "all", "last", "none")
    )  # turns that keep their reasoning; empty: as the format
    length: int = bounded(1024, at_least=2)  # positions in a row
    rows: int = bounded(8, at_least=1)  # rows in an optimizer step, all devices and micro-batches together
    accumulate: int = bounded(1, at_least=1)  # micro-batches in a step
    packing: bool = True
    truncation: str = bounded("drop", choices=TRUNCATIONS)  # of examples longer than `length`
    window: int = bounded(1000, at_least=1)  # rows' worth of examples that are packed together
    workers: int = bounded(0, at_least=0)  # processes that read ahead
    cache_dir: str = ""  # tokenised data; empty: the user's cache folder

    # model
    model: str = "tiny"  # a preset, or a folder with a published model's files
    new_tokens: tuple[
        str, ...
    ] = ()  # control tokens that the tokenizer of a model's folder is given; their rows: the mean
    lora: Lora = field(default_factory=Lora)
    architecture: Architecture = field(default_factory=Architecture)
    dtype: str = bounded(
        "auto", choices=("auto", "float32", "bfloat16")
    )  # of activations; auto: bfloat16 except on CPU
    attention: str = "auto"
    remat: str = bounded("none", choices=REMAT)  # what layers keep for the backward pass: models/remat.py

    loss: Loss = field(default_factory=Loss)
    optimizer: Optimizer = field(default_factory=Optimizer)
    parallel: Parallel = field(default_factory=Parallel)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    evaluation: Evaluation = field(default_factory=Evaluation)
    log: Log = field(default_factory=Log)
