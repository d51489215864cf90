"""What a family of embedded tasks is: how its rows are drawn, how they are asked, and what a valid answer looks like.

The phrasings of a family are wordings times answer formats. A wording is how a person might ask, system prompt
included; it says `<how>` where the answer format is explained. Because every wording meets every format, only the
explanation tells which format is wanted, and a held-out wording can be answered by a model that learned to read it.
"""

import random
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from itjax.data.templates import Template

HOW = "<how>"


@dataclass(frozen=True)
class Wording:
    name: str
    prompt: str
    system: str = ""
    heldout: bool = False


@dataclass(frozen=True)
class Format:
    """`how` explains the answer to the reader of the prompt; `answer` is its pattern."""

    name: str
    how: str
    answer: str


def phrasings(wordings: tuple[Wording, ...], formats: tuple[Format, ...]) -> tuple[Template, ...]:
    """Every wording with every format, named `wording/format`."""
    return tuple(
        Template(
            name=f"{wording.name}/{form.name}",
            prompt=wording.prompt.replace(HOW, form.how),
            answer=form.answer,
            system=wording.system.replace(HOW, form.how),
            heldout=wording.heldout,
        )
        for wording in wordings
        for form in formats
    )


@dataclass(frozen=True)
class Field:
    """What the value of one key of a JSON answer must be: its type, and one of `choices` or a text like `pattern`."""

    kind: type
    choices: tuple[Any, ...] = ()
    pattern: str = ""

    def accepts(self, value: Any) -> bool:
        if type(value) is not self.kind:  # exactly: True is no number here, and 3.0 is not 3
            return False
        if self.choices and value not in self.choices:
            return False
        return not self.pattern or re.fullmatch(self.pattern, str(value)) is not None


@dataclass(frozen=True)
class Family:
    """One kind of task. `identity` are the fields that make two rows the same question: they decide train or eval."""

    name: str
    templates: tuple[Template, ...]
    draw: Callable[[random.Random], dict[str, str]]
    identity: tuple[str, ...]
    schema: Mapping[str, Field] = field(default_factory=dict)

    def template(self, name: str) -> Template:
        return next(template for template in self.templates if template.name == name)
