"""Our tokenizers beside the libraries that do their work, called directly on the same texts: speed, and text of 6 MB.

Ratios are their time over ours; both sides take turns in one run. On one thread the time is the processor's, on several
it is the clock's. Texts are real where the data folder lies beside the project, else words drawn from a seed.
"""

import io
import json
import os
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import sentencepiece
import tokenizers

from benchmarks import SEED, measured
from itjax.text.tokenizer import HuggingFace, SentencePiece, Tokenizer, train

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
TURNS = 21
VOCABULARY = 8192
TEXTS = 1_200
LONG = 6_000_000
THREADS = os.cpu_count() or 1


def results() -> list[dict[str, Any]]:
    texts = list(real_texts() if DATA.is_dir() else drawn_texts())[:TEXTS]
    facts = {"texts": len(texts), "characters": sum(map(len, texts)), "real": DATA.is_dir()}
    found = [result for name, kind in KINDS.items() for result in of_kind(name, kind(texts), texts, facts)]
    own = SentencePiece(train(texts, size=VOCABULARY, controls=()))
    sizes = [LONG // 4, LONG // 2, LONG]
    long = {size: (" ".join(texts) * (1 + size // facts["characters"]))[:size] for size in sizes}
    taken = {size: [seconds(lambda size=size: own.encode(long[size]))] for size in sizes}
    lines = [measured(f"one text of {size / 1e6:g} M characters", "s", times) for size, times in taken.items()]
    return found + lines


def of_kind(name: str, pair: "Pair", texts: list[str], facts: dict[str, Any]) -> list[dict[str, Any]]:
    ours, theirs = pair
    lines = []
    for threads in sorted({1, THREADS}):
        assert ours.encode_many(texts, threads=threads) == theirs(texts, threads)  # and both are warm
        took = [turn(ours, theirs, texts, threads) for _ in range(TURNS)]
        what = f"{name}, {threads} thread{'s' if threads > 1 else ''}"
        lines += [
            measured(f"{what}: speed over the library's own", "ratio", [their / our for our, their in took], **facts),
            measured(what, "Mcharacters/s", [facts["characters"] / our / 1e6 for our, _ in took], **facts),
        ]
    return lines


def turn(ours: Tokenizer, theirs: "Library", texts: list[str], threads: int) -> tuple[float, float]:
    """Seconds of one side and of the other."""
    our = timed(lambda: ours.encode_many(texts, threads=threads), threads)
    return our, timed(lambda: theirs(texts, threads), threads)


Library = Callable[[list[str], int], list[list[int]]]
Pair = tuple[Tokenizer, Library]


def own_model(texts: Sequence[str]) -> Pair:
    return with_library(train(texts, size=VOCABULARY, controls=("<|im_start|>", "<|im_end|>")))


def unigram(texts: Sequence[str]) -> Pair:
    """As SentencePiece trains it: NFKC, and control tokens among the pieces that it finds in any text."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(line for text in texts for line in text.split("\n") if line),
        model_writer=model,
        vocab_size=VOCABULARY,
        hard_vocab_limit=False,
        user_defined_symbols=["<start_of_turn>", "<end_of_turn>"],
        num_threads=1,
        minloglevel=2,
    )
    return with_library(model.getvalue())


def with_library(model: bytes) -> Pair:
    library = sentencepiece.SentencePieceProcessor(model_proto=model)
    return SentencePiece(model), lambda texts, threads: library.encode(texts, num_threads=threads)


def byte_level(texts: Sequence[str]) -> Pair:
    library = tokenizers.Tokenizer(tokenizers.models.BPE())
    library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|im_start|>", "<|im_end|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    library.train_from_iterator(texts, trainer)
    ours = HuggingFace(library.to_str().encode(), {"eos_token": "<|im_end|>"})

    def encode(texts: list[str], threads: int) -> list[list[int]]:
        with parallel(threads > 1):
            return [row.ids for row in library.encode_batch_fast(texts, add_special_tokens=False)]

    return ours, encode


KINDS: dict[str, Callable[[Sequence[str]], Pair]] = {
    "SentencePiece, our own model": own_model,
    "SentencePiece, unigram": unigram,
    "tokenizer.json, byte level": byte_level,
}


@contextmanager
def parallel(on: bool) -> Iterator[None]:
    """What the tokenizers library does with its threads."""
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "true" if on else "false"
    yield
    if before is None:
        del os.environ["TOKENIZERS_PARALLELISM"]
    else:
        os.environ["TOKENIZERS_PARALLELISM"] = before


def real_texts() -> Iterator[str]:
    """Questions and their solutions, and messages of people."""
    questions = (DATA / "gsm8k" / "train.jsonl").read_text().splitlines()[:600]
    yield from (text for line in questions for text in json.loads(line).values() if isinstance(text, str))
    for line in (DATA / "oasst" / "en_100_tree.jsonl").read_text().splitlines():
        yield from messages(json.loads(line)["prompt"])


def messages(message: dict[str, Any]) -> Iterator[str]:
    yield message["text"]
    for reply in message.get("replies", ()):
        yield from messages(reply)


def drawn_texts() -> Iterator[str]:
    rng = random.Random(SEED)
    words = ["".join(rng.choices("etaoinshrdlu", k=rng.randint(1, 9))) for _ in range(5_000)]
    for _ in range(TEXTS):
        yield " ".join(rng.choices(words, k=rng.randint(5, 120))) + ", 12.50.\n"


def timed(work: Callable[[], object], threads: int) -> float:
    clock = time.process_time if threads == 1 else time.perf_counter
    before = clock()
    work()
    return clock() - before


def seconds(work: Callable[[], object]) -> float:
    return timed(work, 1)
