"""Examples that repeat others: word for word, or nearly.

S shingles (stretches of words), R permutations; all shingles are 32-bit hashes.

Exact: the normalised text (NFKC, lower case, white space collapsed) is the bucket. Near: MinHash signatures are cut into
bands, examples that agree on a band are candidates, and candidates are compared by their shingles, so that nothing is
reported on an estimate. Two texts of similarity s become candidates with probability 1 - (1 - s^rows)^bands
(https://en.wikipedia.org/wiki/Locality-sensitive_hashing). Of each cluster one example is kept: the first that is for
evaluation, else the first.
"""

import hashlib
import itertools
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache

import numpy as np

from itjax.base.records import Conversation, Finding, Message
from itjax.base.schema import Filters
from itjax.data.stages import Address, Example, Mark, Pair

VERSION = 2  # of what repeats; a new number makes all filtered data anew
PARTS = ("prompt", "response", "both")
BETWEEN = "\0"  # prompt and response: "say hi", "there" is not "say", "hi there"
COMPARISONS = 64  # other texts that a text is compared with in one bucket: keeps crowded buckets linear
MOST_SAY = 0.5  # share of the rows of a source from which on a shingle is boilerplate
FEWEST = 20  # rows that show what is boilerplate
BLOCK = 512  # shingles that are permuted at one time
SPREAD = np.uint64(0x9E3779B97F4A7C15)  # odd; bits of the golden ratio
# Marks of a sentence before a word, and behind one: they make no difference.
OPEN = "\"'([\u201c\u201e\u2018\u00ab\u300c"
CLOSE = ".,;:!?\"')]\u2026\u201d\u201c\u2019\u00bb\u3001\u3002\u300d"
# Written without spaces: a character stands for a word.
UNSPACED = re.compile("([\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff])")


# ---------------------------------------------------------------------------------------------- what is compared


def normalised(text: str) -> str:
    """The form in which texts are the same: NFKC, lower case, one space for any white space."""
    return " ".join(_folded(text).split())


def text_of(conversation: Conversation, part: str) -> str:
    """The normalised text that makes two examples the same; empty where there is nothing to compare.

    prompt      everything before the last assistant turn: declared tools, system prompt, earlier turns of everyone
    response    all assistant turns, with their reasoning and tool calls
    both        the prompt and, set apart from it, the rest
    """
    turns = conversation.messages
    answers = [number for number, turn in enumerate(turns) if turn.role == "assistant"]
    last = answers[-1] if answers else len(turns)
    prompt = normalised(" ".join([*map(_in_json, conversation.tools), *map(_said, turns[:last])]))
    if part == "prompt":
        return prompt
    if part == "response":
        return normalised(" ".join(_said(turns[number]) for number in answers))
    rest = normalised(" ".join(map(_said, turns[last:])))
    return f"{prompt}{BETWEEN}{rest}" if prompt or rest else ""


def _check_part(part: str) -> None:
    if part not in PARTS:
        raise ValueError(f"duplicates of {part!r}: that is no part of an example; choose from {', '.join(PARTS)}")


def _said(turn: Message) -> str:
    calls = (f"{call.name} {_in_json(call.arguments)}" for call in turn.tool_calls)
    return " ".join(filter(None, (turn.reasoning, turn.content, *calls)))


def _in_json(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, sort_keys=True, default=str)


def _folded(text: str) -> str:
    return text.lower() if text.isascii() else unicodedata.normalize("NFKC", text).lower()


# ---------------------------------------------------------------------------------------------- word for word


@dataclass(frozen=True)
class ExactDuplicates:
    """Examples whose normalised text was there before."""

    of: str  # "prompt", "response" or "both"
    name: str = "exact_duplicates"

    def __post_init__(self) -> None:
        _check_part(self.of)

    def marks(self, example: Example) -> list[Mark]:
        text = text_of(example.conversation, self.of)
        return [Mark(_digest(text.encode("utf-8", "surrogatepass")), b"")] if text else []

    def pairs(self, members: Iterable[tuple[Address, bytes]]) -> Iterator[Pair]:
        (first, _), *others = members
        return (Pair(first, other, 1.0) for other, _ in others)

    def findings(self, pairs: Iterable[Pair]) -> Iterator[tuple[int, Finding]]:
        return keep_first(pairs, stage=self.name, says="repeats")


