"""Tasks that need no files: four families of seeded examples, each with many phrasings, some of them held out.

A row is made from its number alone, so any row can be made at any time, in any process. Train and eval rows cannot
meet: a hash of the question says which side it is on, and a number draws until its row is on the wanted side.
Draws repeat now and then, as real data does; they never repeat across the two sides.
"""

import difflib
import hashlib
import json
import random
from collections.abc import Iterable, Mapping
from itertools import chain

from itjax.base.records import Conversation
from itjax.data.tasks.arithmetic import ARITHMETIC
from itjax.data.tasks.family import Family, Field
from itjax.data.tasks.functions import FUNCTIONS
from itjax.data.tasks.support import SUPPORT
from itjax.data.tasks.triage import TRIAGE
from itjax.data.templates import Template, choose, conversation

__all__ = ["EVAL_SHARE", "FAMILIES", "SPLITS", "Family", "Field", "TaskSource", "split_of"]

FAMILIES: dict[str, Family] = {family.name: family for family in (TRIAGE, ARITHMETIC, FUNCTIONS, SUPPORT)}
SPLITS = ("train", "eval")
EVAL_SHARE = 8  # one question in eight is for evaluation
_SAMPLE = 64  # rows that stand for the drawing code in a fingerprint


class TaskSource:
    """`examples` rows of one family, by number, in the phrasings asked for: "seen", "heldout", "all" or one name."""

    def __init__(self, family: str, *, examples: int, seed: int, split: str, phrasings: str):
        self._family = FAMILIES[_known("task", family, FAMILIES)]
        if examples < 1:
            raise ValueError(f"task {family!r}: examples is {examples}; give at least 1")
        self.name = self.family = family
        self._examples = examples
        self._seed = seed
        self._split = _known(f"task {family!r}: split", split, SPLITS)
        self._phrasings = phrasings
        self._templates = _chosen(self._family, phrasings)

    def __len__(self) -> int:
        return self._examples

    def __getitem__(self, index: int) -> dict[str, str]:
        if not 0 <= index < self._examples:
            raise IndexError(f"{self.name}: row {index} of {self._examples}")
        rng = random.Random(f"{self.name}/{self._split}/{self._seed}/{index}")
        while True:
            row = self._family.draw(rng)
            if split_of(self._family, row) == self._split:
                return row

    def key(self, index: int) -> str:
        return f"task/{self.name}:{index}"

    def template(self, index: int) -> Template:
        return choose(self._templates, key=self.key(index), seed=self._seed)

    def conversation(self, index: int) -> Conversation:
        return conversation(self.template(index), self[index], source=self.name, key=self.key(index))

    def fingerprint(self) -> str:
        """Changes with whatever changes the conversations: the arguments, the phrasings and how rows are drawn."""
        arguments = (self.name, self._examples, self._seed, self._split, self._phrasings)
        sample = [self[index] for index in range(min(self._examples, _SAMPLE))]
        text = json.dumps([arguments, [vars(template) for template in self._templates], sample], sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def split_of(family: Family, row: Mapping[str, str]) -> str:
    """Which side the row's question is on; the same for every seed, number and phrasing."""
    question = "\x1f".join(row[field] for field in family.identity)
    digest = hashlib.blake2b(question.encode(), digest_size=8, key=family.name.encode()).digest()
    return "eval" if int.from_bytes(digest, "big") % EVAL_SHARE == 0 else "train"


def _chosen(family: Family, phrasings: str) -> tuple[Template, ...]:
    if phrasings in ("seen", "heldout"):
        return tuple(template for template in family.templates if template.heldout == (phrasings == "heldout"))
    if phrasings == "all":
        return family.templates
    names = [template.name for template in family.templates]
    return (family.template(_known(f"task {family.name!r}: phrasings", phrasings, names, ("seen", "heldout", "all"))),)


def _known(place: str, value: str, *known: Iterable[str]) -> str:
    names = list(chain(*known))
    if value in names:
        return value
    nearest = difflib.get_close_matches(value, names, n=1)
    raise ValueError(
        f"{place}: {value!r} is unknown; " + (f"did you mean {nearest[0]!r}? " if nearest else "") + f"Known: {names}"
    )
