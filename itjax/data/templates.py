"""How a row becomes a conversation: patterns with {fields}, and a choice of phrasing that never changes by chance.

A pattern is text with fields; a row fills them in one pass, so what a row holds is never read as a pattern.

    pattern   Note: {note}            "{{" and "}}" are literal braces
    row       {"note": "{name} {{"}
    text      Note: {name} {{         data is inert: its braces stay

A family is the phrasings of one kind of task, with the fields that they speak of (`itjax/data/fields.py`); families are
read from files (`itjax/data/library`).
"""

import difflib
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple, TypeVar

from itjax.base.records import Conversation, Message
from itjax.data import expression, fields
from itjax.data.expression import Expression
from itjax.data.fields import MARKERS, Field, Listed
from itjax.data.strict_json import RowError

TAGS = ("held_out", "inverted", "chain_of_thought", "few_shot")
EXEMPLARS = "exemplars"  # the field where a phrasing wants its worked examples
STYLES = ("turns", "text", "both")

_PIECES = re.compile(r"\{\{|\}\}|\{([A-Za-z_][A-Za-z0-9_]*)\}|[{}]")
_T = TypeVar("_T")


@dataclass(frozen=True)
class Template:
    """One phrasing of a task: what is asked, what is answered, and who the assistant is told to be.

    `heldout` phrasings are for measuring only: whether a model follows words that it was not trained on.
    """

    name: str
    prompt: str
    answer: str
    system: str = ""
    heldout: bool = False
    tags: tuple[str, ...] = ()
    systems: tuple[str, ...] = ()  # system prompts, of which one is drawn; an empty one is none
    markers: tuple[str, ...] = ()  # of listed options, of which one is drawn; none: those of the family
    words: tuple[str, ...] = ()  # what this phrasing calls the default options, in their order
    exemplar: str = ""  # how one worked example is written where the prompt says {exemplars}
    when: str = ""  # the expression that tells whether the phrasing fits a row
    trim: bool = False  # whether blank ends of the filled texts are cut

    @property
    def inverted(self) -> bool:
        """Whether the question is asked for: the answer holds what is otherwise given."""
        return "inverted" in self.tags

    @property
    def patterns(self) -> tuple[str, ...]:
        return (self.prompt, self.answer, self.system, *self.systems, self.exemplar)


@dataclass(frozen=True)
class FewShot:
    """How worked examples stand before a question.

    `turns`: as earlier turns that are not learned. Their answers end as the model's own will, no delimiter can be
    confused with data, and formats mark them as what they are. `text`: inside the prompt, question and answer parted by
    `delimiter` and examples by `separator`, as FLAN does (https://github.com/google-research/FLAN). `both`: drawn.
    """

    style: str = "turns"
    lead: str = ""  # of the text style: said before the first example
    delimiter: str = "\n\n"
    separator: str = "\n\n\n"
    budget: int = 4000  # characters of all examples together (or whatever `measure` of `Phrased` counts)


@dataclass(frozen=True)
class Family:
    """The phrasings of one kind of task, and the fields that they speak of."""

    name: str
    templates: tuple[Template, ...]
    fields: Mapping[str, Field]
    about: str = ""
    markers: tuple[str, ...] = MARKERS
    few_shot: FewShot = field(default_factory=FewShot)
    sample: Mapping[str, Any] = field(default_factory=dict)  # a row that every phrasing fits
    expressions: Mapping[str, Expression] = field(default_factory=dict)  # further names, made from the raw row
    refused: Mapping[str, str] = field(default_factory=dict)  # templates of the file that are not here, and why

    @cached_property
    def names(self) -> dict[str, tuple[str, str]]:
        """What patterns may say: name -> field and ending."""
        found = {f"{name}{end}": (name, end) for name, one in self.fields.items() for end in fields.ENDINGS[one.kind]}
        return found | {name: (name, "") for name in self.fields}

    @cached_property
    def said(self) -> dict[str, frozenset[str]]:
        """Template -> all names that its patterns say."""
        return {
            one.name: frozenset(name for pattern in one.patterns for name in names(pattern)) for one in self.templates
        }

    def template(self, name: str) -> Template:
        known = [one.name for one in self.templates]
        if name not in known:
            raise ValueError(f"family {self.name!r}: template {name!r} is unknown; {nearest(name, known)}")
        return self.templates[known.index(name)]

    @cached_property
    def needs(self) -> dict[str, frozenset[str]]:
        """Template -> the fields that a row must have for it."""
        found = {}
        for template, said in self.said.items():
            says = [self.names[name] for name in said - {EXEMPLARS} if name not in self.expressions]
            marks = {self.fields[key].one_of for key, ending in says if ending == "_mark"}
            found[template] = frozenset({key for key, _ in says} | marks)
        return found

    def fits(self, template: Template, row: "Row") -> bool:
        """Whether the row has all that the template says."""
        if not row.values.keys() >= self.needs[template.name]:
            return False
        if template.words and any(self.fields[name].kind == "list" for name in row.given):
            return False
        return not template.when or bool(expression.evaluate(self.expressions[template.when], row.raw, _refuse_draw))


