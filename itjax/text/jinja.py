"""A model's own chat template as a format: rendered, cut into pieces, and refused where the pieces cannot be exact.

Three renderings prove a turn exact. With k messages before an assistant's turn:

    prompt    render(messages[:k], add_generation_prompt)      what the model is shown
    answer    render(messages[:k + 1])                         what it should have said, begins with the prompt
    whole     render(messages)                                 begins with the answer, up to its terminator

Between the end of the prompt and the terminator the turn is learned. A turn that the whole shows otherwise (Qwen3 leaves
out earlier thinking) is not learned there, but in an example of its own; see `chat.views`.

Control tokens count only where the template put them: they are found in a twin of the rendering, in which the data's
characters that could begin or end one are replaced by others of the same length.
"""

import datetime
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from itjax.base.records import Conversation, Message, ToolCall
from itjax.text import sandbox
from itjax.text.pieces import FRAME, SAID, CannotWrite, Piece
from itjax.text.tokenizer import Tokenizer
from itjax.text.tools import arguments, dumps

CONFIG = "tokenizer_config.json"
SPECIALS = "special_tokens_map.json"
TOOL_USE = "tool_use"
TODAY = datetime.date(2025, 1, 1)  # what a template is told, so that the same data give the same tokens on any day
CALL_ENDS = ("<|eom_id|>", "<|call|>")  # terminators of turns that call a tool, where other turns end otherwise
SHOWN = 40  # characters of a difference in an error


