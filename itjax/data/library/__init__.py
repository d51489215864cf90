"""Families of phrasings as plain files: those of the library by kind, and anybody's own by path.

    kind = "sentiment"                          TOML: text needs no indentation, needs hardly any escapes, is never
    fields.review = {}                          taken for something else ("no" stays "no"), and Python reads it
    fields.label = { one_of = "labels" }
    fields.labels = { list = true, default = ["negative", "positive"] }

    [[template]]
    name = "ask"
    prompt = \"\"\"
    {review}

    Is this review {labels_or}?
    \"\"\"
    answer = "{label}"

`extends = "classification"` takes over a family of the library and changes only what the file says. A promptsource
file (`.yaml`) is a family too. The whole format is in docs/templates.md.
"""

import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import fields as dataclass_fields
from dataclasses import replace
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from itjax.data import fields, promptsource, templates
from itjax.data.fields import Field
from itjax.data.templates import EXEMPLARS, STYLES, TAGS, Family, FewShot, Template, nearest

LARGEST = 4 << 20  # bytes of a file
_FAMILY = (
    "kind",
    "about",
    "extends",
    "without",
    "fields",
    "markers",
    "systems",
    "tags",
    "few_shot",
    "sample",
    "template",
)
_TEMPLATE = ("name", "prompt", "answer", "system", "tags", "markers", "words", "exemplar")
_FIELD = (
    "kind",
    "about",
    "optional",
    "default",
    "one_of",
    "shuffle",
    "first",
    "list",
    "column",
    "sentence",
    "each",
    "most",
)


def kinds() -> list[str]:
    """The kinds of task that the library has phrasings for."""
    return sorted(
        one.name.removesuffix(".toml") for one in resources.files(__name__).iterdir() if one.name.endswith(".toml")
    )


@cache
def family(kind: str) -> Family:
    """The library's phrasings of a kind of task."""
    if kind not in kinds():
        raise ValueError(f"kind {kind!r} is unknown; {nearest(kind, kinds())}")
    file = resources.files(__name__) / f"{kind}.toml"
    return parse(file.read_text(encoding="utf-8"), place=f"library/{kind}.toml")


def read(path: Path) -> Family:
    """The family of a file: TOML as here, or a promptsource file."""
    if path.suffix in (".yaml", ".yml"):
        return promptsource.read(path).family
    if not path.is_file():
        raise ValueError(f"{path}: no such file; give a family as .toml, or a promptsource file as .yaml")
    if path.stat().st_size > LARGEST:
        raise ValueError(f"{path}: larger than {LARGEST >> 20} MiB; split it")
    try:
        text = path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 at byte {error.start}; save it as UTF-8") from None
    return parse(text, place=str(path))


def parse(text: str, *, place: str) -> Family:
    """The family that a text spells. Raises ValueError with file, line and what is near to what was meant."""
    try:
        document = tomllib.loads(text.removeprefix("\ufeff"))
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise ValueError(f"{place}: not TOML: {error}") from None
    _known(document, _FAMILY, place)
    base = family(_text(document, "extends", place)) if "extends" in document else None
    name = _text(document, "kind", place, default=base.name if base else None)
    made = _Reader(place, text).family(document, name, base)
    _check(made, place, text)
    return made