@dataclass(frozen=True)
class Row:
    """A row as a family reads it."""

    values: Mapping[str, Any]  # field -> value of its kind
    given: frozenset[str]  # fields that are the row's own, not defaults
    raw: Mapping[str, Any]


@dataclass(frozen=True)
class Lots:
    """Numbers that look random and follow from a seed, a key and a round: the same in every process."""

    seed: int
    key: str
    round: int

    def number(self, what: str) -> int:
        digest = hashlib.blake2b(f"{self.seed}/{self.round}/{what}/{self.key}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big")

    def share(self, what: str) -> float:
        """In [0, 1)."""
        return self.number(what) / 2**64

    def pick(self, things: Sequence[_T], what: str) -> _T:
        return things[self.number(what) % len(things)] if len(things) > 1 else things[0]

    def order(self, count: int, what: str) -> list[int]:
        text = f"{self.seed}/{self.round}/{what}/{self.key}".encode()
        digest = hashlib.shake_128(text).digest(8 * count)
        return sorted(range(count), key=lambda number: digest[8 * number : 8 * number + 8])


# ---------------------------------------------------------------------------------------------- patterns


def fill(pattern: str, row: Mapping[str, str], *, name: str = "pattern") -> str:
    """The pattern with every `{field}` replaced by the row's value; `name` says where the pattern is from in errors."""

    def piece(match: re.Match[str]) -> str:
        if match[0] in ("{{", "}}"):
            return match[0][0]
        if match[1] is None:
            raise ValueError(f"{name}: {_lone(match)}")
        if match[1] not in row:
            raise ValueError(f"{name}: field {match[1]!r} is not in the row; {nearest(match[1], row)}")
        return row[match[1]]

    return _PIECES.sub(piece, pattern)


def names(pattern: str) -> list[str]:
    """The fields that a pattern says, in order. Raises ValueError for a lone brace."""
    found = []
    for match in _PIECES.finditer(pattern):
        if match[1] is None and match[0] not in ("{{", "}}"):
            raise ValueError(_lone(match))
        if match[1] is not None:
            found.append(match[1])
    return found


def nearest(name: str, known: Iterable[str]) -> str:
    """A way out for a name that is none of those known."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1)
    return (f"did you mean {close[0]!r}? " if close else "") + f"Known: {sorted(known)}"


def _lone(match: re.Match[str]) -> str:
    return f"lone {match[0]!r} at character {match.start()}; write {match[0] * 2!r} for a brace"


# ---------------------------------------------------------------------------------------------- rows of texts


def conversation(template: Template, row: Mapping[str, str], *, source: str, key: str) -> Conversation:
    """The row in the template's words: an optional system turn, the question and the answer."""
    turns = (("system", template.system), ("user", template.prompt), ("assistant", template.answer))
    place = f"{key}: template {template.name!r}"
    return Conversation(
        messages=tuple(Message(role, fill(pattern, row, name=place)) for role, pattern in turns if pattern),
        source=source,
        key=key,
        template=template.name,
        tags={"template_split": "heldout" if template.heldout else "seen"},
    )


def choose(templates: Sequence[Template], *, key: str, seed: int) -> Template:
    """The phrasing of the example `key`: spread evenly, and the same in every process and on every machine."""
    if not templates:
        raise ValueError(f"{key}: there are no templates to choose from; give at least one")
    digest = hashlib.blake2b(f"{seed}/{key}".encode(), digest_size=8).digest()
    return templates[int.from_bytes(digest, "big") % len(templates)]


# ---------------------------------------------------------------------------------------------- rows of any values


def read(family: Family, raw: Mapping[str, Any], *, columns: Mapping[str, str], place: str) -> Row:
    """The fields of a row; `columns` says which column holds a field that is not named like it. Blank text is none."""
    paths = {name: one.column or name for name, one in family.fields.items()} | dict(columns)
    values, given = {}, set()
    for name, one in family.fields.items():
        value = column(raw, paths[name])
        if not (value is None or (isinstance(value, str) and not value.strip())):
            given.add(name)
        elif one.default is not None:
            value = one.default
        elif one.optional:
            continue
        else:
            raise RowError(f"{place}: {_missing(family, name, paths[name], raw)}", f"there is no {name}")
        try:
            typed = fields.read(value, one)
        except ValueError as error:
            raise RowError(f"{place}: column {paths[name]!r}: {error}", f"{name} is not of its kind") from None
        if not (one.optional and one.kind == "examples" and not _says_all(one, typed)):
            values[name] = typed
    _check_choices(family, values, given, paths, place)
    named = {name: column(raw, path) for name, path in columns.items()}
    return Row(values, frozenset(given), {**raw, **named} if named else raw)


