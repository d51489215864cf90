"""Faults of rows that a person would not want to teach: answers that refuse, repeat, stop short or are not what they declare.

What is certain is dropped; what is a guess is tagged, and the reader decides. See `ACTIONS`.
"""

import json
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from itjax.base.freeze import nearest
from itjax.base.records import Conversation, Finding, Message
from itjax.base.schema import Filters
from itjax.data.stages import Example

VERSION = 2  # of what counts as a fault
ACTIONS = {  # what becomes of a row, unless `audit.actions` says otherwise
    "empty answer": "drop",
    "short answer": "drop",  # by audit.min_words
    "long answer": "drop",  # by audit.max_words
    "other language": "drop",  # by audit.languages
    "broken json": "drop",
    "repetition": "tag",  # by audit.max_repetition
    "refusal": "tag",
    "partial refusal": "tag",
    "boilerplate": "tag",
    "placeholder": "tag",
    "control text": "tag",
    "mojibake": "tag",
}
GRAM = 4  # words that stand again together are a repetition
FEWEST_WORDS = 20  # of an answer in which repetition is looked for
FEWEST_LETTERS = 40  # of an answer whose language is guessed
LANGUAGE_LETTERS = 2000  # that the guess is made from
UNSPACED = re.compile(r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]")
Identifier = Callable[[str], str]  # text -> ISO 639-1 code


class Fault(NamedTuple):
    """What is wrong, where in the text, and how strongly where that is a number."""

    reason: str
    start: int
    stop: int
    score: float | None = None


# --- refusals ---------------------------------------------------------------------------------------------------------

REFUSING_WORDS = (
    "can't",
    "cannot",
    "can not",
    "unable",
    "won't",
    "will not",
    "not able",
    "decline",
    "refuse",
    "comfortable",
)
DEEDS = (
    r"(?:help|assist|provide|answer|do|fulfill?|comply|create|write|generate|give|share|support|engage|participate|discuss|"
    r"offer|recommend|tell|teach|explain|make|produce|respond|continue|advise|encourage|promote|condone|suggest|access|browse)"
)
REFUSAL = re.compile(
    r"(?:"
    r"sorry[,.;:]? (?:but )?[^.!?\n]{0,40}?(?:can't|cannot|can not|won't|will not|unable|not able|don't|do not|must decline)"
    r"|i(?: can't| cannot| can not| won't| will not| am not able to| am unable to|'m not able to|'m unable to|"
    r"'m not going to| must decline to| must refuse to| refuse to| decline to| have to decline to)"
    r"(?! wait| help but)(?: [a-z]{1,12}){0,3}? " + DEEDS + r"\b"
    r"|i (?:must|have to|will have to) (?:(?:respectfully|politely) )?(?:decline|refuse)\b"
    r"|i(?:'m| am) not comfortable|i (?:don't|do not) feel comfortable|i(?:'m| am) unable to " + DEEDS + r"\b"
    r"|as an? (?:ai|artificial|large language|language model|responsible)[^.!?\n]{0,80}?(?:can't|cannot|unable|not able|won't)"
    r")"
)
TURNS = re.compile(
    r"\b(?:however|instead|that said|but i can|i can (?:offer|help|provide|tell|share)|here (?:are|is)|nevertheless)\b"
)
OPENING = 160  # characters in which an answer that refuses says so
BOILERPLATE = (
    "as an ai language model", "as an ai model", "as a large language model", "as an artificial intelligence",
    "i am an ai language model", "i'm an ai language model", "as a language model", "developed by openai",
    "trained by openai", "created by openai", "my knowledge cutoff", "my last knowledge update", "my training data",
)  # fmt: skip


def refusal(answer: str) -> str | None:
    """ "full" where an answer opens with a refusal and offers nothing else, "partial" where it refuses a part, or None."""
    lower = answer.lower().replace("\u2019", "'")
    if not any(word in lower for word in REFUSING_WORDS) and "sorry" not in lower[:OPENING]:
        return None
    found = REFUSAL.search(lower)
    if found is None:
        return None
    if found.start() >= OPENING:
        return "partial"
    turn = TURNS.search(lower, found.end())
    return "partial" if turn and len(lower[turn.start() :].split()) >= 12 else "full"


def _refusals(answer: str) -> Iterator[Fault]:
    kind = refusal(answer)
    if kind:
        yield Fault("refusal" if kind == "full" else "partial refusal", 0, min(len(answer), OPENING))