# ---------------------------------------------------------------------------------------------- nearly


@dataclass(frozen=True)
class NearDuplicates:
    """Examples that share most of their word 5-grams with another.

    A system prompt and declared tools are shared by many rows that otherwise differ, and so are the definition of a task
    and the words of a template: `boilerplate`, what most rows of a source say (see `knowing`). So two examples must be
    similar in the rest of their turns alone, and also with all that frames them: the same input under another
    instruction is another example.
    """

    of: str  # "prompt", "response" or "both"
    similarity: float  # Jaccard, from which two examples are near-duplicates
    seed: int = 0
    bands: int = 14
    rows: int = 8
    words: int = 5  # in a shingle; a shorter text is one shingle
    boilerplate: frozenset[int] = field(default=frozenset(), repr=False)  # shingles that are not compared
    name: str = "near_duplicates"

    def __post_init__(self) -> None:
        _check_part(self.of)
        if not 0 < self.similarity <= 1 or not 0 < self.bands < 256 or self.rows < 1 or self.words < 1:
            raise ValueError(f"{self}: similarity is above 0 and at most 1, bands 1 to 255, rows and words at least 1")

    def marks(self, example: Example) -> list[Mark]:
        turns, frame = _turns_and_frame(example.conversation, self.of)
        own_S, common_S = self._parted(shingles(turns, self.words))
        if not len(own_S):
            return []
        frame_S = shingles(frame, self.words)
        content = _pack(own_S, np.union1d(frame_S, common_S) if len(common_S) else frame_S)
        return [Mark(bucket, content) for bucket in self.buckets(own_S)]

    def _parted(self, shingles_S: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """What is a text's own, and what is boilerplate in it."""
        if not self.boilerplate:
            return shingles_S, shingles_S[:0]
        is_common_S = np.isin(shingles_S, self._boilerplate_S, assume_unique=True)
        return shingles_S[~is_common_S], shingles_S[is_common_S]

    def knowing(self, samples: Iterable[Sequence[Conversation]]) -> "NearDuplicates":
        """The same, not comparing what more than half of the rows of a source say; `samples` are some rows of each."""
        found: set[int] = set()
        for rows in samples:
            counts: Counter[int] = Counter()
            for row in rows:
                counts.update(shingles(_turns_and_frame(row, self.of)[0], self.words).tolist())
            if len(rows) >= FEWEST:
                found.update(shingle for shingle, count in counts.items() if count > MOST_SAY * len(rows))
        return replace(self, boilerplate=self.boilerplate | found)

    def buckets(self, shingles_S: np.ndarray) -> list[bytes]:
        """One for each band of the signature."""
        signature, size = self.signature(shingles_S).astype("<u4").tobytes(), 4 * self.rows
        return [_digest(bytes([band]) + signature[band * size : (band + 1) * size]) for band in range(self.bands)]

    def signature(self, shingles_S: np.ndarray) -> np.ndarray:
        """The smallest shingle under each permutation: two sets agree in a place as often as they are similar."""
        smallest_R = np.full(self.bands * self.rows, np.iinfo(np.uint32).max, np.uint64)
        for start in range(0, len(shingles_S), BLOCK):
            permuted_RS = self._factors_R1 * shingles_S[start : start + BLOCK].astype(np.uint64) + self._terms_R1
            np.minimum(smallest_R, (permuted_RS >> np.uint64(32)).min(axis=1), out=smallest_R)
        return smallest_R.astype(np.uint32)

    def pairs(self, members: Iterable[tuple[Address, bytes]]) -> Iterator[Pair]:
        """Enough pairs to join what is similar: a text is compared until it meets a cluster, not with all of its members."""
        known: dict[bytes, Address] = {}
        clusters: list[list[_Text]] = []
        for address, content in members:
            if content in known:
                yield Pair(known[content], address, 1.0)
                continue
            known[content] = address
            text = _Text(address, *_unpack(content))
            met = list(self._meets(text, clusters))
            yield from (pair for _, pair in met)
            _join(text, [cluster for cluster, _ in met], clusters)

    def _meets(self, text: "_Text", clusters: Sequence[list["_Text"]]) -> Iterator[tuple[list["_Text"], Pair]]:
        """The clusters with a text that is similar: first each cluster's first text is asked, then the others."""
        apart = []
        for cluster in itertools.islice(clusters, COMPARISONS):
            if (score := self._compare(text, cluster[0])) >= self.similarity:
                yield cluster, Pair(cluster[0].address, text.address, score)
            else:
                apart.append(cluster)
        left = COMPARISONS - min(COMPARISONS, len(clusters))
        for cluster in apart:
            for other in itertools.islice(cluster, 1, 1 + left):
                left -= 1
                if (score := self._compare(text, other)) >= self.similarity:
                    yield cluster, Pair(other.address, text.address, score)
                    break

    def _compare(self, one: "_Text", other: "_Text") -> float:
        score = jaccard(one.turns, other.turns)
        if score < self.similarity or not (one.frame or other.frame):
            return score
        return min(score, jaccard(one.turns | one.frame, other.turns | other.frame))

    def findings(self, pairs: Iterable[Pair]) -> Iterator[tuple[int, Finding]]:
        return keep_first(pairs, stage=self.name, says="nearly repeats")

    @cached_property
    def _boilerplate_S(self) -> np.ndarray:
        return np.array(sorted(self.boilerplate), np.uint32)

    @cached_property
    def _factors_R1(self) -> np.ndarray:
        return self._random_R1("factors") | np.uint64(1)

    @cached_property
    def _terms_R1(self) -> np.ndarray:
        return self._random_R1("terms")

    def _random_R1(self, what: str) -> np.ndarray:
        """Multiply-add-shift hashing (Dietzfelbinger 1996) wants 64 random bits for 32 bits of shingle."""
        num = self.bands * self.rows
        digest = hashlib.shake_128(f"minhash {what} {self.seed}".encode()).digest(8 * num)
        return np.frombuffer(digest, "<u8").astype(np.uint64)[:, None]


@dataclass(eq=False, slots=True)
class _Text:
    address: Address
    turns: frozenset[int]
    frame: frozenset[int]


def _join(text: _Text, met: Sequence[list[_Text]], clusters: list[list[_Text]]) -> None:
    """The clusters that a text has met are one cluster from now on."""
    if not met:
        clusters.append([text])
        return
    home, *others = met
    home.append(text)
    for cluster in others:
        home.extend(cluster)
        clusters[:] = [kept for kept in clusters if kept is not cluster]


def jaccard(one: frozenset[int], other: frozenset[int]) -> float:
    """Share of all shingles that both have."""
    both = len(one & other)
    return both / (len(one) + len(other) - both)


def spaced(text: str) -> str:
    """With a space around every character of a script that is written without spaces."""
    return text if text.isascii() else UNSPACED.sub(r" \1 ", text)


def words_of(text: str) -> list[str]:
    """The words of a normalised text; what is written without spaces counts by characters."""
    return spaced(text).split()


def shingles(text: str, width: int) -> np.ndarray:
    """Hashes of all stretches of `width` words, each once and in order; a shorter text is one stretch."""
    words = words_of(text)
    words_W = np.fromiter(map(_word_hash, words), np.uint64, len(words))
    words_W = words_W[words_W != 0]
    return np.unique(stretches(words_W, min(width, len(words_W)))) if len(words_W) else np.empty(0, np.uint32)


def stretches(words_W: np.ndarray, width: int) -> np.ndarray:
    """A 32-bit hash for every stretch of `width` words, from the 64-bit hashes of the words."""
    num = len(words_W) - width + 1
    hashes_S = words_W[:num].copy()
    for shift in range(1, width):
        hashes_S = hashes_S * SPREAD + words_W[shift : shift + num]
    return ((hashes_S ^ (hashes_S >> np.uint64(32))) * SPREAD >> np.uint64(32)).astype(np.uint32)


@lru_cache(maxsize=1 << 16)
def _word_hash(word: str) -> int:
    """The same for `so,` and `so`, 0 for marks alone; .5, + and x*y are words of their own."""
    bare = word.lstrip(OPEN).rstrip(CLOSE).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(bare, digest_size=8).digest(), "little") if bare else 0