def _says_all(one: Field, examples: Sequence[Mapping[str, str]]) -> bool:
    """Whether each example has all that the field's pattern says."""
    wanted = {*names(one.each)} - {"number"}
    return all(wanted <= example.keys() for example in examples[: one.most or None])


def _check_choices(
    family: Family, values: Mapping[str, Any], given: Iterable[str], paths: Mapping[str, str], place: str
) -> None:
    """That each choice is one of its list, whichever phrasing will say it."""
    for name in given:
        one = family.fields[name]
        if one.one_of in values:
            try:
                fields.position(values[name], values[one.one_of], one.first)
            except ValueError as error:
                why = f"column {paths[name]!r}: {error}"
                raise RowError(f"{place}: {why}", f"{name} is none of {one.one_of}") from None


def column(raw: Mapping[str, Any], path: str) -> Any:
    """A column, or a value inside one: `answers.text.0`. None where there is none."""
    if path in raw:
        return raw[path]
    value: Any = raw
    for part in path.split("."):
        if isinstance(value, Mapping):
            value = value.get(part)
        elif isinstance(value, (list, tuple)) and part.isdecimal() and int(part) < len(value):
            value = value[int(part)]
        else:
            return None
    return value


def _missing(family: Family, name: str, path: str, raw: Mapping[str, Any]) -> str:
    about = f" ({family.fields[name].about})" if family.fields[name].about else ""
    if path in raw:
        return f"column {path!r}{about} is empty; each row needs something for field {name!r} of family {family.name!r}"
    return (
        f"field {name!r} of family {family.name!r}{about} is to come from column {path!r}, which the row does not have; "
        f"name another in columns: {nearest(path, raw)}"
    )


class Rendered(NamedTuple):
    """A row in one template's words."""

    system: str
    prompt: str
    answer: str
    exemplar: str
    conversation: Conversation


def render(
    family: Family, template: Template, row: Row, *, lots: Lots, source: str, place: str, exemplars: str = ""
) -> Rendered:
    """The row in the template's words. `lots` draws what is left open: system prompt, marker, order of options."""
    place = f"{place}: template {template.name!r}"
    said = family.said[template.name]
    texts = _texts(family, template, row, lots, place) | {EXEMPLARS: exemplars}
    system = lots.pick(template.systems, "system") if template.systems else template.system
    patterns = (system, template.prompt, template.answer, template.exemplar)
    filled = [fill(pattern, texts, name=place) for pattern in patterns]
    system, prompt, answer, exemplar = [text.strip() for text in filled] if template.trim else filled
    silent = {one.kind: row.values[name] for name, one in family.fields.items() if _travels(name, one, said, row)}
    calls = silent.get("calls", ())
    if not answer.strip() and not calls:
        raise RowError(f"{place}: the answer is empty; each row needs an answer to learn", "the answer is empty")
    turns = [Message("system", system)] if system else []
    turns += silent.get("turns", ())
    turns += [Message("user", prompt)] if prompt else []
    turns += [Message("assistant", answer, tool_calls=calls)]
    made = Conversation(
        messages=tuple(turns),
        source=source,
        key=lots.key,
        template=f"{family.name}/{template.name}",
        tags=_tags(family, template, row),
        tools=silent.get("tools", ()),
    )
    return Rendered(system, prompt, answer, exemplar, made)


def _tags(family: Family, template: Template, row: Row) -> dict[str, str]:
    tags = {"template_split": "heldout" if template.heldout else "seen", "kind": family.name}
    for name, one in family.fields.items():
        if one.kind == "references" and name in row.values and not template.inverted:
            tags["references"] = json.dumps(row.values[name], ensure_ascii=False)
    return tags


def _travels(name: str, one: Field, said: frozenset[str], row: Row) -> bool:
    return one.kind in fields.STRUCTURES and name not in said and name in row.values


def _texts(family: Family, template: Template, row: Row, lots: Lots, place: str) -> dict[str, str]:
    """All that the template says, as text."""
    texts = {}
    marker = _marker(family, template, lots)
    for name in family.said[template.name] - {EXEMPLARS}:
        try:
            if name in family.expressions:
                drawn = expression.evaluate(
                    family.expressions[name], row.raw, lambda n, of: lots.number(f"draw {n}") % of
                )
                texts[name] = expression.text(drawn)
            else:
                texts[name] = _say(family, template, row, name, marker, lots)
        except ValueError as error:
            raise RowError(f"{place}: field {name!r}: {error}", f"{name} cannot be said") from None
    return texts


