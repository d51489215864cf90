"""Evaluation items inside the training data, found exactly: an inverted index of every n-gram of the items.

Three questions, each with its own reason:

    covers an evaluation item                    more than `coverage` of an item's tokens lie in 8-grams that a user
                                                 turn shares with it (the method of Tulu 3, https://arxiv.org/abs/2411.15124)
    is a short evaluation item                   items under 8 tokens: a user turn is the same tokens and no others
    shares 13 tokens with an evaluation item     any 13-gram (GPT-3, https://arxiv.org/abs/2005.14165, appendix C): a tag

Paraphrases are not found by n-grams; `SemanticLeakage` compares vectors that the user brings.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from itjax.base.records import Finding
from itjax.data.duplicates import spaced
from itjax.data.sources import open_files
from itjax.data.stages import Example

VERSION = 2  # of what leaks; a new number makes all filtered data anew
COVERED, PHRASE = 8, 13  # tokens in a stretch
BLOCK = 512  # evaluation items read in one go
MOST = 100  # items of one evaluation set that one training example is reported for, the best first
TURNS = ("messages", "conversations", "conversation", "turns", "dialogue")  # fields, whatever their case
ASKS = ("instruction", "question", "prompt", "problem", "query", "goal", "input")
TEXTS = ("text", "sentence", "content")  # where nothing asks
TOKENS = re.compile(r'[\s,.?!:;()"\\-]')
SPREAD = np.uint64(0xD1342543DE82EF95)  # odd
COVERS = "covers an evaluation item"
IS_SHORT = "is a short evaluation item"
SHARES = f"shares {PHRASE} tokens with an evaluation item"
MEANS = "means nearly the same as an evaluation item"
Ask = Callable[[np.ndarray], Iterable[tuple[int, float]]]  # tokens of a turn -> items and their scores


def tokens_of(text: str) -> list[str]:
    """As published, where only blanks and line feeds are white space; here any is, for files come with tabs and `\\r\\n`.

    Scripts without spaces go by characters, or a whole sentence would be one token.
    """
    return [token for token in TOKENS.split(spaced(text.lower())) if token]


def set_of(key: str) -> str:
    """The evaluation set of an item: `path` of `path:line`."""
    return key.rpartition(":")[0] or key


# ---------------------------------------------------------------------------------------------- evaluation items


def evaluation_texts(
    patterns: str, *, columns: Mapping[str, str] | None = None, data_dir: str = "", cache_dir: Path | None = None
) -> Iterator[tuple[str, str]]:
    """`(key, text)` of every item of the evaluation files that comma-separated globs name; `Leakage` reads them once."""
    for source in open_files(patterns, columns=columns, data_dir=data_dir, cache_dir=cache_dir):
        for start in range(0, len(source), BLOCK):
            numbers = range(start, min(start + BLOCK, len(source)))
            yield from items_of(zip(map(source.key, numbers), source.rows(numbers), strict=True))


def items_of(rows: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, str]]:
    """`(key, text)` of every item from `(key, row)`, whatever the rows of an evaluation look like.

    What users say, where a row has turns; else what its instruction, question, prompt, ... ask, joined; else its text.
    Answers and passages to read are not looked at.
    """
    for key, row in rows:
        texts = prompts_of(row)
        if not texts:
            fields = f"fields {sorted(row)}" if isinstance(row, Mapping) else type(row).__name__
            raise ValueError(
                f"{key}: nothing in it asks anything ({fields}); name the field with the question `prompt`"
            )
        yield from ((key, text) for text in texts)


def prompts_of(row: Any) -> list[str]:
    """What one row of an evaluation asks; several turns are several texts."""
    if not isinstance(row, Mapping):
        return _turns(row)
    fields = {str(name).lower(): value for name, value in row.items()}
    if turns := [text for name in TURNS for text in _turns(fields.get(name))]:
        return turns
    asked = [texts for name in ASKS if (texts := _turns(fields.get(name)))]
    if any(len(texts) > 1 for texts in asked):
        return [text for texts in asked for text in texts]
    texts = [text for name in TEXTS for text in _turns(fields.get(name))]
    return ["\n".join(text for (text,) in asked)] if asked else texts[:1]


def _turns(value: Any) -> list[str]:
    """What users say in a text, a list of turns, or lists of such lists."""
    if isinstance(value, str):
        return [value] if value.strip() else []
    if isinstance(value, Sequence) and not isinstance(value, bytes):
        return [text for part in value for text in _turns(part)]
    if not isinstance(value, Mapping) or value.get("role", value.get("from", "user")) not in ("user", "human"):
        return []
    said = value.get("content", value.get("value", value.get("text")))
    return ["\n".join(_turns(said))] if _turns(said) else []


# ---------------------------------------------------------------------------------------------- the index


class Ngrams:
    """Where every n-gram of some token sequences stands: 16 bytes for each, found by bisection.

    A place is the number of the item in the upper half, the position in it in the lower: places sort by both.
    """

    def __init__(self, sequences: Iterable[np.ndarray], width: int) -> None:
        self.width = width
        hashes, places = [np.empty(0, np.uint64)], [np.empty(0, np.uint64)]
        for item, tokens_T in enumerate(sequences):
            hashes.append(ngrams(tokens_T, width))
            places.append(np.arange(len(hashes[-1]), dtype=np.uint64) + np.uint64(item << 32))
        hashes_N = np.concatenate(hashes)
        order = np.argsort(hashes_N, kind="stable")
        self._hashes_N, self._places_N = hashes_N[order], np.concatenate(places)[order]

    def hits(self, tokens_T: np.ndarray) -> np.ndarray:
        """The places of a text's n-grams, in their order; each n-gram is asked for once."""
        if not len(self._hashes_N):
            return self._places_N
        asked_S = np.unique(ngrams(tokens_T, self.width))
        starts_S = np.searchsorted(self._hashes_N, asked_S)
        found_S = self._hashes_N.take(starts_S, mode="clip") == asked_S
        if not found_S.any():
            return self._places_N[:0]
        asked_S, starts_S = asked_S[found_S], starts_S[found_S]
        counts_S = np.searchsorted(self._hashes_N, asked_S, side="right") - starts_S
        offsets_S = np.cumsum(counts_S) - counts_S
        places = np.arange(counts_S.sum()) + np.repeat(starts_S - offsets_S, counts_S)
        return np.sort(self._places_N[places])


