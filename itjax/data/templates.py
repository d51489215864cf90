"""How a row becomes a conversation: patterns with {fields}, and a choice of phrasing that never changes by chance.

A pattern is text with fields; a row fills them in one pass, so what a row holds is never read as a pattern.

    pattern   Note: {note}            "{{" and "}}" are literal braces
    row       {"note": "{name} {{"}
    text      Note: {name} {{         data is inert: its braces stay
"""

import difflib
import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from itjax.base.records import Conversation, Message

_PIECES = re.compile(r"\{\{|\}\}|\{([A-Za-z_][A-Za-z0-9_]*)\}|[{}]")


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


def fill(pattern: str, row: Mapping[str, str], *, name: str = "pattern") -> str:
    """The pattern with every `{field}` replaced by the row's value; `name` says where the pattern is from in errors."""

    def piece(match: re.Match[str]) -> str:
        if match[0] in ("{{", "}}"):
            return match[0][0]
        if match[1] is None:
            raise ValueError(
                f"{name}: lone {match[0]!r} at character {match.start()}; write {match[0] * 2!r} for a brace"
            )
        if match[1] not in row:
            raise ValueError(f"{name}: field {match[1]!r} is not in the row; {_way_out(match[1], row)}")
        return row[match[1]]

    return _PIECES.sub(piece, pattern)


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


def _way_out(field: str, row: Mapping[str, str]) -> str:
    nearest = difflib.get_close_matches(field, row, n=1)
    return (f"did you mean {nearest[0]!r}? " if nearest else "") + f"Known: {sorted(row)}"