def _turns_and_frame(conversation: Conversation, part: str) -> tuple[str, str]:
    """The normalised text of the turns, and of the system prompts and tools around them."""
    turns = conversation.messages
    answers = [number for number, turn in enumerate(turns) if turn.role == "assistant"]
    if part == "response":
        return normalised(" ".join(_said(turns[number]) for number in answers)), ""
    compared = turns[: answers[-1]] if part == "prompt" and answers else turns
    frame = [*map(_in_json, conversation.tools), *(_said(turn) for turn in compared if turn.role == "system")]
    return normalised(" ".join(_said(turn) for turn in compared if turn.role != "system")), normalised(" ".join(frame))


def _pack(turns_S: np.ndarray, frame_S: np.ndarray) -> bytes:
    return np.concatenate([[len(turns_S)], turns_S, frame_S]).astype("<u4").tobytes()


def _unpack(content: bytes) -> tuple[frozenset[int], frozenset[int]]:
    num, *hashes = np.frombuffer(content, "<u4").tolist()
    return frozenset(hashes[:num]), frozenset(hashes[num:])


# ---------------------------------------------------------------------------------------------- clusters


def keep_first(pairs: Iterable[Pair], *, stage: str, says: str) -> Iterator[tuple[int, Finding]]:
    """One finding for every example of a cluster but the one that is kept.

    An example for evaluation is kept before any for training. A score is the highest with any member of the cluster.
    """
    clusters = Clusters()
    for pair in pairs:
        clusters.join(pair)
    kept: dict[int, Address] = {}
    for address in sorted(clusters.addresses.values(), key=lambda address: (address.split != "eval", address.number)):
        kept.setdefault(clusters.root(address.number), address)
    for number, address in sorted(clusters.addresses.items()):
        first = kept[clusters.root(number)]
        if address != first:
            yield number, _repeat(address, first, stage=stage, says=says, score=clusters.scores[number])