def _boilerplate(answer: str) -> Iterator[Fault]:
    lower = answer.lower().replace("\u2019", "'")
    for phrase in BOILERPLATE:
        if phrase in lower:
            start = min(lower.index(phrase), len(answer))
            yield Fault("boilerplate", start, min(start + len(phrase), len(answer)))
            return


# --- how much, and how often ------------------------------------------------------------------------------------------


def num_words(text: str) -> int:
    """Words between spaces; of scripts without spaces, characters."""
    return len(_pieces(text))


def _pieces(text: str) -> list[str]:
    return text.split() if text.isascii() else UNSPACED.sub(r" \g<0> ", text).split()


def repetition(text: str) -> float:
    """The share of words that stand in stretches of four which were there before.

    a b c d a b c d e         4 / 9: the second a b c d
    """
    pieces = _pieces(text)
    seen: set[tuple[str, ...]] = set()
    repeated = end = 0
    for at in range(len(pieces) - GRAM + 1):
        gram = tuple(pieces[at : at + GRAM])
        if gram in seen:
            repeated += at + GRAM - max(end, at)
            end = at + GRAM
        else:
            seen.add(gram)
    return repeated / len(pieces) if pieces else 0.0


# --- text that is not what it should be -------------------------------------------------------------------------------

PLACEHOLDER = re.compile(
    r"(?<![\w}^_\\$#%])\{\{ ?[A-Za-z_][A-Za-z0-9_. ]{1,40}\}\}(?!\})|<(?:INSERT|insert|Insert|YOUR|ENTER)[ _][^<>\n]{1,60}>"
    r"|\[(?:INSERT|Insert|insert) [^\[\]\n]{1,60}\]"
)
CONTROL = re.compile(
    r"<\|[A-Za-z0-9_][A-Za-z0-9_ -]{1,40}\|>|<(?:start_of_turn|end_of_turn|bos|eos|pad|begin_of_text|end_of_text)>"
    r"|\[/?INST\]|<</?SYS>>|</s>\s*\Z|\A\s*<s>(?=\s*\[INST\])|<｜[^<>｜\n]{1,40}｜>"
)
# UTF-8 read as Windows-1252: an accent became Ã and a sign, a quotation mark became â€ and a sign.
MOJIBAKE = re.compile(
    r"\ufffd|Ã[\x80-\xbf\u0152\u0153\u0160\u0161\u0178\u017d\u017e\u0192\u02c6\u02dc\u2013-\u203a\u20ac\u2122]"
    r"|Â[\xa0-\xbf]|â€[\x80-\xbf\u0152\u0153\u02dc\u2018-\u203a\u2122\u017e\xa6]|ï»¿"
)
FENCE = "```"
ASKS_FOR_JSON = re.compile(  # of the answer: "what is JSON only for?" and "print only JSON keys" do not
    r"\b(?:return|respond|reply|answer|output|give|provide|produce|generate|write|use|be|as|in|with)\b[^.!?\n]{0,40}?"
    r"(?:\b(?:only|just|nothing but|valid|strict|single)(?: [a-z]{1,12}){0,3} json\b(?! (?:schema|file|key|value|field)s?)"
    r"|\bjson(?: [a-z]{1,12}){0,3} only\b)"
)


def _outside_code(text: str) -> Iterator[tuple[int, str]]:
    """The stretches of a text between fenced blocks, with where they begin."""
    at = 0
    for number, part in enumerate(text.split(FENCE)):
        if number % 2 == 0:
            yield at, part
        at += len(part) + len(FENCE)


def _placeholders(text: str) -> Iterator[Fault]:
    if "{{" in text or "<" in text or "[" in text:
        for at, part in _outside_code(text):
            for match in PLACEHOLDER.finditer(part):
                yield Fault("placeholder", at + match.start(), at + match.end())


def _control_text(text: str) -> Iterator[Fault]:
    if "<" in text or "[" in text:
        for match in CONTROL.finditer(text):
            yield Fault("control text", *match.span())


def _mojibake(text: str) -> Iterator[Fault]:
    match = None if text.isascii() else MOJIBAKE.search(text)
    if match:
        yield Fault("mojibake", *match.span())


