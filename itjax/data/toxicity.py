"""Offensive turns: words of a list, whole words only, and a classifier of one's own.

    list    "ass", "one cup two girls"
    text    Classes in Scunthorpe assess a one-cup  two girls joke.        one cup two girls
            ~~~~~~~            ~~~~~~ no words of the list

Stretches between spaces are looked up first, most of them in a memory of those that were seen; a text is cut into words
only where all words of a term are in it. So a long list costs as much time as a short one.
"""

import functools
import hashlib
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from glob import glob
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from itjax.base.records import Finding
from itjax.base.schema import Filters
from itjax.data.named import named_function
from itjax.data.stages import Example

VERSION = 1  # of what counts as a word of a list
ROLES = ("system", "user", "assistant", "tool")
# Scripts that are written without spaces: every character is a word of its own.
UNSPACED = (
    "\u0e00-\u0e7f\u0e80-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
SEEN, LONGEST = 1 << 17, 40  # stretches without spaces that are remembered, and characters of the longest
Classifier = Callable[[str], float]


class Word(NamedTuple):
    """A word of a text as lists spell it: composed, without case."""

    spelling: str
    start: int
    stop: int


class Hit(NamedTuple):
    start: int
    stop: int


@functools.cache
def _word_pattern() -> re.Pattern[str]:
    """A word; one character of a script without spaces; or one sign. Spaces, hyphens and underscores part words."""
    marks = "".join(_runs(lambda code: unicodedata.category(chr(code)) in ("Mn", "Mc")))
    of_ascii = r"[a-zA-Z0-9]++(?![^\x00-\x7f])"  # most words, quickly
    return re.compile(rf"{of_ascii}|[{UNSPACED}]|(?:[^\W_{UNSPACED}][{marks}]*+)++|[^\w\s-]")


def _runs(holds: Callable[[int], bool]) -> Iterator[str]:
    """The characters of which it holds, as ranges of a character class."""
    start = None
    for code in range(0x300, 0x20000):
        if holds(code) and start is None:
            start = code
        elif not holds(code) and start is not None:
            yield f"{chr(start)}-{chr(code - 1)}"
            start = None


def words(text: str) -> Iterator[Word]:
    """The words of a text with their places."""
    for match in _word_pattern().finditer(text):
        yield Word(_spelled(match.group()), *match.span())


def _spelled(word: str) -> str:
    return word.lower() if word.isascii() else unicodedata.normalize("NFKC", word).lower()  # "ß" is not "ss"


@dataclass(frozen=True)
class WordList:
    """Terms by their first word: of each the words that follow."""

    name: str
    terms: Mapping[str, tuple[tuple[str, ...], ...]]
    fingerprint: str

    def hits(self, text_words: list[Word]) -> Iterator[Hit]:
        """Where terms stand, the longest at every place; none inside another."""
        at = 0
        while at < len(text_words):
            length = self._longest(text_words, at)
            if length:
                yield Hit(text_words[at].start, text_words[at + length - 1].stop)
            at += max(1, length)

    def may_hit(self, found: set[str]) -> bool:
        """Whether all words of a term are among these, in whatever order."""
        return any(found.issuperset(rest) for first in found for rest in self.terms.get(first, ()))

    def _longest(self, text_words: list[Word], at: int) -> int:
        for rest in self.terms.get(text_words[at].spelling, ()):
            follow = text_words[at + 1 : at + 1 + len(rest)]
            if len(follow) == len(rest) and all(
                word.spelling == other for word, other in zip(follow, rest, strict=True)
            ):
                return 1 + len(rest)
        return 0


def word_list(name: str, lines: Iterable[str]) -> WordList:
    """A list from its lines; empty ones and those that begin with # are comments."""
    terms: dict[str, set[tuple[str, ...]]] = {}
    for line in lines:
        spelled = tuple(word.spelling for word in words(line)) if not line.lstrip().startswith("#") else ()
        if spelled:
            terms.setdefault(spelled[0], set()).add(spelled[1:])
    ordered = {
        first: tuple(sorted(rests, key=lambda rest: (-len(rest), rest))) for first, rests in sorted(terms.items())
    }
    return WordList(name, ordered, hashlib.sha256(repr(ordered).encode()).hexdigest())


def read_word_lists(patterns: str) -> tuple[WordList, ...]:
    """The lists in the files that comma-separated globs name."""
    lists = []
    for pattern in filter(None, (pattern.strip() for pattern in patterns.split(","))):
        paths = sorted(glob(str(Path(pattern).expanduser()), recursive=True))
        if not paths:
            raise ValueError(f"config.audit.word_lists: nothing matches {pattern!r}; name files with one word a line")
        for path in paths:
            try:
                text = Path(path).read_text(encoding="utf-8-sig")
            except (UnicodeDecodeError, IsADirectoryError) as error:
                raise ValueError(f"{path}: not a text file in UTF-8 ({error}); give one word a line") from None
            found = word_list(Path(path).name, text.splitlines())
            if not found.terms:
                raise ValueError(f"{path}: there are no words in it; give one word a line")
            lists.append(found)
    return tuple(lists)


class Vocabulary(dict[str, tuple[str, ...]]):
    """A stretch of text without spaces -> its words that are in a term of a list. Most stretches were seen before."""

    def __init__(self, lists: Iterable[WordList]) -> None:
        self._listed = frozenset(
            word for one in lists for first, rests in one.terms.items() for rest in rests for word in (first, *rest)
        )

    def of(self, text: str) -> set[str]:
        return set(chain.from_iterable(map(self.__getitem__, set(text.split()))))

    def __missing__(self, stretch: str) -> tuple[str, ...]:
        spelled = map(_spelled, set(_word_pattern().findall(stretch)))
        found = tuple(word for word in spelled if word in self._listed)
        if len(stretch) <= LONGEST and len(self) < SEEN:
            self[stretch] = found
        return found


class Toxic:
    """The stage that looks for words of lists, and asks the classifier, turn by turn."""

    name = "toxic"

    def __init__(self, options: Filters, classifier: Classifier | None = None) -> None:
        for role in options.toxic_roles:
            if role not in ROLES:
                raise ValueError(f"config.audit.toxic_roles: {role!r} is unknown; known: {', '.join(ROLES)}")
        self.action = options.toxic
        self.roles = options.toxic_roles or ROLES
        self.threshold = options.toxic_threshold
        self.lists = read_word_lists(options.word_lists)
        self._vocabulary = Vocabulary(self.lists)
        self.classifier = classifier or named_function(options.toxic_classifier, "config.audit.toxic_classifier")
        if not self.lists and self.classifier is None:
            raise ValueError(
                "config.audit.word_lists: the toxic stage has neither words nor a classifier; "
                "set word_lists='words/*.txt' (one word a line) or toxic_classifier='module:function'"
            )

    def look(self, example: Example) -> list[Finding]:
        conversation = example.conversation
        findings = []
        for turn, message in enumerate(conversation.messages):
            if message.role in self.roles:
                for reason, hit, score in self._judged(message.content):
                    findings.append(
                        Finding(
                            conversation.key,
                            conversation.source,
                            self.name,
                            reason,
                            self.action,
                            message=turn,
                            start=hit.start,
                            stop=hit.stop,
                            score=score,
                        )
                    )
        return findings

    def _judged(self, text: str) -> Iterator[tuple[str, Hit, float]]:
        """Every word of a list with the number of such words; the classifier's score from the threshold on."""
        found = self._vocabulary.of(text) if self.lists else set()
        if lists := [word_list for word_list in self.lists if word_list.may_hit(found)]:
            text_words = list(words(text))
            for word_list in lists:
                hits = list(word_list.hits(text_words))
                for hit in hits:
                    yield f"word of {word_list.name}", hit, float(len(hits))
        if self.classifier is not None:
            score = float(self.classifier(text))
            if not 0 <= score <= 1:
                raise ValueError(
                    f"config.audit.toxic_classifier: it gave {score}; it should give a number from 0 to 1 for a text"
                )
            if score >= self.threshold:
                yield "classifier", Hit(0, len(text)), score
