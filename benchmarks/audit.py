"""How many short rows one core audits a second: exact duplicates, near-duplicates and leakage, alone and together.

Time is the processor time of all threads. Rows are synthetic: words by Zipf's law, every tenth row a copy, every tenth a
copy with one word changed. Signatures are compared with those of libraries for MinHash, in turns on the same texts,
where these are installed (`pip install datasketch rensa`).
"""

import importlib
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from benchmarks import SEED, measured
from benchmarks.data import seconds
from itjax.base.records import Conversation, Message
from itjax.data.duplicates import ExactDuplicates, NearDuplicates, shingles, words_of
from itjax.data.leakage import Leakage
from itjax.data.stages import Buckets, Example, Stage, address_of, run

ROWS, WORDS = 10_000, 60  # about 300 characters each
VOCABULARY, EXPONENT = 50_000, 1.1
ITEMS = 2_000  # of the evaluation
COMPARED = 1_000  # texts of which libraries make signatures
REPEATS, TURNS = 3, 3


def results() -> list[dict[str, Any]]:
    texts = draw(ROWS, seed=SEED)
    examples = [example(number, text) for number, text in enumerate(texts)]
    items = [(f"eval:{number}", text) for number, text in enumerate(draw(ITEMS, seed=SEED + 1))]
    leakage, exact, near = Leakage(items, coverage=0.5), ExactDuplicates("both"), NearDuplicates("both", 0.8)
    return [
        *(of_stages(stage.name, [stage], examples) for stage in (exact, near, leakage)),
        of_stages("all three", [leakage, exact, near], examples),
        on_disk(near, examples),
        *against_libraries(near, texts[:COMPARED]),
    ]


def of_stages(name: str, stages: list[Stage], examples: list[Example]) -> dict[str, Any]:
    speeds = [len(examples) / seconds(lambda: run(stages, examples)) for _ in range(REPEATS)]
    return measured(name, "examples/s/core", speeds, examples=len(examples), words=WORDS)


def on_disk(stage: NearDuplicates, examples: list[Example]) -> dict[str, Any]:
    """What waits on disk until all examples were seen."""
    with Buckets() as buckets:
        for one in examples:
            buckets.add(address_of(one), stage.marks(one))
        return measured(f"{stage.name}: disk", "bytes/example", [buckets.num_bytes / len(examples)], words=WORDS)


def against_libraries(stage: NearDuplicates, texts: list[str]) -> Iterator[dict[str, Any]]:
    """From a text to its signature of as many permutations, all in one thread."""
    for name, theirs in (("datasketch", by_datasketch), ("rensa", by_rensa)):
        if importlib.util.find_spec(name) is None:
            continue
        make = theirs(stage.bands * stage.rows)

        def ours() -> None:
            for text in texts:
                stage.signature(shingles(text, stage.words))

        def other(make: Callable[[list[str]], object] = make) -> None:
            for text in texts:
                words = words_of(text)
                make([" ".join(words[start : start + stage.words]) for start in range(len(words) - stage.words + 1)])

        ratios = [seconds(other) / seconds(ours) for _ in range(TURNS)]
        yield measured(f"signatures: speed over {name}", "ratio", ratios, texts=len(texts))


def by_datasketch(permutations: int) -> Callable[[list[str]], object]:
    minhash = importlib.import_module("datasketch").MinHash

    def make(stretches: list[str]) -> object:
        signature = minhash(num_perm=permutations)
        signature.update_batch([text.encode() for text in stretches])
        return signature.hashvalues

    return make


def by_rensa(permutations: int) -> Callable[[list[str]], object]:
    minhash = importlib.import_module("rensa").RMinHash

    def make(stretches: list[str]) -> object:
        signature = minhash(num_perm=permutations, seed=SEED)
        signature.update(stretches)
        return signature.digest()

    return make


def draw(num: int, *, seed: int) -> list[str]:
    rng = np.random.default_rng(seed)
    rates = 1 / np.arange(1, VOCABULARY + 1) ** EXPONENT
    rows = rng.choice(VOCABULARY, (num, WORDS), p=rates / rates.sum())
    rows[2::10] = rows[1::10][: len(rows[2::10])]
    rows[4::10] = rows[3::10][: len(rows[4::10])]
    rows[4::10, WORDS // 2] = VOCABULARY
    return [" ".join(f"word{word}" for word in row) for row in rows.tolist()]


def example(number: int, text: str) -> Example:
    middle = text.index(" ", len(text) // 2)
    turns = (Message("user", text[:middle]), Message("assistant", text[middle + 1 :]))
    return Example(number, "train", Conversation(turns, "rows", f"rows.jsonl:{number + 1}"))
