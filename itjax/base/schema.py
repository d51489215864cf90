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
TRUNCATIONS = ("drop", "keep_start", "keep_end", "error")
SCHEDULES = ("constant", "linear", "cosine")
REMAT = ("none", "dots", "full")


@dataclass(frozen=True)
class Source:
    """Where rows come from: files on disk, or an embedded task family."""

    files: str = ""  # globs, separated by commas
    task: str = ""  # an embedded family: "triage", "arithmetic", "functions", "support"
    examples: int = bounded(0, at_least=0)  # how many rows to draw from an embedded family
    phrasings: str = "seen"  # which phrasings of an embedded family: "seen", "heldout", "all" or one name
    weight: float | None = bounded(None, above=0)  # share of examples; None: proportional to the number of rows


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


@dataclass(frozen=True)
class Loss:
    reduction: str = bounded("token", choices=REDUCTIONS)  # what the weights add up to: contracts, "The loss"
    prompt_weight: float = bounded(0.0, at_least=0, at_most=1)  # weight of what is not to be emitted
    z_loss: float = bounded(0.0, at_least=0)  # coefficient of log(Z)^2
    chunk: int = bounded(1024, at_least=1)  # tokens whose logits exist at one time


@dataclass(frozen=True)
class Optimizer:
    learning_rate: float = bounded(2e-5, above=0)  # the peak
    schedule: str = bounded("cosine", choices=SCHEDULES)
    warmup: float = bounded(0.03, at_least=0, at_most=1)  # share of all steps
    final: float = bounded(0.0, at_least=0, at_most=1)  # last learning rate, as a share of the peak
    b1: float = bounded(0.9, at_least=0, below=1)
    b2: float = bounded(0.95, at_least=0, below=1)
    eps: float = bounded(1e-8, above=0)
    weight_decay: float = bounded(0.0, at_least=0)
    no_decay: tuple[str, ...] = ("*norm*", "embed*")  # patterns of parameters that never decay
    clip_norm: float = bounded(1.0, at_least=0)  # global norm of the gradient; 0: no clipping
    max_skips: int = bounded(3, at_least=0)  # steps in a row left out for a non-finite gradient before the run aborts


@dataclass(frozen=True)
class Parallel:
    """Sizes of the mesh axes; -1 takes what is left (one axis at most)."""

    data: int = bounded(-1, at_least=-1)
    fsdp: int = bounded(1, at_least=-1)
    tensor: int = bounded(1, at_least=-1)


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
    files: str = ""  # globs separated by commas; a source per file, beside `sources`
    eval_files: str = ""  # held-out data; empty: a few rows of each source are held out
    sources: Mapping[str, Source] = field(default_factory=dict)
    tokenizer: str = "auto"  # a SentencePiece model; auto: made from the data
    vocab_size: int = bounded(8192, at_least=270)  # of an automatic tokenizer
    split_digits: bool = True  # of an automatic tokenizer: every digit a token of its own
    format: str = "auto"  # chat format; auto: chatml where the tokenizer has its tokens, else plain
    length: int = bounded(1024, at_least=2)  # positions in a row
    rows: int = bounded(8, at_least=1)  # rows in an optimizer step, all devices and micro-batches together
    accumulate: int = bounded(1, at_least=1)  # micro-batches in a step
    packing: bool = True
    truncation: str = bounded("drop", choices=TRUNCATIONS)  # of examples longer than `length`
    window: int = bounded(1000, at_least=1)  # rows' worth of examples that are packed together
    workers: int = bounded(0, at_least=0)  # processes that read ahead
    cache_dir: str = ""  # tokenised data; empty: the user's cache folder

    # model
    model: str = "tiny"  # a preset
    architecture: Architecture = field(default_factory=Architecture)
    dtype: str = bounded(
        "auto", choices=("auto", "float32", "bfloat16")
    )  # of activations; auto: bfloat16 except on CPU
    attention: str = "auto"
    remat: str = bounded("none", choices=REMAT)

    loss: Loss = field(default_factory=Loss)
    optimizer: Optimizer = field(default_factory=Optimizer)
    parallel: Parallel = field(default_factory=Parallel)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    evaluation: Evaluation = field(default_factory=Evaluation)
    log: Log = field(default_factory=Log)