class Rendered(NamedTuple):
    """A text of the template and where it has control tokens of its own."""

    text: str
    controls: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class ChatTemplate:
    """A chat template with what it needs to be rendered. Usable wherever a format is."""

    source: str
    specials: Mapping[str, str]  # bos_token, eos_token, ... -> text
    controls: tuple[str, ...]  # texts that are one control token of the tokenizer
    name: str = "hf"
    place: str = "chat template"  # where it comes from, for errors
    tool_source: str = ""  # another template for conversations with tools
    today: datetime.date = TODAY
    omits: bool = False  # whether it may leave out what it has no place for
    literal_arguments: bool = False  # arguments that are JSON in a text stay a text
    in_parts: bool = False  # content is a list of parts, as templates of models that see expect it
    variables: Mapping[str, Any] = field(default_factory=dict)  # further ones the template reads

    rewrites_history = True  # perhaps; it is looked at turn by turn

    @classmethod
    def open(cls, folder: str | Path, tokenizer: Tokenizer) -> "ChatTemplate":
        """The template of a model's folder, from any of the files that hold one."""
        folder = Path(folder)
        named = _templates(folder)
        default = named.get("default") or next(iter(named.values()))
        template = cls(
            source=default,
            specials=_special_tokens(folder),
            controls=tuple(tokenizer.controls),
            place=str(folder),
            tool_source=named.get(TOOL_USE, ""),
        )
        try:
            template.check()
        except ValueError:
            in_parts = replace(template, in_parts=True)
            if not in_parts.renders():
                raise
            return in_parts
        return template

    def renders(self) -> bool:
        """Whether a conversation can be written and cut."""
        try:
            self.check()
        except ValueError:
            return False
        return True

    def check(self) -> None:
        """Whether it renders at all, and ends an assistant's turn with a control token."""
        _ = self.terminator

    # ------------------------------------------------------------------------------------------ text

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] = (),
        *,
        asks: bool = False,
        thinking: bool | None = None,
    ) -> str:
        """What the template writes for messages as it expects them. `asks`: with the prompt of an answer."""
        try:
            return sandbox.render(
                self._source(tools), self._variables(messages, tools, asks, thinking), today=self.today
            )
        except ValueError as error:
            raise CannotWrite(f"{self.place}: the template cannot write this: {error}", "template refuses") from None

    def marked(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] = ()
    ) -> tuple[str, list[slice]]:
        """The text and the stretches that the template itself marks with `{% generation %}`."""
        variables = self._variables(messages, tools, False, None)
        return sandbox.render_marked(self._source(tools), variables, today=self.today)

    def _source(self, tools: Sequence[Mapping[str, Any]]) -> str:
        return self.tool_source if tools and self.tool_source else self.source

    def _variables(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]],
        asks: bool,
        thinking: bool | None,
    ) -> dict[str, Any]:
        variables = {**self.variables, **self.specials}
        variables |= {"messages": list(messages), "tools": list(tools) or None, "documents": None}
        variables["add_generation_prompt"] = asks
        return variables if thinking is None else variables | {"enable_thinking": thinking, "thinking": thinking}

    # ------------------------------------------------------------------------------------------ pieces

    def write(self, conversation: Conversation) -> list[Piece]:
        """The whole conversation. What an assistant says is SAID where that is exact; everything else is FRAME."""
        for message in conversation.messages:
            if message.role != "assistant" and message.learn:
                raise CannotWrite(
                    f"{self.place}: a template tells apart what assistants say, so only that can be learned",
                    "learned message that is not an assistant",
                )
        whole = self._rendered(conversation.messages, conversation.tools)
        self._check_nothing_is_lost(conversation, whole.text)
        return list(_cut(whole, self._spans(conversation.messages, conversation.tools, whole.text)))

    def ask(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = (), *, thinking: bool | None = None
    ) -> list[Piece]:
        """The messages and what announces the answer, cut where `write` cuts the same text."""
        prompt = self._rendered(messages, tools, asks=True, thinking=thinking)
        return list(_cut(prompt, self._spans(messages, tools, prompt.text, refuses=False)))

    @cached_property
    def terminator(self) -> str:
        """The control token after which an assistant's turn is over."""
        asked = (Message("user", "first question"), Message("assistant", "first answer"))
        answered = (*asked, Message("user", "second question"), Message("assistant", "second answer"))
        rendered = self._rendered(answered, ())
        said = rendered.text.rfind("second answer")
        ends = [rendered.text[start:stop] for start, stop in rendered.controls if start > said]
        if said < 0 or not ends:
            raise ValueError(
                f"{self.place}: no control token of the tokenizer ends an assistant's turn, so a model would never "
                f"learn to stop; it ends with {rendered.text[said:][-SHOWN:]!r}"
            )
        return ends[0]

    def _spans(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]],
        whole: str,
        *,
        refuses: bool = True,
    ) -> dict[int, tuple[int, int]]:
        """Where assistants' turns are learned in this text: after their prompt, up to their terminator."""
        spans = {}
        for turn, message in enumerate(messages):
            if message.role != "assistant" or message.learn in (False, 0):
                continue
            try:
                start, stop, answer = self._turn(messages[: turn + 1], tools)
            except ValueError:
                if refuses:
                    raise
                continue
            if whole.startswith(answer):
                spans[turn] = (start, stop)
        return spans

    def _turn(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]]) -> tuple[int, int, str]:
        """Of the last message: where its prompt ends, where its terminator ends, and the text up to there."""
        turn, message = len(messages) - 1, messages[-1]
        answer = self._rendered(messages, tools)
        prompt = self._prompt_of(messages, tools, answer.text)
        ends = [(a, b) for a, b in answer.controls if a >= len(prompt)]
        known = (self.terminator, *CALL_ENDS) if message.tool_calls else (self.terminator,)
        stops = [b for a, b in ends if answer.text[a:b] in known]
        if not stops:
            raise CannotWrite(
                f"{self.place}: turn {turn} has no terminator {self.terminator!r}; nothing would teach to stop",
                "turn without a terminator",
            )
        said = answer.text[len(prompt) : stops[-1]]
        if not self.omits:
            self._check_said(message, said, turn)
        return len(prompt), stops[-1], answer.text[: stops[-1]]

    def _prompt_of(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], answer: str) -> str:
        """The prompt that the answer continues: the template's, or the one that asks for (or without) a thought."""
        default = self._rendered(messages[:-1], tools, asks=True).text
        if answer.startswith(default):
            return default
        switched = self._rendered(messages[:-1], tools, asks=True, thinking=bool(messages[-1].reasoning)).text
        if answer.startswith(switched):
            return switched
        turn = len(messages) - 1
        raise CannotWrite(
            f"{self.place}: the prompt of turn {turn} is not how the turn begins: {difference(default, answer)}",
            "prompt of a turn is not its beginning",
        )

    def _check_said(self, message: Message, said: str, turn: int) -> None:
        parts = [
            message.content.strip(),
            (message.reasoning or "").strip(),
            *(call.name for call in message.tool_calls),
        ]
        for part in parts:
            if part not in said and _as_json(part) not in said:
                thought = self._inline_thought(message)
                if thought is not None and thought in said:
                    continue
                raise CannotWrite(
                    f"{self.place}: the template leaves out part of what the assistant says in turn {turn}",
                    "template leaves out an answer",
                )

    @staticmethod
    def _inline_thought(message: Message) -> str | None:
        """The answer after a thought that the content begins with, which templates write apart."""
        return message.content.split("</think>")[-1].strip() if "</think>" in message.content else None

    def _check_nothing_is_lost(self, conversation: Conversation, text: str) -> None:
        if self.omits:
            return
        names = [str(tool.get("function", tool).get("name", "")) for tool in conversation.tools]
        said = [(m.role, m.content.strip()) for m in conversation.messages if m.role != "assistant"]
        for what, part in [*(("tools", name) for name in names), *said]:
            if part not in text and _as_json(part) not in text:
                raise CannotWrite(
                    f"{self.place}: the template leaves out the row's {what}; remove them or use another",
                    "template leaves out tools or messages",
                )

    # ------------------------------------------------------------------------------------------ rendering

    def _rendered(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]],
        *,
        asks: bool = False,
        thinking: bool | None = None,
    ) -> Rendered:
        calls = [call for message in messages for call in message.tool_calls]
        errors: list[ValueError] = []
        found: list[Rendered] = []
        for candidate in self._spellings(messages):
            try:
                text = self.render(candidate, tools, asks=asks, thinking=thinking)
            except ValueError as error:
                errors.append(error)
                continue
            if not (self.omits or all(call.name in text for call in calls)):
                lost = f"{self.place}: the template leaves out tool calls; remove them"
                errors.insert(0, CannotWrite(lost, "template leaves out tool calls"))
                continue
            found.append(Rendered(text, self._controls(text, candidate, tools, asks, thinking)))
            if self.omits or all(_arguments_in(text, call) for call in calls):
                return found[-1]
        if not found:
            raise errors[0]
        return found[0]

    def _spellings(self, messages: Sequence[Message]) -> Iterator[list[dict[str, Any]]]:
        """Templates differ in what they take: arguments as an object or a text, content of a call empty or none."""
        calls = any(message.tool_calls for message in messages)
        for literal in (self.literal_arguments, not self.literal_arguments)[: 1 + calls]:
            for nothing in ("", None)[: 1 + calls]:
                written = spelt(messages, literal=literal, nothing=nothing)
                yield [_in_parts(message) for message in written] if self.in_parts else written

    def _controls(
        self,
        text: str,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]],
        asks: bool,
        thinking: bool | None,
    ) -> tuple[tuple[int, int], ...]:
        """Where the template itself wrote control tokens: where its twin has them, whose data cannot make any."""
        names = self._names
        data = "".join(_strings([messages, tools]))
        twin = text
        if names.edges.search(data):
            stand_in = next(c for c in map(chr, range(0xE000, 0xF900)) if c not in data)
            for dangerous in (names.edges, names.first):
                harmless = _changed(messages, dangerous, stand_in), _changed(tools, dangerous, stand_in)
                twin = self.render(*harmless, asks=asks, thinking=thinking)
                if _is_twin(twin, text, stand_in):
                    break
            else:
                raise CannotWrite(
                    f"{self.place}: the template reads what messages say, which here looks like control tokens, "
                    "so the two cannot be told apart; remove them from the data",
                    "template reads what messages say",
                )
        return tuple(match.span() for match in names.any.finditer(twin))

    @property
    def _names(self) -> "_Names":
        own = (self.specials.get("bos_token", ""), self.specials.get("eos_token", ""))
        return _names(tuple(sorted({*self.controls, *filter(None, own)}, key=lambda name: (-len(name), name))))