def _repeat(address: Address, first: Address, *, stage: str, says: str, score: float) -> Finding:
    """Examples for evaluation are never dropped."""
    of = "an evaluation example" if first.split == "eval" else "an earlier example"
    action = "tag" if address.split == "eval" else "drop"
    return Finding(address.key, address.source, stage, f"{says} {of}", action, other=first.key, score=score)


class Clusters:
    """Union-find over the numbers of examples."""

    def __init__(self) -> None:
        self.addresses: dict[int, Address] = {}
        self.scores: dict[int, float] = {}
        self._parents: dict[int, int] = {}

    def join(self, pair: Pair) -> None:
        for address in pair[:2]:
            self.addresses.setdefault(address.number, address)
            self._parents.setdefault(address.number, address.number)
            self.scores[address.number] = max(pair.score, self.scores.get(address.number, 0.0))
        one, other = sorted((self.root(pair.first.number), self.root(pair.second.number)))
        self._parents[other] = one

    def root(self, number: int) -> int:
        while (parent := self._parents[number]) != number:
            self._parents[number] = number = self._parents[parent]  # halves the way
        return number


def stages_of(filters: Filters, *, seed: int = 0) -> tuple[ExactDuplicates, NearDuplicates]:
    """The two stages as a config asks for them."""
    return (
        ExactDuplicates(filters.duplicates_of),
        NearDuplicates(filters.duplicates_of, filters.similarity, seed=seed),
    )


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=16).digest()
