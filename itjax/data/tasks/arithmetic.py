"""Little stories with numbers: two steps written out, then the answer.

The numbers are small on purpose: there are about a hundred sums to know, and a model of a few minutes can know them.
The stories are many.
"""

import random

from itjax.data.tasks.family import Family, Format, Wording, phrasings
from itjax.data.tasks.words import ITEMS, NAMES
from itjax.data.templates import fill

FORMATS = (
    Format(
        "lines",
        "Write each step on its own line, then Answer: and the result.",
        "{first}\n{second}\nAnswer: {answer}",
    ),
    Format(
        "sentence",
        "Write the steps in one line and end with: The answer is",
        "{first}; {second}. The answer is {answer}.",
    ),
    Format(
        "words",
        "Say what comes first and what comes then, and end with Result:",
        "First {first}, then {second}.\nResult: {answer}",
    ),
)

WORDINGS = (
    Wording("solve", "Solve this: {story}\n<how>"),
    Wording("question", "Question: {story}\n<how>"),
    Wording("teacher", "{story}\n\n<how>", system="You are a teacher who counts with care."),
    Wording("before", "<how>\n\n{story}"),
    Wording("system", "{story}", system="You solve small problems step by step. <how>"),
    Wording("think", "Think step by step. <how>\nProblem: {story}"),
    Wording("pupil", 'A pupil asks: "{story}" Show how you count. <how>'),
    Wording("labelled", "Task: solve the problem.\nFormat: <how>\nText: {story}"),
    Wording("please", "Please help me with this. {story} <how>", system="You help with numbers."),
    Wording("work", "Work this out with care. {story}\nFormat: <how>"),
    Wording("asks", 'Please solve what a pupil asks: "{story}"\n<how>', heldout=True),
    Wording("care", "Here is a problem: {story}\n\nThink with care. <how>", system="You are a teacher.", heldout=True),
    Wording(
        "numbers", "Help me count step by step. <how>\nQuestion: {story}", system="You solve problems.", heldout=True
    ),
)

KEEPS = (
    "{name} has {a} {item}, buys {b} more and loses {c} of them. How many {item} are left?",
    "There are {a} {item} in a box. {name} adds {b} more and takes out {c} of them. How many {item} are left?",
)
PACKS = (
    "{name} packs {a} bags with {b} {item} each and finds {c} more. How many {item} are there?",
    "There are {a} boxes with {b} {item} each. {name} adds {c} more. How many {item} are there?",
)
SHARES = (
    "{name} has {a} {item} and {friend} has {b} {item}. Is the total even or odd?",
    "{name} and {friend} put {a} and {b} {item} together. Is the total even or odd?",
)


def keeps(rng: random.Random) -> dict[str, str]:
    """5 + 4 = 9, 9 - 3 = 6."""
    a, b, c = rng.randint(2, 6), rng.randint(2, 6), rng.randint(1, 4)
    return _two_steps(rng, KEEPS, a, b, c, first=f"{a} + {b} = {a + b}", second=f"{a + b} - {c} = {a + b - c}")


def packs(rng: random.Random) -> dict[str, str]:
    """3 * 4 = 12, 12 + 2 = 14."""
    a, b, c = rng.randint(2, 5), rng.randint(2, 4), rng.randint(1, 4)
    return _two_steps(rng, PACKS, a, b, c, first=f"{a} * {b} = {a * b}", second=f"{a * b} + {c} = {a * b + c}")


def shares(rng: random.Random) -> dict[str, str]:
    """5 + 4 = 9, 9 is odd."""
    a, b = rng.randint(2, 6), rng.randint(2, 6)
    parity = ("even", "odd")[(a + b) % 2]
    return _two_steps(rng, SHARES, a, b, 0, first=f"{a} + {b} = {a + b}", second=f"{a + b} is {parity}")


def draw(rng: random.Random) -> dict[str, str]:
    return rng.choice((keeps, packs, shares))(rng)


def _two_steps(
    rng: random.Random, stories: tuple[str, ...], a: int, b: int, c: int, *, first: str, second: str
) -> dict[str, str]:
    name, friend = rng.sample(NAMES, 2)
    cast = {"name": name, "friend": friend, "item": rng.choice(ITEMS), "a": str(a), "b": str(b), "c": str(c)}
    story = fill(rng.choice(stories), cast)
    return {"story": story, "first": first, "second": second, "answer": second.split()[-1]}


ARITHMETIC = Family(name="arithmetic", templates=phrasings(WORDINGS, FORMATS), draw=draw, identity=("story",))
