"""Families from promptsource files: their Jinja is read, not run, and becomes patterns and expressions of ours.

    {{premise}} Does it follow that "{{hypothesis}}"? ||| {{ answer_choices[label] }}

    prompt      {premise} Does it follow that "{hypothesis}"?
    answer      {value_1}
    value_1     ("item", ("list", ("is", "Yes"), ("is", "No")), ("name", "label"))

A template is translated whole or not at all: what cannot be is listed with its reason. A condition around a whole
template becomes a condition on rows (`Template.when`). https://github.com/bigscience-workshop/promptsource
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, TemplateSyntaxError, nodes

from itjax.data.expression import Expression
from itjax.data.fields import Field
from itjax.data.templates import Family, Template, names

PARTING = "|||"
LARGEST = 4 << 20  # bytes of a file
DEEPEST = 2  # loops inside each other: of a thousand turns each, so that no row takes long
_FILTERS = {  # Jinja's name -> our operation, and the operands that stand for arguments not given
    "lower": ("lower", ()),
    "upper": ("upper", ()),
    "capitalize": ("capitalize", ()),
    "title": ("title", ()),
    "trim": ("strip", (None,)),
    "join": ("join", ("",)),
    "replace": ("replace", ()),
    "length": ("length", ()),
    "count": ("length", ()),
    "int": ("number", ()),
}
_ARGUMENTS = {"trim": 1, "join": 1, "replace": 2}
_METHODS = {"lower": ("lower", 0), "upper": ("upper", 0), "strip": ("strip", 1), "index": ("position", 1)}
_FUNCTIONS = ("range", "zip")
_COMPARISONS = {"eq": "==", "ne": "!=", "lt": "<", "lteq": "<=", "gt": ">", "gteq": ">=", "in": "in", "notin": "not in"}


@dataclass(frozen=True)
class Imported:
    """What became of a file: the family, and the templates that are not in it, each with the reason."""

    family: Family
    refused: Mapping[str, str]


class _Loader(yaml.SafeLoader):
    """Reads promptsource's tagged mappings as mappings; any other tag is refused."""


for _tag in ("!Template", "!TemplateMetadata"):
    _Loader.add_constructor(_tag, lambda loader, node: loader.construct_mapping(node, deep=True))


def read(path: Path) -> Imported:
    """The family of a promptsource file. Raises ValueError where no template can be used."""
    return parse(_text(path), name=path.stem, place=str(path))


def parse(text: str, *, name: str, place: str) -> Imported:
    try:
        loader = _Loader(text)
        try:
            document = loader.get_single_data()
        finally:
            loader.dispose()
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"{place}: not a promptsource file: {' '.join(str(error).split())}") from None
    if not isinstance(document, dict) or not isinstance(document.get("templates"), dict):
        raise ValueError(f"{place}: not a promptsource file: it has no templates")
    templates: list[Template] = []
    expressions: dict[str, Expression] = {}
    refused: dict[str, str] = {}
    for entry in document["templates"].values():
        title = _title(entry, place)
        while title in refused or any(title == one.name for one in templates):
            title += "'"
        try:
            template, made = _Translation(title, len(templates)).template(entry)
        except (_Refused, RecursionError) as error:
            refused[title] = str(error) or "it is nested too deeply"
            continue
        templates.append(template)
        expressions |= made
    if not templates:
        raise ValueError(f"{place}: none of its templates can be used: {refused}")
    family = Family(
        name=name,
        templates=tuple(templates),
        fields=_fields(templates, expressions),
        about=f"promptsource: {document.get('dataset', name)}",
        expressions=expressions,
        refused=refused,
    )
    return Imported(family, refused)


def _text(path: Path) -> str:
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    if path.stat().st_size > LARGEST:
        raise ValueError(f"{path}: larger than {LARGEST >> 20} MiB; split it")
    try:
        return path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 at byte {error.start}; save it as UTF-8") from None


def _title(entry: Any, place: str) -> str:
    if not isinstance(entry, dict) or not isinstance(entry.get("jinja"), str):
        raise ValueError(f"{place}: a template without jinja; each needs name and jinja")
    return str(entry.get("name") or entry.get("id") or "unnamed")


