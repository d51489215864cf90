"""Chat templates of models, rendered where they can do no harm: nothing but text in and out, bounded in size and time.

Templates come with a model's files and are programs. They run in jinja2's immutable sandbox, without the file system,
without attributes that lead out, and every loop, sum and call is counted against a budget.
"""

import datetime
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from threading import local
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

MAX_SOURCE = 1_000_000  # characters of a template
MAX_CHARACTERS = 16_000_000  # of any text a template makes
MAX_STEPS = 1_000_000  # turns of all loops of one rendering
MAX_SECONDS = 5.0
MAX_INDENT = 64
MAX_NUMBER = 1 << 63
STRING_METHODS = (
    *("capitalize", "count", "endswith", "find", "index", "isalnum", "isalpha", "isdigit", "isspace", "join", "lower"),
    *("lstrip", "removeprefix", "removesuffix", "replace", "rfind", "rindex", "rsplit", "rstrip", "split"),
    *("splitlines", "startswith", "strip", "title", "upper"),
)
UNBOUNDED_FILTERS = ("batch", "center", "format", "pprint", "random", "slice", "urlize", "wordwrap", "xmlattr")
FROM, UNTIL = "\ufdd0", "\ufdd1"  # noncharacters around what `{% generation %}` marks


class TooMuch(Exception):
    """A template went over its budget."""


class _Budget(local):
    """What is left to the rendering of this thread."""

    steps = 0
    until = 0.0
    marks = False

    def start(self, *, marks: bool) -> None:
        self.steps, self.until, self.marks = MAX_STEPS, time.monotonic() + MAX_SECONDS, marks

    def spend(self, steps: int) -> None:
        self.steps -= steps
        if self.steps < 0:
            raise TooMuch(f"it takes more than {MAX_STEPS:,} steps")
        if time.monotonic() > self.until:
            raise TooMuch(f"it takes more than {MAX_SECONDS:.0f} seconds")


_budget = _Budget()


def render(source: str, variables: Mapping[str, Any], *, today: datetime.date) -> str:
    """The text of a template. A template that fails, refuses or goes over its budget is a ValueError."""
    return _render(source, variables, today=today, marks=False)


def render_marked(source: str, variables: Mapping[str, Any], *, today: datetime.date) -> tuple[str, list[slice]]:
    """The text, and the stretches between `{% generation %}` and `{% endgeneration %}`."""
    marked = _render(source, variables, today=today, marks=True)
    text, spans = "", []
    for number, part in enumerate(marked.replace(UNTIL, FROM).split(FROM)):
        if number % 2:
            spans.append(slice(len(text), len(text) + len(part)))
        text += part
    return text, spans


def _render(source: str, variables: Mapping[str, Any], *, today: datetime.date, marks: bool) -> str:
    try:
        template = _compile(source)
        _budget.start(marks=marks)
        return template.render({"strftime_now": today.strftime, **variables})
    except TooMuch as error:
        raise ValueError(f"refused: {error}") from None
    except jinja2.exceptions.SecurityError as error:
        raise ValueError(f"refused: it reaches for what a template must not touch ({error})") from None
    except (RecursionError, MemoryError) as error:
        raise ValueError(f"refused: it does not end ({type(error).__name__})") from None
    except jinja2.TemplateError as error:
        raise ValueError(f"{error.message or type(error).__name__}") from None
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
        raise ValueError(f"it fails with {type(error).__name__}: {error}") from None


@lru_cache(maxsize=64)
def _compile(source: str) -> jinja2.Template:
    if len(source) > MAX_SOURCE:
        raise TooMuch(f"it has {len(source):,} characters, more than {MAX_SOURCE:,}")
    environment = _Environment()
    tree = _Counted().visit(environment.parse(source))
    return environment.template_class.from_code(environment, environment.compile(tree), environment.make_globals(None))


class _Counted(NodeTransformer):
    """Every loop and every joining of texts goes by the budget."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.iter = _call("counted", node.iter, node)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _call("joined", nodes.List(node.nodes, lineno=node.lineno), node)


def _call(name: str, argument: nodes.Node, where: nodes.Node) -> nodes.Call:
    assert isinstance(argument, nodes.Expr)
    function = nodes.EnvironmentAttribute(name, lineno=where.lineno)
    return nodes.Call(function, [argument], [], None, None, lineno=where.lineno)


class _Generation(Extension):
    """`{% generation %}`: what the assistant says. It changes nothing of the text."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Callable[[], str]) -> str:
        return f"{FROM}{caller()}{UNTIL}" if _budget.marks else caller()