def _say(family: Family, template: Template, row: Row, name: str, marker: str, lots: Lots) -> str:
    key, ending = family.names[name]
    one, value = family.fields[key], row.values[key]
    match one.kind:
        case "text":
            return fields.sentence(value) if one.sentence else value
        case "references":
            return value[0]
        case "examples":
            return _each(one, value)
        case "list":
            items, order = _listed(family, template, row, key, lots)
            return fields.say_list([items[number] for number in order], ending, marker)
        case "choice":
            return _choice(family, template, row, key, ending, marker, lots)
        case "json":
            return fields.say_json(value, ending)
        case "turns":
            return fields.say_turns(value)
        case "tools":
            return "\n".join(fields.say_json(tool, "") for tool in value)
        case _:
            return fields.say_calls(value)


def _each(one: Field, examples: Sequence[Mapping[str, str]]) -> str:
    """Objects of a row, each in the words of the field's own pattern."""
    said = names(one.each)
    texts = []
    for number, example in enumerate(examples[: one.most or None], start=1):
        told = {name: fields.sentence(text) if one.sentence else text for name, text in example.items()}
        missing = [name for name in said if name not in told and name != "number"]
        if missing:
            raise ValueError(f"example {number} has no {missing[0]!r}; {nearest(missing[0], told)}")
        texts.append(fill(one.each, {**told, "number": str(number)}))
    return "".join(texts)


def _choice(family: Family, template: Template, row: Row, key: str, ending: str, marker: str, lots: Lots) -> str:
    one, value = family.fields[key], row.values[key]
    if one.one_of not in row.values:
        if re.fullmatch(r"-?\d+", value) and key in row.given:
            raise ValueError(f"it is the number {value}, and nothing says what it stands for; give {one.one_of!r}")
        return value
    number = fields.position(value, row.values[one.one_of], one.first)
    items, order = _listed(family, template, row, one.one_of, lots)
    return fields.mark(marker, order.index(number)) if ending == "_mark" else items[number]


def _listed(family: Family, template: Template, row: Row, key: str, lots: Lots) -> tuple[Sequence[str], list[int]]:
    """The items as the template calls them, and the order they are said in."""
    listed: Listed = row.values[key]
    items = template.words or listed.items
    is_fixed = not family.fields[key].shuffle or fields.keeps_order(items)
    return items, list(range(len(items))) if is_fixed else lots.order(len(items), f"order of {key}")


def _marker(family: Family, template: Template, lots: Lots) -> str:
    markers = template.markers or family.markers
    if any(name.endswith("_mark") for name in family.said[template.name]):
        markers = tuple(marker for marker in markers if fields.counts(marker))
    return lots.pick(markers, "marker") if markers else ""


def _refuse_draw(number: int, of: int) -> int:
    raise ValueError("a condition may not depend on chance")


# ---------------------------------------------------------------------------------------------- which phrasings


def selected(family: Family, phrasings: str) -> tuple[Template, ...]:
    """The templates that `phrasings` names: "seen", "heldout", "all" or one of them."""
    if phrasings in ("seen", "heldout", "all"):
        wanted = {"seen": (False,), "heldout": (True,), "all": (False, True)}[phrasings]
        found = tuple(one for one in family.templates if one.heldout in wanted)
        if not found:
            raise ValueError(f"family {family.name!r}: it has no {phrasings} phrasings; give it some, or use 'all'")
        return found
    known = [one.name for one in family.templates]
    if phrasings not in known:
        raise ValueError(
            f"family {family.name!r}: phrasings: {phrasings!r} is unknown; "
            f"{nearest(phrasings, [*known, 'seen', 'heldout', 'all'])}"
        )
    return (family.template(phrasings),)


class Sample(NamedTuple):
    """One template, filled; or why it cannot be."""

    template: Template
    conversation: Conversation | None
    reason: str


def samples(
    family: Family, raw: Mapping[str, Any], *, columns: Mapping[str, str], source: str, key: str, seed: int
) -> Iterator[Sample]:
    """The row in the words of each template that there is, held-out ones included.

    Where a phrasing wants worked examples, the row stands for them too.
    """
    row = read(family, raw, columns=columns, place=key)
    lots = Lots(seed, key, 0)
    for template in family.templates:
        if not family.fits(template, row):
            yield Sample(template, None, _unfit(family, template, row))
            continue
        try:
            made = render(family, template, row, lots=lots, source=source, place=key)
            if made.exemplar:
                made = render(family, template, row, lots=lots, source=source, place=key, exemplars=made.exemplar)
            yield Sample(template, made.conversation, "")
        except ValueError as error:
            yield Sample(template, None, str(error))


def _unfit(family: Family, template: Template, row: Row) -> str:
    missing = sorted(family.needs[template.name] - row.values.keys())
    return f"the row has no {', '.join(missing)}" if missing else "it is for other rows than this"