class _Names(NamedTuple):
    """Control tokens as patterns: any of them, the first character of one, and any character one begins or ends with."""

    any: re.Pattern[str]
    first: re.Pattern[str]
    edges: re.Pattern[str]


@lru_cache(maxsize=16)
def _names(names: tuple[str, ...]) -> _Names:
    found = "|".join(map(re.escape, names)) or r"(?!)"
    edges = {c for name in names for c in (name[0], name[-1]) if not c.isalnum() and c != "_"}
    return _Names(
        any=re.compile(found),
        first=re.compile(f"(?={found}).", re.DOTALL),
        edges=re.compile(
            f"(?={found}).|[{re.escape(''.join(sorted(edges)))}]" if edges else f"(?={found}).", re.DOTALL
        ),
    )


def _cut(rendered: Rendered, spans: Mapping[int, tuple[int, int]]) -> Iterator[Piece]:
    controls = set(rendered.controls)
    ends = {0, len(rendered.text), *(end for pair in (*controls, *spans.values()) for end in pair)}
    for start, stop in pairwise(sorted(ends)):
        turn = next((turn for turn, (a, b) in spans.items() if a <= start < b), None)
        text, is_control = rendered.text[start:stop], (start, stop) in controls
        yield Piece(text, -1, FRAME, is_control) if turn is None else Piece(text, turn, SAID, is_control)


# ------------------------------------------------------------------------------------------------ messages


