"""How many short rows one core audits a second for personal data, offensive words and faults, alone and with exact duplicates.

Time is the processor time of all threads. Rows are synthetic: words by Zipf's law, some numbers, and in every twentieth
row something personal.
"""

import tempfile
from typing import Any

from benchmarks import SEED
from benchmarks.audit import ROWS, VOCABULARY, draw, example, of_stages
from itjax.base.schema import Filters
from itjax.data.duplicates import ExactDuplicates
from itjax.data.privacy import Personal
from itjax.data.quality import Quality
from itjax.data.toxicity import Toxic

PLANTED = ("write to ann{}@example.org", "call +1 602 272 {:04}", "card 4111 1111 1111 1111", "from 58.74.121.{}")
LISTED = range(VOCABULARY - 400, VOCABULARY)
NUMBERED = ("it costs {} dollars", "in {} of 2019", "the answer is 48/2 = {}", "room {}, 3rd floor")


def results() -> list[dict[str, Any]]:
    examples = [example(number, text) for number, text in enumerate(texts())]
    personal, exact = Personal(Filters()), ExactDuplicates("both")
    quality = Quality(Filters())
    return [
        of_stages("personal", [personal], examples),
        of_stages("exact_duplicates and personal", [exact, personal], examples),
        of_stages(f"toxic, a list of {len(LISTED)} words", [toxic()], examples),
        of_stages("quality", [quality], examples),
    ]


def toxic() -> Toxic:
    """The stage with a list of rare words, some of which are in the rows."""
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write("\n".join(f"word{number}" for number in LISTED))
        file.flush()
        return Toxic(Filters(word_lists=file.name))


def texts() -> list[str]:
    """Rows of words, every second with a number, every twentieth with something personal."""
    drawn = []
    for number, text in enumerate(draw(ROWS, seed=SEED)):
        said = NUMBERED[number % len(NUMBERED)].format(number % 250) if number % 2 else ""
        hidden = PLANTED[number // 20 % len(PLANTED)].format(number % 250) if number % 20 == 0 else ""
        drawn.append(" ".join(filter(None, (text, said, hidden))))
    return drawn
