"""A declared format as a chat template in Jinja, for the libraries that read one from a model's folder.

The template does what `writing` does, pass by pass: messages are fitted, arranged and checked, then every turn is
written. What the format refuses, the template refuses. `{% generation %}` stands around what is learned: what an
assistant says after exactly the prompt that asks for it.

A template cannot read JSON. Where a format writes JSON that came as a text (Mistral's results of tools), text that
looks like JSON is written as it stands.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from itjax.text.formats import BOS, EOS, Format, Turn
from itjax.text.tools import LLAMA_TOOLS, MISTRAL_ID, STYLES, TOOLS_AFTER, TOOLS_BEFORE
from itjax.text.writing import PARAGRAPH

Lines = Iterator[str]


@dataclass(frozen=True)
class _Style:
    """The same style of tools as `tools.STYLES` has, in statements of Jinja. Names are those of the written turn."""

    declared: str  # an expression
    calls: Callable[[], Lines]  # adds to `ns.said`
    result: Callable[[], Lines]  # sets `result`


def jinja_of(fmt: Format) -> str:
    """The template that writes what the format writes. A format with a style of tools of its own has none."""
    if fmt.tools and fmt.tools not in _STYLES:
        raise ValueError(f"format {fmt.name!r}: there is no template for tools as {fmt.tools!r} writes them")
    passes = (_fit, _begin, _forget_tools, _join_system, _merge, _check_roles, _facts, _write, _ask)
    return "\n".join(line for one in passes for line in one(fmt)) + "\n"


def _do(statement: str) -> str:
    return "{%- " + statement + " -%}"


def _say(expression: str) -> str:
    return "{{- " + expression + " -}}"


def _set(name: str, expression: str) -> str:
    return _do(f"set {name} = {expression}")


def _refuse(when: str, message: str) -> str:
    return _do(f"if {when}") + _say(f"raise_exception({_quoted(message)})") + _do("endif")


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n").replace("\t", "\\t")
    return f"'{escaped}'"


def _own(text: str) -> str:
    """An expression for the format's own text, whose begin and end of text are the tokenizer's."""
    parts, rest = [], text
    while rest:
        found = [
            (rest.find(mark), mark, name) for mark, name in ((BOS, "bos_token"), (EOS, "eos_token")) if mark in rest
        ]
        if not found:
            parts.append(_quoted(rest))
            break
        at, mark, name = min(found)
        parts += [_quoted(rest[:at])] if at else []
        parts.append(name)
        rest = rest[at + len(mark) :]
    return " ~ ".join(parts) or "''"


# ------------------------------------------------------------------------------------------ the messages


def _fit(fmt: Format) -> Lines:
    """Each message with its content trimmed and its thought apart, in `ns.rows`."""
    yield _set("ns", "namespace(rows=[], more=[], text='', said='', listed='', before='', at=-1, dirty=false)")
    yield _set("tools", "tools if tools is defined and tools else []")
    if not fmt.tools and "tools" not in fmt.omits:
        yield _refuse("tools", f"format {fmt.name}: there is no place for tools")
    yield _do("for m in messages")
    yield _set("role", "m['role']")
    yield _set("content", "m['content'] if m['content'] is defined and m['content'] is not none else ''")
    yield _refuse("content is not string", f"format {fmt.name}: content is a text")
    yield _set("calls", "m['tool_calls'] if m['tool_calls'] is defined and m['tool_calls'] else []")
    if not fmt.tools and "calls" not in fmt.omits:
        yield _refuse("calls", f"format {fmt.name}: there is no place for tool calls")
    thought = "m['reasoning_content']"
    yield _set("thought", f"{thought} if {thought} is defined and {thought} is not none else none")
    if fmt.reasoning is None:
        if "reasoning" not in fmt.omits:
            yield _refuse("thought", f"format {fmt.name}: there is no place for reasoning")
    else:
        yield from _thought_apart(_quoted(fmt.reasoning.closing.strip()))
    yield from _trim(fmt)
    yield from _dirty(fmt)
    row = "{'role': role, 'content': content, 'thought': thought, 'calls': calls, 'turn': loop.index0"
    row += ", 'name': m['name'], 'id': m['tool_call_id'], 'own': false, 'dirty': ns.dirty}"
    kept = [
        *(["not (role == 'system' and not content)"] if "empty system" in fmt.omits else []),
        *(["role != 'tool'"] if "results" in fmt.omits else []),
    ]
    if kept:
        yield _do(f"if {' and '.join(kept)}")
    yield _set("ns.rows", f"ns.rows + [{row}]")
    if kept:
        yield _do("endif")
    yield _do("endfor")


def _thought_apart(closing: str) -> Lines:
    yield _do(f"if role == 'assistant' and thought is none and {closing} in content")
    yield _refuse(f"content.count({closing}) > 1", "content has more than one end of a thought")
    yield _set("parts", f"content.split({closing})")
    yield _set("thought", r"parts[0].rstrip('\n').split('<think>')[-1].lstrip('\n')")
    yield _set("content", r"parts[1].lstrip('\n')")
    yield _do("endif")


def _trim(fmt: Format) -> Lines:
    roles = [*(["role == 'system'"] if fmt.trims_system else [])]
    if fmt.trims:
        roles.append("role not in ['system', 'tool']" if fmt.tools else "role != 'system'")
    if roles:
        yield _set("content", f"content.strip() if {' or '.join(roles)} else content")


def _dirty(fmt: Format) -> Lines:
    """Whether tools were used since the last question: such turns are forgotten later."""
    if fmt.forgets_tools:
        yield _do("if role == 'user'") + _set("ns.dirty", "false") + _do("endif")
        yield _do("if role == 'tool' or calls") + _set("ns.dirty", "true") + _do("endif")


def _begin(fmt: Format) -> Lines:
    """A system prompt where there is none and the format needs one."""
    with_tools = bool(fmt.tools) and STYLES[fmt.tools].declared == "system"
    if not (fmt.default_system or fmt.preamble or with_tools):
        return
    row = "{'role': 'system', 'content': CONTENT, 'thought': none, 'calls': [], 'turn': -1, 'own': OWN, 'dirty': false}"
    default = row.replace("CONTENT", _quoted(fmt.default_system)).replace("OWN", "false")
    empty = row.replace("CONTENT", "''").replace("OWN", "true")
    lacking = "not ns.rows or ns.rows[0].role != 'system'"
    if fmt.default_system:
        yield _do(f"if {lacking}") + _set("ns.rows", f"[{default}] + ns.rows") + _do("endif")
    else:
        when = lacking if fmt.preamble else f"tools and ({lacking})"
        yield _do(f"if {when}") + _set("ns.rows", f"[{empty}] + ns.rows") + _do("endif")


def _last_user() -> Lines:
    yield _set("ns.at", "-1")
    yield _do("for row in ns.rows") + _do("if row.role == 'user'") + _set("ns.at", "loop.index0")
    yield _do("endif") + _do("endfor")


def _forget_tools(fmt: Format) -> Lines:
    """Calls and results before the last question go."""
    if not fmt.forgets_tools:
        return
    yield from _last_user()
    yield _set("ns.at", "0 if ns.at < 0 else ns.at")
    yield _set("ns.more", "[]")
    yield _do("for row in ns.rows")
    yield _do("if loop.index0 > ns.at or not (row.calls or row.role == 'tool')")
    yield _set("ns.more", "ns.more + [row]") + _do("endif")
    yield _do("endfor")
    yield _set("ns.rows", "ns.more")


def _join_system(fmt: Format) -> Lines:
    """System text before the content of a user, the first or the last."""
    yield _set("ns.text", "''")
    if fmt.system_joiner is None:
        return
    yield _set("systems", "namespace(list=[], others=[], first=messages | length, last=-1, place=-1)")
    yield _do("for row in ns.rows")
    taken = "true" if fmt.merges is not None else "loop.index0 == 0"
    yield _do(f"if row.role == 'system' and {taken}")
    yield _set("systems.list", "systems.list + [row.content]") + _set("systems.last", "row.turn")
    yield _do("if systems.list | length == 1") + _set("systems.first", "row.turn") + _do("endif")
    yield _do("else") + _set("systems.others", "systems.others + [row]") + _do("endif")
    yield _do("endfor")
    yield _set("ns.rows", "systems.others")
    yield _set("ns.text", f"systems.list | join({_quoted(fmt.merges or '')})")
    yield _do("if ns.text" if fmt.merges is not None else "if systems.list")
    yield _do("for row in ns.rows") + _do("if row.role == 'user'")
    choose = "" if fmt.system_at == "last" else "if systems.place < 0"
    yield (_do(choose) if choose else "") + _set("systems.place", "loop.index0") + (_do("endif") if choose else "")
    yield _do("endif") + _do("endfor")
    wrong = "systems.place != 0" if fmt.system_at == "first" else "systems.place < 0"
    yield _refuse(wrong, f"format {fmt.name}: a system message stands before a user's")
    yield _set("ns.more", "[]")
    yield _do("for row in ns.rows")
    joined = f"{_own(fmt.system_prefix)} ~ ns.text ~ {_own(fmt.system_joiner)} ~ row.content"
    joined = f"({joined}).strip()" if fmt.trims_joined else joined
    yield _do("if loop.index0 == systems.place")
    yield _set("ns.more", f"ns.more + [dict(row, content={joined})]")
    yield _do("else") + _set("ns.more", "ns.more + [row]") + _do("endif")
    yield _do("endfor")
    yield _set("ns.rows", "ns.more")
    yield _do("endif")


def _merge(fmt: Format) -> Lines:
    """Messages of a user in a row, or of an assistant, are one."""
    if fmt.merges is None:
        return
    yield _set("ns.more", "[]")
    yield _do("for row in ns.rows")
    yield _do("if ns.more and row.role in ['user', 'assistant'] and ns.more[-1].role == row.role")
    yield _set("old", "ns.more[-1]")
    spoken = "old.content or row.role == 'user'", "row.content or row.role == 'user'"
    yield _set("text", f"([old.content] if {spoken[0]} else []) + ([row.content] if {spoken[1]} else [])")
    yield _set("one", f"dict(row, content=text | join({_quoted(fmt.merges)}), calls=old.calls + row.calls)")
    yield _set("ns.more", "ns.more[:-1] + [one]")
    yield _do("else") + _set("ns.more", "ns.more + [row]") + _do("endif")
    yield _do("endfor")
    yield _set("ns.rows", "ns.more")


def _check_roles(fmt: Format) -> Lines:
    known = [*fmt.turns, *(["tool"] if fmt.tools and "tool" not in fmt.turns else [])]
    yield _do("for row in ns.rows")
    yield _refuse(f"row.role not in {known}", f"format {fmt.name}: there is no place for this role")
    if fmt.turns.get("system") == Turn():
        yield _refuse(
            "row.role == 'system' and not loop.first", f"format {fmt.name}: one system message, at the beginning"
        )
    if fmt.alternates:
        after_tool = "['assistant', 'tool', 'user']" if fmt.merges is not None else "['assistant', 'tool']"
        follow = f"{{'': ['user'], 'user': ['assistant'], 'assistant': ['user', 'tool'], 'tool': {after_tool}}}"
        yield _do("if row.role != 'system'")
        yield _refuse(
            f"row.role not in {follow}[ns.before]", f"format {fmt.name}: user and assistant take turns, a user first"
        )
        yield _set("ns.before", "row.role") + _do("endif")
    yield _do("endfor")


# ------------------------------------------------------------------------------------------ the turns


def _facts(fmt: Format) -> Lines:
    """Where the last question is, and the first turn of a user."""
    declared = STYLES[fmt.tools].declared if fmt.tools else ""
    if fmt.reasoning is not None:
        wraps = "row.content.startswith('<tool_response>') and row.content.endswith('</tool_response>')"
        yield _set("question", "namespace(first=ns.rows | length, last=ns.rows | length)")
        yield _do("for row in ns.rows") + _do(f"if row.role == 'user' and not ({wraps})")
        yield _do("if question.first == ns.rows | length") + _set("question.first", "loop.index0") + _do("endif")
        yield _set("question.last", "loop.index0")
        yield _do("endif") + _do("endfor")
    if declared == "first":
        yield _set("first_user", "1 if ns.rows and ns.rows[0].role == 'system' else 0")
        wrong = "tools and (first_user >= ns.rows | length or ns.rows[first_user].role != 'user')"
        yield _refuse(wrong, f"format {fmt.name}: tools are written before the first question")
    if fmt.tools in _LISTED:
        yield _set("ns.listed", "''")
        yield _do("for tool in tools") + _set("ns.listed", f"ns.listed ~ {_LISTED[fmt.tools]}") + _do("endfor")
    yield from _last_user()
    moves_system = fmt.system_joiner is not None and fmt.system_at == "last"
    if moves_system or declared == "last":
        yield _set("last_user", "ns.rows[ns.at].turn if ns.at >= 0 else -1")
        moved = [*(["ns.text"] if moves_system else []), *(["tools"] if declared == "last" else [])]
        yield _set("moved", " or ".join(moved))


def _write(fmt: Format) -> Lines:
    style = _STYLES[fmt.tools] if fmt.tools else None
    if fmt.begin:
        yield _say(_own(fmt.begin))
    yield _do("for row in ns.rows")
    for number, role in enumerate(role for role in fmt.turns if role != "tool" or style is None):
        yield _do(f"{'el' if number else ''}if row.role == {_quoted(role)}")
        yield from _turn(fmt, role)
    if style is not None:
        yield _do("else")
        yield from _result(fmt, style)
    yield _do("endif")
    yield _do("endfor")
    if fmt.end:
        yield _do("if not add_generation_prompt") + _say(_own(fmt.end)) + _do("endif")


def _turn(fmt: Format, role: str) -> Lines:
    shape, declared = fmt.turns[role], STYLES[fmt.tools].declared if fmt.tools else ""
    style = _STYLES[fmt.tools] if fmt.tools else None
    if role == "user" and declared == "last" and style is not None:
        yield _do("if tools and loop.index0 == ns.at") + _say(style.declared) + _do("endif")
    if shape.header:
        yield _say(_own(shape.header))
    yield from _opening(fmt, role, declared)
    content = "row.content"
    if role == "assistant":
        yield from _assistant(fmt, shape, content)
        return
    if shape.space:
        yield _say(_quoted(shape.space))
    yield _say(content)
    if role == "system" and declared == "system" and style is not None:
        yield _do("if tools and loop.first")
        yield _say(f"('' if row.own else {_quoted(PARAGRAPH)}) ~ {style.declared}")
        yield _do("endif")
    if shape.terminator + shape.separator:
        yield _say(_own(shape.terminator + shape.separator))


def _opening(fmt: Format, role: str, declared: str) -> Lines:
    """What a first turn begins with: the words about tools and dates."""
    if declared == "first" and role == "user":
        yield _do("if tools and loop.index0 == first_user") + _say(_STYLES[fmt.tools].declared) + _do("endif")
    announced = STYLES[fmt.tools].announced if fmt.tools else ""
    if role == "system" and (fmt.preamble or announced):
        with_tools = f"({_quoted(announced)} if tools else '') ~ " if announced else ""
        yield _do("if loop.first") + _say(f"{with_tools}{_own(fmt.preamble)}") + _do("endif")


def _assistant(fmt: Format, shape: Turn, content: str) -> Lines:
    yield _set("ns.said", "''")
    exact = "true"
    if fmt.reasoning is not None:
        kept = {"all": "true", "none": "false"}.get(
            fmt.reasoning.kept, "loop.index0 > question.last and (loop.last or row.thought)"
        )
        yield _set("thinks", kept)
        yield from _thought(fmt)
        content = r"(row.content.lstrip('\n') if thinks else row.content)"
        if fmt.reasoning.kept == "last":
            exact = "thinks or loop.index0 < question.first"
    exact = _exact(fmt) or exact
    if shape.space:
        content = f"{_quoted(shape.space)} ~ {content}"
    yield _set("ns.said", f"ns.said ~ {content}")
    if fmt.tools:
        yield _do("if row.calls")
        if not STYLES[fmt.tools].content_and_calls:
            yield _refuse("row.content", f"format {fmt.name}: content and tool calls in one turn; split it")
        yield from _STYLES[fmt.tools].calls()
        yield _do("endif")
    yield _set("ns.said", f"ns.said ~ {_own(shape.terminator)}")
    marked = _do("generation") + _say("ns.said") + _do("endgeneration")
    yield marked if exact == "true" else _do(f"if {exact}") + marked + _do("else") + _say("ns.said") + _do("endif")
    if shape.separator:
        separated = _say(_own(shape.separator))
        when = "if not loop.last or add_generation_prompt"
        yield separated if fmt.separates_last else _do(when) + separated + _do("endif")


def _thought(fmt: Format) -> Lines:
    assert fmt.reasoning is not None
    opening, closing = _own(fmt.reasoning.opening), _own(fmt.reasoning.closing)
    thought = r"(row.thought or '').strip('\n')"
    yield _do("if thinks")
    if fmt.reasoning.prompted:
        yield _say(opening) + _set("ns.said", f"{thought} ~ {closing}")
    else:
        yield _set("ns.said", f"{opening} ~ {thought} ~ {closing}")
    yield _do("endif")


def _exact(fmt: Format) -> str:
    """Whether the turn follows the text that asks for it, where later questions move or forget something."""
    declared = STYLES[fmt.tools].declared if fmt.tools else ""
    moves_system = fmt.system_joiner is not None and fmt.system_at == "last"
    if not moves_system and declared != "last" and not fmt.forgets_tools:
        return ""
    behind = "row.turn > last_user" + (" and row.turn > systems.last" if moves_system else "")
    ahead = (
        "not moved or (row.turn < last_user and row.turn < systems.first and not tools)"
        if moves_system
        else "not moved"
    )
    return f"({behind}) or (({ahead}) and not row.dirty)" if fmt.forgets_tools else f"({behind}) or {ahead}"


def _result(fmt: Format, style: _Style) -> Lines:
    role = STYLES[fmt.tools].role
    first = "loop.first or loop.previtem.role != 'tool'"
    last = "loop.last or loop.nextitem.role != 'tool'"
    yield _set("is_first", first)
    yield from style.result()
    if role:
        shape = fmt.turns[role]
        yield _do("if is_first") + _say(_own(shape.header)) + _do("endif")
    yield _say("result")
    if role:
        yield _do(f"if {last}") + _say(_own(shape.terminator + shape.separator)) + _do("endif")


def _ask(fmt: Format) -> Lines:
    yield _do("if add_generation_prompt")
    yield _say(_own(fmt.turns["assistant"].header))
    if fmt.reasoning is not None:
        opening, closing = _own(fmt.reasoning.opening), _own(fmt.reasoning.closing)
        yield _do("if enable_thinking is defined and enable_thinking is not none and not enable_thinking")
        yield _say(f"{opening} ~ {closing}")
        if fmt.reasoning.prompted:
            yield _do("else") + _say(opening)
        yield _do("endif")
    yield _do("endif")


# ------------------------------------------------------------------------------------------ tools

_ARGUMENTS = (
    "((call.arguments if call.arguments.strip() else '{}') if call.arguments is string else call.arguments | tojson)"
)


def _for_calls(*lines: str) -> Lines:
    yield _do("for wrapped in row.calls")
    yield _set("call", "wrapped.function if wrapped.function is defined else wrapped")
    yield from lines
    yield _do("endfor")


def _qwen_calls() -> Lines:
    before = r"('\n' if not loop.first or row.content else '')"
    call = f"""'<tool_call>\\n{{"name": "' ~ call.name ~ '", "arguments": ' ~ {_ARGUMENTS} ~ '}}\\n</tool_call>'"""
    yield from _for_calls(_set("ns.said", f"ns.said ~ {before} ~ {call}"))


def _qwen_result() -> Lines:
    yield _set("result", r"('' if is_first else '\n') ~ '<tool_response>\n' ~ row.content ~ '\n</tool_response>'")


def _mistral_calls(with_id: bool) -> Callable[[], Lines]:
    def calls() -> Lines:
        yield _set("ns.said", "ns.said ~ '[TOOL_CALLS]['")
        id_check = _refuse(
            f"not wrapped.id or wrapped.id | length != {MISTRAL_ID}", f"a call's id has {MISTRAL_ID} characters"
        )
        id = """ ~ ', "id": ' ~ (wrapped.id | tojson)""" if with_id else ""
        call = f"""'{{"name": ' ~ (call.name | tojson) ~ ', "arguments": ' ~ {_ARGUMENTS}{id} ~ '}}'"""
        joined = f"ns.said ~ ('' if loop.first else ', ') ~ {call}"
        yield from _for_calls(*([id_check] if with_id else []), _set("ns.said", joined))
        yield _set("ns.said", "ns.said ~ ']'")

    return calls


def _as_json() -> Lines:
    """`value`: content that is JSON as it stands, other content as a JSON text."""
    yield _set("bare", "row.content.strip()")
    opened = "(bare.startswith('{') and bare.endswith('}')) or (bare.startswith('[') and bare.endswith(']'))"
    number = "bare.removeprefix('-').replace('.', '', 1).isdigit() and not bare.endswith('.')"
    number += (
        " and (bare == '0' or not bare.removeprefix('-').startswith('0') or bare.removeprefix('-').startswith('0.'))"
    )
    quoted = "bare.startswith('\"') and bare.endswith('\"') and bare | length > 1"
    words = "bare in ['true', 'false', 'null']"
    yield _set("value", f"bare if {opened} or ({number}) or ({quoted}) or {words} else row.content | tojson")


def _mistral_v2_result() -> Lines:
    yield _refuse("not row.name", "a tool message has the name of its tool")
    yield from _as_json()
    text = """'[TOOL_RESULTS][{"name": ' ~ (row.name | tojson) ~ ', "content": ' ~ value ~ '}][/TOOL_RESULTS]'"""
    yield _set("result", text)


def _check_id() -> str:
    return _refuse(f"not row.id or row.id | length != {MISTRAL_ID}", f"a call's id has {MISTRAL_ID} characters")


def _mistral_v3_result() -> Lines:
    yield _check_id()
    yield from _as_json()
    text = """'[TOOL_RESULTS]{"content": ' ~ value ~ ', "call_id": ' ~ (row.id | tojson) ~ '}[/TOOL_RESULTS]'"""
    yield _set("result", text)


def _mistral_v7_result() -> Lines:
    yield _check_id()
    yield _set("result", "'[TOOL_RESULTS]' ~ row.id ~ '[TOOL_CONTENT]' ~ row.content ~ '[/TOOL_RESULTS]'")


def _llama_calls() -> Lines:
    yield _refuse("row.calls | length > 1", "one tool call a turn; give each call a turn of its own")
    call = f"""'{{"name": "' ~ call.name ~ '", "parameters": ' ~ {_ARGUMENTS} ~ '}}'"""
    yield from _for_calls(_set("ns.said", f"ns.said ~ {call}"))


def _llama_result() -> Lines:
    head = r"'<|start_header_id|>ipython<|end_header_id|>\n\n'"
    yield _set("result", f"{head} ~ (row.content | tojson) ~ '<|eot_id|>'")


_QWEN_TOOLS = f"{_quoted(TOOLS_BEFORE)} ~ ns.listed ~ {_quoted(TOOLS_AFTER)}"
_MISTRAL_TOOLS = "'[AVAILABLE_TOOLS]' ~ (tools | tojson) ~ '[/AVAILABLE_TOOLS]'"
_STYLES = {
    "qwen": _Style(_QWEN_TOOLS, _qwen_calls, _qwen_result),
    "mistral_v2": _Style(_MISTRAL_TOOLS, _mistral_calls(False), _mistral_v2_result),
    "mistral_v3": _Style(_MISTRAL_TOOLS, _mistral_calls(True), _mistral_v3_result),
    "mistral_v7": _Style(_MISTRAL_TOOLS, _mistral_calls(True), _mistral_v7_result),
    "llama3_1": _Style(f"{_quoted(LLAMA_TOOLS)} ~ ns.listed", _llama_calls, _llama_result),
}
_LISTED = {"qwen": r"'\n' ~ (tool | tojson)", "llama3_1": r"(tool | tojson(indent=4)) ~ '\n\n'"}  # each tool, by style