def spelt(messages: Sequence[Message], *, literal: bool, nothing: str | None) -> list[dict[str, Any]]:
    """Messages as templates expect them. `literal`: arguments in a text stay a text; `nothing`: content of bare calls."""
    return [_spelt(message, literal=literal, nothing=nothing) for message in messages]


def _spelt(message: Message, *, literal: bool, nothing: str | None) -> dict[str, Any]:
    bare = bool(message.tool_calls) and not message.content
    fields: dict[str, Any] = {"role": message.role, "content": nothing if bare else message.content}
    if message.reasoning is not None:
        fields["reasoning_content"] = message.reasoning
    if message.tool_calls:
        fields["tool_calls"] = [_spelt_call(call, literal=literal) for call in message.tool_calls]
    if message.name is not None:
        fields["name"] = message.name
    if message.tool_call_id is not None:
        fields["tool_call_id"] = message.tool_call_id
    return fields


def _in_parts(fields: dict[str, Any]) -> dict[str, Any]:
    content = fields["content"]
    return fields | {"content": [{"type": "text", "text": content}] if content else []}


def _spelt_call(call: ToolCall, *, literal: bool) -> dict[str, Any]:
    value = call.arguments if literal else arguments(call)
    if literal and not isinstance(value, str):
        value = dumps(value)
    written = {"type": "function", "function": {"name": call.name, "arguments": value}}
    return written if call.id is None else {"id": call.id, **written}


def _arguments_in(text: str, call: ToolCall) -> bool:
    """Whether the arguments stand in the text: as JSON, or text by text as the template has them, but not as Python has
    them. Templates may escape, or print, what they were not made for."""
    value = arguments(call)
    if dumps(value) in text or (isinstance(call.arguments, str) and call.arguments in text):
        return True
    texts = list(_strings(value)) if isinstance(value, Mapping) else []
    return bool(texts) and str(value) not in text and all(part in text or _as_json(part) in text for part in texts)


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield str(key)
            yield from _strings(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _strings(item)


def _changed(value: Any, dangerous: re.Pattern[str], stand_in: str) -> Any:
    """The value with every dangerous character of its texts replaced."""
    if isinstance(value, str):
        return dangerous.sub(stand_in, value)
    if isinstance(value, Mapping):
        return {_changed(key, dangerous, stand_in): _changed(item, dangerous, stand_in) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_changed(item, dangerous, stand_in) for item in value]
    return value


def _is_twin(twin: str, text: str, stand_in: str) -> bool:
    return len(twin) == len(text) and all(a in (b, stand_in) for a, b in zip(twin, text, strict=True))


def _as_json(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)[1:-1]


def difference(ours: str, theirs: str) -> str:
    """The first characters that differ."""
    pairs = enumerate(zip(ours, theirs, strict=False))
    at = next((n for n, (a, b) in pairs if a != b), min(len(ours), len(theirs)))
    return f"at character {at} {ours[at : at + SHOWN]!r} against {theirs[at : at + SHOWN]!r}"


# ------------------------------------------------------------------------------------------------ files


def is_in(folder: str | Path) -> bool:
    """Whether a model's folder has a chat template."""
    return bool(_found(Path(folder)))


def _templates(folder: Path) -> dict[str, str]:
    found = _found(folder)
    if not found:
        raise ValueError(
            f"{folder}: there is no chat template in {CONFIG}, chat_template.jinja or chat_template.json; "
            "choose a format by name"
        )
    return found


def _found(folder: Path) -> dict[str, str]:
    """Templates by name, from whichever file of a model's folder has them."""
    found: dict[str, str] = {}
    config = _json(folder / CONFIG).get("chat_template") or _json(folder / "chat_template.json").get("chat_template")
    if isinstance(config, str):
        found["default"] = config
    elif isinstance(config, list):
        found |= {str(entry.get("name")): str(entry.get("template")) for entry in config if isinstance(entry, dict)}
    if (folder / "chat_template.jinja").is_file():
        found["default"] = _text(folder / "chat_template.jinja")
    for path in sorted((folder / "additional_chat_templates").glob("*.jinja")):
        found[path.stem] = _text(path)
    return found


def _special_tokens(folder: Path) -> dict[str, str]:
    fields = {**_json(folder / SPECIALS), **_json(folder / CONFIG)}
    tokens = {name: fields.get(name) for name in ("bos_token", "eos_token", "unk_token", "pad_token")}
    texts = {name: token.get("content") if isinstance(token, dict) else token for name, token in tokens.items()}
    return {name: text for name, text in texts.items() if isinstance(text, str)}


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        fields = json.loads(_text(path))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error}); give a model's folder as it was published") from None
    return fields if isinstance(fields, dict) else {}


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error}); give a model's folder as it was published") from None