class _Environment(ImmutableSandboxedEnvironment):
    """What templates of models expect to find, and no more."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols], finalize=_countable
        )
        for name in UNBOUNDED_FILTERS:
            del self.filters[name]
        self.filters["tojson"] = _tojson
        self.filters["indent"] = _indent
        self.filters["join"] = _join
        self.filters["string"] = _text
        self.filters["replace"] = lambda text, old, new, count=-1: _replace(str(text), str(old), str(new), count)
        del self.globals["lipsum"]
        self.globals["raise_exception"] = _raise_exception

    concat = staticmethod(lambda parts: _joined(list(parts)))

    def unsafe_undefined(self, obj: Any, attribute: str) -> Any:
        raise jinja2.exceptions.SecurityError(f"{attribute!r} of {type(obj).__name__}")

    @staticmethod
    def counted(items: Any) -> Any:
        """The items of a loop, paid for."""
        if isinstance(items, (list, tuple, str, range, Mapping)):
            _budget.spend(1 + len(items))
            return items
        return _paid(items)

    @staticmethod
    def joined(parts: list[Any]) -> str:
        return _joined([_text(part) for part in parts])

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        _budget.spend(1)
        if operator == "%" and isinstance(left, str):
            raise TooMuch("it formats text with %")
        if operator == "*" and not _is_number(left, right):
            _check_size(_size(left) * _size(right))
        if operator == "+" and not _is_number(left, right):
            _check_size(_size(left) + _size(right))
        if operator == "**" and _is_number(left, right) and abs(right) > 64:
            raise TooMuch(f"it computes a power of {right}")
        value = super().call_binop(context, operator, left, right)
        if isinstance(value, int) and abs(value) > MAX_NUMBER:
            raise TooMuch("its numbers are too large")
        return value

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        _budget.spend(1)
        owner = getattr(__obj, "__self__", None)
        if isinstance(owner, str):
            kwargs = {name: value for name, value in kwargs.items() if name not in ("_loop_vars", "_block_vars")}
            return _call_of_text(owner, __obj.__name__, *args, **kwargs)
        return super().call(__context, __obj, *args, **kwargs)


def _call_of_text(text: str, name: str, *args: Any, **kwargs: Any) -> Any:
    if name not in STRING_METHODS:
        raise TooMuch(f"it calls {name!r} of a text")
    if name == "join":
        return _join(args[0], text)
    if name == "replace":
        return _replace(text, *args, **kwargs)
    return getattr(text, name)(*args, **kwargs)


def _replace(text: str, old: str, new: str, count: int = -1) -> str:
    _check_size(len(text) + (text.count(old) if old else len(text) + 1) * len(new))
    return text.replace(old, new, -1 if count is None else count)


def _join(items: Iterable[Any], separator: str = "", attribute: Any = None) -> str:
    parts = [_text(item if attribute is None else item[attribute]) for item in _paid(items)]
    _check_size(sum(map(len, parts)) + len(separator) * len(parts))
    return str(separator).join(parts)


def _joined(parts: Sequence[str]) -> str:
    _budget.spend(1)
    _check_size(sum(map(len, parts)))
    return "".join(parts)


def _indent(text: str, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    margin = width if isinstance(width, str) else " " * _bounded_indent(width)
    _check_size(len(text) + len(margin) * (text.count("\n") + 1))
    lines = text.split("\n")
    return "\n".join(margin + line if (n or first) and (line or blank) else line for n, line in enumerate(lines))


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """JSON without the escapes of HTML, as models were trained on."""
    indent = None if indent is None else _bounded_indent(indent)
    _countable(value)
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _bounded_indent(width: int) -> int:
    if width > MAX_INDENT:
        raise TooMuch(f"it indents by {width}")
    return width


def _text(value: Any) -> str:
    return value if isinstance(value, str) else str(_countable(value))


def _countable(value: Any) -> Any:
    """The value, if it can be written within the budget: a list that holds itself many times over cannot."""
    if isinstance(value, Mapping):
        _budget.spend(len(value))
        for key, item in value.items():
            _countable(key), _countable(item)
    elif isinstance(value, (list, tuple)):
        _budget.spend(len(value))
        for item in value:
            _countable(item)
    return value


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _paid(items: Iterable[Any]) -> Iterator[Any]:
    for item in items:
        _budget.spend(1)
        yield item


def _is_number(*values: Any) -> bool:
    return all(isinstance(value, (int, float)) for value in values)


def _size(value: Any) -> int:
    if isinstance(value, int):
        return max(value, 0)
    return len(value) if hasattr(value, "__len__") else 1


def _check_size(characters: int) -> None:
    if characters > MAX_CHARACTERS:
        raise TooMuch(f"it makes a text of more than {MAX_CHARACTERS:,} characters")