def _fields(templates: Sequence[Template], expressions: Mapping[str, Expression]) -> dict[str, Field]:
    """Columns that patterns say as they stand. Those that only some say may be missing from rows."""
    said = [{name for pattern in one.patterns for name in names(pattern)} - set(expressions) for one in templates]
    every = sorted(set().union(*said))
    return {name: Field(optional=not all(name in one for one in said)) for name in every}


class _Refused(Exception):
    """Why a template is not translated."""


@dataclass
class _Translation:
    """One template on its way: the expressions made so far, and the names that `set` has bound."""

    title: str
    number: int  # of the template in its family, so that names of expressions are its own
    choices: Expression | None = None
    bound: dict[str, Expression] = field(default_factory=dict)
    made: dict[str, Expression] = field(default_factory=dict)
    draws: int = 0
    depth: int = 0  # of loops

    def template(self, entry: Mapping[str, Any]) -> tuple[Template, dict[str, Expression]]:
        if entry.get("answer_choices"):
            self.choices = self._choices(_parsed(entry["answer_choices"]))
        when, body = self._guard(_parsed(entry["jinja"]))
        prompt, answer = _parted(body)
        template = Template(
            name=self.title,
            prompt=self._pattern(prompt),
            answer=self._pattern(answer),
            tags=() if _is_original(entry) else ("inverted",),
            when=self._named(when) if when else "",
            trim=True,
        )
        if not template.answer:
            raise _Refused("it has no answer")
        return template, self.made

    def _choices(self, parts: Sequence[nodes.Node]) -> Expression:
        """The list of answers. Its parting signs are those of the template, so that data cannot hold one."""
        match parts:
            case [nodes.Filter(name="join", node=things, args=[nodes.Const(value=between)])] if between == PARTING:
                return ("strip each", self._value(things))
        return ("list", *(("strip", self._joined(side), ("is", None)) for side in _sides(parts)))

    def _guard(self, body: list[nodes.Node]) -> tuple[Expression | None, list[nodes.Node]]:
        """The condition around a whole template, and what is inside."""
        inner = [node for node in body if not _is_blank(node)]
        if len(inner) == 1 and isinstance(inner[0], nodes.If) and not inner[0].else_ and not inner[0].elif_:
            parts = _flat(inner[0].body)
            if any(isinstance(part, nodes.TemplateData) and PARTING in part.data for part in parts):
                return self._value(inner[0].test), parts
        return None, body

    def _pattern(self, parts: Sequence[nodes.Node]) -> str:
        """The text of the parts as a pattern; blank ends are cut, as promptsource cuts them."""
        pieces = []
        for part in parts:
            if isinstance(part, nodes.TemplateData):
                pieces.append(_literal(part.data))
            elif isinstance(part, nodes.Const) and isinstance(part.value, str):
                pieces.append(_literal(part.value))
            elif isinstance(part, nodes.Name) and part.name not in self.bound and part.name != "answer_choices":
                pieces.append(f"{{{part.name}}}")
            elif isinstance(part, nodes.Assign):
                self._bind(part)
            else:
                pieces.append(f"{{{self._named(self._value(part))}}}")
        return "".join(pieces).strip()

    def _named(self, value: Expression) -> str:
        for name, known in self.made.items():
            if known == value:
                return name
        name = f"value_{self.number}_{len(self.made)}"
        self.made[name] = value
        return name

    def _joined(self, parts: Sequence[nodes.Node]) -> Expression:
        values = []
        for part in parts:
            if isinstance(part, nodes.Assign):
                raise _Refused("it sets a name in the middle of a condition, a loop or its choices")
            values.append(("is", part.data) if isinstance(part, nodes.TemplateData) else self._value(part))
        return ("text", *values)

    def _bind(self, part: nodes.Assign) -> None:
        if not isinstance(part.target, nodes.Name):
            raise _Refused("it sets several names at a time")
        self.bound[part.target.name] = self._value(part.node)

    def _value(self, node: nodes.Node | None) -> Expression:
        translate = getattr(self, f"_{type(node).__name__.lower()}", None)
        if translate is None or not isinstance(node, _KNOWN):
            raise _Refused(f"{type(node).__name__} is not translated")
        return translate(node)

    def _const(self, node: nodes.Const) -> Expression:
        return ("is", node.value)

    def _name(self, node: nodes.Name) -> Expression:
        if node.name == "answer_choices":
            if self.choices is None:
                raise _Refused("it speaks of answer_choices and has none")
            return self.choices
        return self.bound.get(node.name, ("name", node.name))

    def _getattr(self, node: nodes.Getattr) -> Expression:
        return ("item", self._value(node.node), ("is", node.attr))

    def _getitem(self, node: nodes.Getitem) -> Expression:
        if isinstance(node.arg, nodes.Slice):
            if node.arg.step is not None:
                raise _Refused("it slices with a step")
            ends = [("is", None) if end is None else self._value(end) for end in (node.arg.start, node.arg.stop)]
            return ("slice", self._value(node.node), *ends)
        return ("item", self._value(node.node), self._value(node.arg))

    def _list(self, node: nodes.List | nodes.Tuple) -> Expression:
        return ("list", *map(self._value, node.items))

    _tuple = _list

    def _dict(self, node: nodes.Dict) -> Expression:
        return ("pairs", *(self._value(part) for pair in node.items for part in (pair.key, pair.value)))

    def _add(self, node: nodes.Add) -> Expression:
        return ("add", self._value(node.left), self._value(node.right))

    def _sub(self, node: nodes.Sub) -> Expression:
        return ("sub", self._value(node.left), self._value(node.right))

    def _concat(self, node: nodes.Concat) -> Expression:
        return ("text", *map(self._value, node.nodes))

    def _neg(self, node: nodes.Neg) -> Expression:
        return ("negative", self._value(node.node))

    def _not(self, node: nodes.Not) -> Expression:
        return ("not", self._value(node.node))

    def _and(self, node: nodes.And) -> Expression:
        left = self._value(node.left)
        return ("if", left, self._value(node.right), left)

    def _or(self, node: nodes.Or) -> Expression:
        left = self._value(node.left)
        return ("if", left, left, self._value(node.right))

    def _compare(self, node: nodes.Compare) -> Expression:
        if len(node.ops) != 1:
            raise _Refused("it compares more than two things at a time")
        return (_COMPARISONS[node.ops[0].op], self._value(node.expr), self._value(node.ops[0].expr))

    def _condexpr(self, node: nodes.CondExpr) -> Expression:
        otherwise = ("is", "") if node.expr2 is None else self._value(node.expr2)
        return ("if", self._value(node.test), self._value(node.expr1), otherwise)

    def _if(self, node: nodes.If) -> Expression:
        otherwise = self._joined(_flat(node.else_))
        for other in reversed(node.elif_):
            otherwise = ("if", self._value(other.test), self._joined(_flat(other.body)), otherwise)
        return ("if", self._value(node.test), self._joined(_flat(node.body)), otherwise)

    def _for(self, node: nodes.For) -> Expression:
        if node.else_ or node.test is not None or node.recursive:
            raise _Refused("its loop has a condition, an else or recursion")
        targets = node.target.items if isinstance(node.target, nodes.Tuple) else [node.target]
        names = tuple(target.name for target in targets if isinstance(target, nodes.Name))
        if len(names) < len(targets):
            raise _Refused("its loop unpacks more than names")
        outer = self.bound
        self.bound = {name: value for name, value in outer.items() if name not in (*names, "loop")}
        hidden = {name for value in (*self.bound.values(), self.choices or ()) for name in _free(value)}
        if hidden & {*names, "loop"}:  # what stands for a name would be read inside the loop
            raise _Refused("its loop reuses a name that something set before is made of")
        self.depth += 1
        if self.depth > DEEPEST:
            raise _Refused(f"it has more than {DEEPEST} loops inside each other")
        body = self._joined(_flat(node.body))
        self.bound, self.depth = outer, self.depth - 1
        return ("for", names, self._value(node.iter), body)

    def _filter(self, node: nodes.Filter) -> Expression:
        if node.kwargs or node.dyn_args or node.dyn_kwargs or node.node is None:
            raise _Refused(f"its filter {node.name!r} has arguments by name")
        value, arguments = self._value(node.node), [self._value(argument) for argument in node.args]
        if node.name == "choice" and not arguments:
            self.draws += 1
            return ("draw", f"{self.number}.{self.draws}", value)
        if node.name not in _FILTERS or len(arguments) > _ARGUMENTS.get(node.name, 0):
            raise _Refused(f"filter {node.name!r} is not translated")
        operation, defaults = _FILTERS[node.name]
        if node.name == "replace" and len(arguments) != 2:
            raise _Refused("its replace does not say what by what")
        return (operation, value, *(arguments or [("is", default) for default in defaults]))

    def _call(self, node: nodes.Call) -> Expression:
        if node.kwargs or node.dyn_args or node.dyn_kwargs:
            raise _Refused("it calls with arguments by name")
        arguments = [self._value(argument) for argument in node.args]
        if isinstance(node.node, nodes.Name) and node.node.name in _FUNCTIONS:
            return (node.node.name, *arguments)
        if isinstance(node.node, nodes.Getattr):
            method, owner = node.node.attr, self._value(node.node.node)
            if method == "join" and len(arguments) == 1:
                return ("join", arguments[0], owner)
            if method in _METHODS and len(arguments) == _METHODS[method][1]:
                return (_METHODS[method][0], owner, *arguments)
        raise _Refused("it calls a function that is not translated")