def ngrams(tokens_T: np.ndarray, width: int) -> np.ndarray:
    """A 64-bit hash of every stretch of `width` tokens, from their own 64-bit hashes."""
    num = max(0, len(tokens_T) - width + 1)
    hashes_S = tokens_T[:num].copy()
    for shift in range(1, width):
        hashes_S = hashes_S * SPREAD + tokens_T[shift : shift + num]
    return hashes_S


def coverage(hits_H: np.ndarray, sizes_I: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
    """The items that were hit, and the share of the tokens of each that lies in a shared n-gram.

    item           a b c d e f g h i j     10 tokens
    hits of width 3    at 1, 2 and 6
    covered          b c d e   g h i       7 of 10
    """
    items_H = (hits_H >> np.uint64(32)).astype(np.int64)
    covered_H = np.minimum(np.diff(hits_H, append=np.uint64(1 << 63)), np.uint64(width))  # the next item is far away
    firsts = np.flatnonzero(np.diff(items_H, prepend=-1))
    items = items_H[firsts]
    return items, np.add.reduceat(covered_H, firsts) / sizes_I[items]


@lru_cache(maxsize=1 << 16)
def _token_hash(token: str) -> int:
    return int.from_bytes(hashlib.blake2b(token.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def _hashed(tokens: Sequence[str]) -> np.ndarray:
    return np.fromiter(map(_token_hash, tokens), np.uint64, len(tokens))


# ---------------------------------------------------------------------------------------------- stages


class Leakage:
    """Training examples that repeat an item of an evaluation; only what users say is looked at.

    The index is built once, from `(key, text)` of each item; it holds hashes and keys, no text. Several texts of one
    item come with the same key. At most `MOST` items of a set are reported of one example, those with the highest score.
    """

    name = "leakage"

    def __init__(self, items: Iterable[tuple[str, str]], *, coverage: float) -> None:
        self.coverage = coverage
        self._keys: list[str] = []
        self._short: dict[bytes, list[int]] = {}
        sequences: list[np.ndarray] = []
        for item, (key, text) in enumerate(items):
            tokens_T = _hashed(tokens_of(text))
            if 0 < len(tokens_T) < COVERED:  # a text without words, "...", is leaked by nothing
                self._short.setdefault(tokens_T.tobytes(), []).append(item)
            self._keys.append(key)
            sequences.append(tokens_T)
        if not any(map(len, sequences)):
            raise ValueError("leakage: no evaluation item has words; name files with rows in audit.leakage_files")
        self._sizes_I = np.array([len(tokens_T) for tokens_T in sequences], np.int64)
        self._covered, self._phrases = Ngrams(sequences, COVERED), Ngrams(sequences, PHRASE)

    @property
    def items(self) -> dict[str, int]:
        """How many items every evaluation set has."""
        return dict(Counter(map(set_of, dict.fromkeys(self._keys))))

    def look(self, example: Example) -> list[Finding]:
        if example.split == "eval":
            return []
        turns = enumerate(example.conversation.messages)
        said = [(number, _hashed(tokens_of(turn.content))) for number, turn in turns if turn.role == "user"]
        return [
            *self._findings(example, said, self._covers, reason=COVERS, action="drop"),
            *self._findings(example, said, self._is_short, reason=IS_SHORT, action="drop"),
            *self._findings(example, said, self._shares, reason=SHARES, action="tag"),
        ]

    def _covers(self, tokens_T: np.ndarray) -> Iterator[tuple[int, float]]:
        return self._hits(self._covered, tokens_T, above=self.coverage)

    def _is_short(self, tokens_T: np.ndarray) -> Iterator[tuple[int, float]]:
        return ((item, 1.0) for item in self._short.get(tokens_T.tobytes(), ()))

    def _shares(self, tokens_T: np.ndarray) -> Iterator[tuple[int, float]]:
        return self._hits(self._phrases, tokens_T, above=0.0)

    def _hits(self, index: Ngrams, tokens_T: np.ndarray, *, above: float) -> Iterator[tuple[int, float]]:
        hits_H = index.hits(tokens_T)
        if not len(hits_H):
            return iter(())
        items, shares = coverage(hits_H, self._sizes_I, index.width)
        return zip(items[shares > above].tolist(), shares[shares > above].tolist(), strict=True)

    def _findings(
        self, example: Example, said: Sequence[tuple[int, np.ndarray]], ask: Ask, *, reason: str, action: str
    ) -> list[Finding]:
        """One finding for each item, from the turn with its highest score."""
        best: dict[str, tuple[float, int]] = {}
        for turn, tokens_T in said:
            for item, score in ask(tokens_T):
                key = self._keys[item]
                if score > best.get(key, (0.0, turn))[0]:
                    best[key] = (score, turn)
        return [
            _finding(example, self.name, reason, action, other=key, score=score, message=turn)
            for key, (score, turn) in _most(best.items(), score=lambda found: found[1][0])
        ]


class SemanticLeakage:
    """Training examples that mean what an evaluation item says, by vectors that the user brings.

    `vector_of` gives the vector of an example (of its number in a file of vectors, say); a vector that is missing is its
    error to raise. Processes and clusters need one that can be pickled: a function or an object of a module.
    """

    name = "semantic_leakage"

    def __init__(
        self, items: Iterable[tuple[str, np.ndarray]], vector_of: Callable[[Example], np.ndarray], *, cosine: float
    ) -> None:
        named = [(key, _unit(vector, key)) for key, vector in items]
        if not named:
            raise ValueError("semantic leakage: there are no evaluation items; give (key, vector) of each")
        sizes = {vector_D.shape: key for key, vector_D in named}
        if len(sizes) > 1:
            raise ValueError(f"semantic leakage: vectors differ in size: {sizes}; make all of them by one encoder")
        self._keys = [key for key, _ in named]
        self._vectors_ID = np.stack([vector_D for _, vector_D in named])
        self._vector_of, self.cosine = vector_of, cosine

    def look(self, example: Example) -> list[Finding]:
        if example.split == "eval":
            return []
        key = example.conversation.key
        vector_D = _unit(self._vector_of(example), key)
        if vector_D.shape != self._vectors_ID.shape[1:]:
            sizes = f"{vector_D.shape[0]} numbers, the items' {self._vectors_ID.shape[1]}"
            raise ValueError(f"{key}: the vector has {sizes}; make all of them by one encoder")
        cosines_I = self._vectors_ID @ vector_D
        hits = [(item, float(cosines_I[item])) for item in np.flatnonzero(cosines_I > self.cosine).tolist()]
        best: dict[str, float] = {}
        for item, cosine in hits:
            best[self._keys[item]] = max(cosine, best.get(self._keys[item], -1.0))
        return [
            _finding(example, self.name, MEANS, "drop", other=key, score=cosine)
            for key, cosine in _most(best.items(), score=lambda found: found[1])
        ]


def _unit(vector: Any, key: str) -> np.ndarray:
    vector_D = np.asarray(vector, np.float32)
    length = float(np.linalg.norm(vector_D))
    if vector_D.ndim != 1 or not np.isfinite(length) or not length:
        raise ValueError(f"{key}: the vector, {vector_D.shape} with length {length}, has no direction; embed it again")
    return vector_D / np.float32(length)


def _most(found: Iterable[tuple[str, Any]], *, score: Callable[[tuple[str, Any]], float]) -> list[tuple[str, Any]]:
    """The best of every evaluation set, `MOST` at most."""
    taken: Counter[str] = Counter()
    best = []
    for hit in sorted(found, key=score, reverse=True):
        taken[set_of(hit[0])] += 1
        if taken[set_of(hit[0])] <= MOST:
            best.append(hit)
    return best


def _finding(
    example: Example,
    stage: str,
    reason: str,
    action: str,
    *,
    other: str,
    score: float,
    message: int | None = None,
) -> Finding:
    row = example.conversation
    return Finding(row.key, row.source, stage, reason, action, message=message, other=other, score=score)


# ---------------------------------------------------------------------------------------------- how much


@dataclass(frozen=True)
class Contamination:
    """How much of an evaluation set is in a training source, and how much of the source is in the set."""

    source: str
    evaluation: str
    rows: int  # of the source
    rows_hit: int
    items: int  # of the evaluation
    items_hit: int

    @property
    def of_rows(self) -> float:
        return self.rows_hit / self.rows if self.rows else 0.0

    @property
    def of_items(self) -> float:
        return self.items_hit / self.items if self.items else 0.0


def contamination(
    findings: Iterable[Finding],
    *,
    rows: Mapping[str, int],
    items: Mapping[str, int],
    reasons: Sequence[str] = (COVERS, IS_SHORT),
) -> list[Contamination]:
    """One line for every source and evaluation set, clean ones too. `rows` of the sources, `items` of the sets."""
    rows_hit: dict[tuple[str, str], set[str]] = {}
    items_hit: dict[tuple[str, str], set[str]] = {}
    for finding in findings:
        if finding.reason in reasons:
            place = (finding.source, set_of(finding.other))
            rows_hit.setdefault(place, set()).add(finding.key)
            items_hit.setdefault(place, set()).add(finding.other)
    return [
        Contamination(
            *(source, evaluation),
            *(num_rows, len(rows_hit.get((source, evaluation), ()))),
            *(num_items, len(items_hit.get((source, evaluation), ()))),
        )
        for source, num_rows in rows.items()
        for evaluation, num_items in items.items()
    ]