class _Reader:
    """Makes a family of a TOML document."""

    def __init__(self, place: str, text: str) -> None:
        self.place, self.text = place, text

    def family(self, document: Mapping[str, Any], name: str, base: Family | None) -> Family:
        shared = _texts(document, "systems", self.place)
        tags = _texts(document, "tags", self.place)
        entries = document.get("template", [])
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise ValueError(f"{self.place}: template is not a table; write [[template]], once for each")
        own = [self.template(entry, shared, tags) for entry in entries]
        without = _texts(document, "without", self.place)
        taken = self._taken(base, {*without, *(one.name for one in own)}, shared, tags) if base else []
        if base is not None:
            for gone in without:
                base.template(gone)  # says what is near where there is none
        markers = _texts(document, "markers", self.place) or (base.markers if base else fields.MARKERS)
        return Family(
            name=name,
            templates=(*taken, *own),
            fields=self._fields(document, base),
            about=_text(document, "about", self.place, default=base.about if base else ""),
            markers=markers,
            few_shot=self._few_shot(document, base),
            sample=self._sample(document, base),
        )

    def _taken(self, base: Family, without: set[str], shared: tuple[str, ...], tags: tuple[str, ...]) -> list[Template]:
        """The templates of the family that is extended, with what the file says of all."""
        left = [one for one in base.templates if one.name not in without]
        left = [replace(one, systems=shared) for one in left] if shared else left
        held = "held_out" in tags
        return [replace(one, tags=(*one.tags, *tags), heldout=one.heldout or held) for one in left] if tags else left

    def _fields(self, document: Mapping[str, Any], base: Family | None) -> dict[str, Field]:
        found = dict(base.fields) if base else {}
        for name, entry in _table(document, "fields", self.place).items():
            place = f"{self.place}: field {name!r}"
            if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name) or name == EXEMPLARS:
                raise ValueError(f"{place}: not a name for a field; use letters, digits and _")
            if not isinstance(entry, dict):
                raise ValueError(f"{place}: not a table; write {name} = {{}}")
            _known(entry, _FIELD, place)
            found[name] = _field(entry, found.get(name, Field()), place)
        return found

    def _few_shot(self, document: Mapping[str, Any], base: Family | None) -> FewShot:
        entry = _table(document, "few_shot", self.place)
        place = f"{self.place}: few_shot"
        _known(entry, [one.name for one in dataclass_fields(FewShot)], place)
        made = replace(base.few_shot if base else FewShot(), **entry)
        if made.style not in STYLES:
            raise ValueError(f"{place}: style {made.style!r} is unknown; {nearest(str(made.style), STYLES)}")
        if not isinstance(made.budget, int) or isinstance(made.budget, bool) or made.budget < 0:
            raise ValueError(f"{place}: budget is {made.budget!r}; give a number of characters")
        for name in ("lead", "delimiter", "separator"):
            _text(vars(made), name, place)
        return made

    def _sample(self, document: Mapping[str, Any], base: Family | None) -> dict[str, Any]:
        return {**(base.sample if base else {}), **_table(document, "sample", self.place)}

    def template(self, entry: Mapping[str, Any], shared: tuple[str, ...], family_tags: tuple[str, ...]) -> Template:
        name = _text(entry, "name", f"{self.place}: template", default=None)
        place = f"{self.place}:{_line(self.text, name)}: template {name!r}"
        _known(entry, _TEMPLATE, place)
        tags = (*family_tags, *_texts(entry, "tags", place))
        for tag in tags:
            if tag not in TAGS:
                raise ValueError(f"{place}: tag {tag!r} is unknown; {nearest(tag, TAGS)}")
        return Template(
            name=name,
            prompt=_text(entry, "prompt", place, default="").strip("\n"),
            answer=_text(entry, "answer", place, default="").strip("\n"),
            heldout="held_out" in tags,
            tags=tags,
            systems=_texts(entry, "system", place) if "system" in entry else shared,
            markers=_texts(entry, "markers", place),
            words=_texts(entry, "words", place),
            exemplar=_text(entry, "exemplar", place, default="").strip("\n"),
        )


def _field(entry: Mapping[str, Any], before: Field, place: str) -> Field:
    entry = dict(entry)
    if entry.pop("list", False):
        entry["kind"] = "list"
    if "one_of" in entry:
        entry["kind"] = "choice"
    made = replace(before, **entry)
    if made.kind not in fields.ENDINGS:
        raise ValueError(f"{place}: kind {made.kind!r} is unknown; {nearest(str(made.kind), fields.ENDINGS)}")
    for name in ("optional", "shuffle", "sentence"):
        if not isinstance(getattr(made, name), bool):
            raise ValueError(f"{place}: {name} is {getattr(made, name)!r}; write true or false")
    if (made.kind == "examples") != bool(made.each):
        raise ValueError(f"{place}: kind 'examples' and each = ... go together: each says how one example is written")
    try:
        templates.names(made.each)
    except ValueError as error:
        raise ValueError(f"{place}: each: {error}") from None
    if made.default is not None:
        try:
            fields.read(made.default, made)
        except ValueError as error:
            raise ValueError(f"{place}: default: {error}") from None
    return made