_KNOWN = (
    *(nodes.Const, nodes.Name, nodes.Getattr, nodes.Getitem, nodes.List, nodes.Tuple, nodes.Dict, nodes.Add),
    *(nodes.Sub, nodes.Concat, nodes.Neg, nodes.Not, nodes.And, nodes.Or, nodes.Compare, nodes.CondExpr),
    *(nodes.If, nodes.For, nodes.Filter, nodes.Call),
)


def _parsed(text: str) -> list[nodes.Node]:
    try:
        return _flat(Environment().parse(text).body)
    except TemplateSyntaxError as error:
        raise _Refused(f"its Jinja cannot be read: {error.message} (line {error.lineno})") from None


def _flat(body: Sequence[nodes.Node]) -> list[nodes.Node]:
    """Statements and the parts of outputs, in order."""
    return [part for node in body for part in (node.nodes if isinstance(node, nodes.Output) else [node])]


def _parted(parts: Sequence[nodes.Node]) -> tuple[list[nodes.Node], list[nodes.Node]]:
    """What is before the parting sign and what is behind it."""
    sides = _sides(parts)
    if len(sides) != 2:
        raise _Refused(f"it has {len(sides) - 1} signs {PARTING!r} outside of conditions, not one")
    return sides[0], sides[1]


def _sides(parts: Sequence[nodes.Node]) -> list[list[nodes.Node]]:
    """The parts between parting signs."""
    sides: list[list[nodes.Node]] = [[]]
    for part in parts:
        if not isinstance(part, nodes.TemplateData):
            sides[-1].append(part)
            continue
        first, *others = part.data.split(PARTING)
        sides[-1].append(nodes.TemplateData(first))
        sides.extend([nodes.TemplateData(other)] for other in others)
    return sides


def _free(expression: Expression) -> Iterator[str]:
    """The names of columns that an expression reads, and those of its loops."""
    if expression and expression[0] == "name":
        yield expression[1]
    elif expression and expression[0] != "is":
        for part in expression[1:]:
            if isinstance(part, tuple):
                yield from _free(part)


def _is_blank(node: nodes.Node) -> bool:
    return isinstance(node, nodes.TemplateData) and not node.data.strip()


def _literal(text: str) -> str:
    return text.replace("{", "{{").replace("}", "}}")


def _is_original(entry: Mapping[str, Any]) -> bool:
    metadata = entry.get("metadata")
    return not isinstance(metadata, dict) or metadata.get("original_task") is not False


def reasons(refused: Mapping[str, str]) -> Iterator[str]:
    """A line for each template that was left out."""
    return (f"{name}: {reason}" for name, reason in refused.items())