def _broken_json(answer: str, asked: str) -> Iterator[Fault]:
    """Blocks that are fenced as JSON, and the whole answer where the question wants JSON and nothing else."""
    declared = list(_json_blocks(answer))
    if not declared and "json" in asked.lower() and ASKS_FOR_JSON.search(asked.lower()):
        declared = [(0, len(answer))]
    for start, stop in declared:
        if not is_json(answer[start:stop]):
            yield Fault("broken json", start, stop)


def _json_blocks(text: str) -> Iterator[tuple[int, int]]:
    """Where the insides of ```json blocks begin and end."""
    at, mark = 0, f"{FENCE}json"
    while (found := text.find(mark, at)) >= 0:
        start = found + len(mark)
        end = text.find(FENCE, start)
        stop = len(text) if end < 0 else end
        if not text[start : start + 1].isalnum():  # ```json5 and ```jsonl declare something else
            yield start, stop
        at = stop + len(FENCE)


def is_json(text: str) -> bool:
    """Whether the text is one JSON value, strictly: NaN is none."""
    try:
        json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return False
    return True


def _refuse(name: str) -> Any:
    raise ValueError(name)


# --- languages --------------------------------------------------------------------------------------------------------


def guessed_language(text: str) -> str:
    """The language of a text, by the py3langid package: 139 languages in one small model."""
    try:
        import py3langid
    except ImportError:
        raise ValueError(
            "config.audit.languages: guessing a language needs the package py3langid; "
            "pip install 'itjax[language]', or leave languages empty"
        ) from None
    return str(py3langid.classify(text)[0])


# --- the stage --------------------------------------------------------------------------------------------------------


class Quality:
    """The stage that looks at answers, and at all turns for text that no person wrote."""

    name = "quality"

    def __init__(self, options: Filters, identifier: Identifier = guessed_language) -> None:
        for reason, action in options.actions.items():
            if reason not in ACTIONS:
                raise ValueError(
                    f"config.audit.actions: {reason!r} is no finding.{nearest(reason, list(ACTIONS))} "
                    f"Known: {', '.join(ACTIONS)}"
                )
            if action not in ("drop", "tag"):
                raise ValueError(f"config.audit.actions: {action!r} for {reason!r} is no action; use 'drop' or 'tag'")
        self.options = options
        self.actions = {**ACTIONS, **options.actions}
        self.identifier = identifier
        if options.languages:
            identifier("")  # a package that is missing is missed at the start

    def look(self, example: Example) -> list[Finding]:
        conversation = example.conversation
        return [
            Finding(
                conversation.key,
                conversation.source,
                self.name,
                fault.reason,
                self.actions[fault.reason],
                message=turn,
                start=fault.start,
                stop=fault.stop,
                score=fault.score,
            )
            for turn, message in enumerate(conversation.messages)
            for fault in self._faults(conversation, turn, message)
        ]

    def _faults(self, conversation: Conversation, turn: int, message: Message) -> Iterator[Fault]:
        text = message.content
        if message.role == "assistant":
            yield from self._of_answer(text, has_calls=bool(message.tool_calls))
            yield from _broken_json(text, _asked(conversation, turn)) if not message.tool_calls else ()
        yield from _placeholders(text)
        yield from _control_text(text)
        yield from _mojibake(text)

    def _of_answer(self, answer: str, *, has_calls: bool) -> Iterator[Fault]:
        count, options = num_words(answer), self.options
        if not count:
            if not has_calls:
                yield Fault("empty answer", 0, len(answer))
            return
        if count < options.min_words and not has_calls:
            yield Fault("short answer", 0, len(answer), float(count))
        if options.max_words and count > options.max_words:
            yield Fault("long answer", 0, len(answer), float(count))
        if count >= FEWEST_WORDS and (share := repetition(answer)) > options.max_repetition:
            yield Fault("repetition", 0, len(answer), share)
        yield from _refusals(answer)
        yield from _boilerplate(answer)
        yield from self._other_language(answer)

    def _other_language(self, answer: str) -> Iterator[Fault]:
        start = answer[:LANGUAGE_LETTERS]
        is_asked = self.options.languages and sum(map(str.isalpha, start)) >= FEWEST_LETTERS
        if is_asked and self.identifier(start) not in self.options.languages:
            yield Fault("other language", 0, len(answer))


def _asked(conversation: Conversation, turn: int) -> str:
    """What the last turn before it that is no answer says, with the system prompt."""
    before = [message.content for message in conversation.messages[:turn] if message.role in ("system", "user")]
    return "\n".join(dict.fromkeys([before[0], before[-1]])) if before else ""