def _check(made: Family, place: str, text: str) -> None:
    """What can only be seen of a family as a whole."""
    if not made.templates:
        raise ValueError(f"{place}: it has no phrasings; add a [[template]]")
    for name, one in made.fields.items():
        listed = made.fields.get(one.one_of)
        if one.kind == "choice" and (listed is None or listed.kind != "list"):
            lists = [other for other, field in made.fields.items() if field.kind == "list"]
            raise ValueError(
                f"{place}: field {name!r}: one_of {one.one_of!r} is not a list; {nearest(one.one_of, lists)}"
            )
    for marker in made.markers:
        _check_marker(marker, place)
    seen: set[str] = set()
    for template in made.templates:
        where = f"{place}:{_line(text, template.name)}: template {template.name!r}"
        if template.name in seen:
            raise ValueError(f"{where}: there are two of this name; give each its own")
        seen.add(template.name)
        _check_template(made, template, where)


def _check_template(made: Family, template: Template, place: str) -> None:
    known = [*made.names, EXEMPLARS]
    said: set[str] = set()
    for pattern in template.patterns:
        try:
            said.update(names := templates.names(pattern))
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from None
        for name in names:
            if name not in known:
                raise ValueError(f"{place}: field {name!r} is unknown; {nearest(name, known)}")
    is_spoken = any(one.kind == "calls" for one in made.fields.values())
    if not template.answer and not is_spoken:
        raise ValueError(f"{place}: it has no answer; write answer = ...")
    if not template.prompt and not any(one.kind == "turns" for one in made.fields.values()):
        raise ValueError(f"{place}: it has no prompt; write prompt = ...")
    if ((EXEMPLARS in said) + bool(template.exemplar) + ("few_shot" in template.tags)) % 3:
        raise ValueError(f"{place}: tag few_shot, {{exemplars}} in the prompt and exemplar = ... go together")
    for marker in template.markers:
        _check_marker(marker, place)
    markers = template.markers or made.markers
    if any(name.endswith("_mark") for name in said & set(made.names)) and not any(map(fields.counts, markers)):
        raise ValueError(f'{place}: it says the mark of an option, and no marker counts; give markers = ["(A) "]')
    if template.words:
        defaults = [one.default for one in made.fields.values() if one.kind == "list" and one.default is not None]
        if len(defaults) != 1 or len(defaults[0]) != len(template.words):
            raise ValueError(f"{place}: words are {list(template.words)}; give one for each default option: {defaults}")


def _check_marker(marker: str, place: str) -> None:
    if not marker.strip():
        raise ValueError(f"{place}: marker {marker!r} is blank; write it as it looks, with A, a or 1 where it counts")


def _line(text: str, name: str) -> int:
    """Where a template of this name begins."""
    found = re.search(rf"""^[ \t]*name\s*=\s*["']{re.escape(name)}["']""", text, re.MULTILINE)
    return 1 + text.count("\n", 0, found.start()) if found else 1


def _known(entry: Mapping[str, Any], known: Iterable[str], place: str) -> None:
    for key in entry:
        if key not in known:
            raise ValueError(f"{place}: {key!r} is unknown; {nearest(key, known)}")


def _text(entry: Mapping[str, Any], key: str, place: str, *, default: str | None = None) -> str:
    value = entry.get(key, default)
    if value is None:
        raise ValueError(f"{place}: it has no {key}; write {key} = ...")
    if not isinstance(value, str):
        raise ValueError(f"{place}: {key} is {value!r}, not a text; put it in quotes")
    return value


def _texts(entry: Mapping[str, Any], key: str, place: str) -> tuple[str, ...]:
    value = entry.get(key, [])
    value = [value] if isinstance(value, str) else value
    if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
        raise ValueError(f"{place}: {key} is {value!r}, not a list of texts")
    return tuple(value)


def _table(entry: Mapping[str, Any], key: str, place: str) -> Mapping[str, Any]:
    value = entry.get(key, {})
    if not isinstance(value, dict):
        raise ValueError(f"{place}: {key} is {value!r}, not a table")
    return value
