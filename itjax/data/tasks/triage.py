"""Customer notes to labelled JSON: a category to recognise, a product and a waiting time with its unit to extract."""

import random

from itjax.data.tasks.family import Family, Field, Format, Wording, phrasings
from itjax.data.tasks.words import PRODUCTS
from itjax.data.templates import fill

TROUBLES = {
    "damage": ("came with a crack", "has a broken side", "is bent", "fell apart"),
    "delivery": ("never arrived", "is still on its way", "went to my neighbour", "is lost in the post"),
    "billing": ("was charged twice", "cost more than agreed", "has a wrong invoice", "was not refunded"),
    "returns": ("is not what I wanted", "has the wrong colour", "is too small for me", "must go back"),
}
UNITS = ("hours", "days", "weeks")
WAITS = tuple(range(2, 10))
PRESSURES = {
    "true": ("Please hurry.", "I need it today.", "This is urgent."),
    "false": ("There is no rush.", "Take your time.", "It can wait."),
}

FORMATS = (
    Format(
        "line",
        "Use one line of JSON with the keys category, product, wait, unit, urgent.",
        '{{"category": "{category}", "product": "{product}", "wait": {wait}, "unit": "{unit}", "urgent": {urgent}}}',
    ),
    Format(
        "lines",
        "Use JSON with one key per line: category, product, wait, unit, urgent.",
        '{{\n  "category": "{category}",\n  "product": "{product}",\n  "wait": {wait},\n  "unit": "{unit}",\n'
        '  "urgent": {urgent}\n}}',
    ),
    Format(
        "short",
        "Use short JSON with the keys product, category.",
        '{{"product": "{product}", "category": "{category}"}}',
    ),
    Format("label", "Give the category only, in one word.", "{category}"),
)

WORDINGS = (
    Wording("sort", "Sort this note from a customer: {note}\n<how>"),
    Wording("read", "Read the message and fill in the form. <how>\n\nMessage: {note}"),
    Wording("desk", "{note}\n\nWhat is this about? <how>", system="You work at a help desk."),
    Wording("quote", 'A customer wrote: "{note}" Extract the facts. <how>'),
    Wording("system", "{note}", system="You sort notes from customers. <how>"),
    Wording("labelled", "Task: classify the note.\nFormat: <how>\nNote: {note}"),
    Wording("please", "Please classify this for me. <how> Here is the text: {note}", system="You are a careful clerk."),
    Wording("inbox", "New message in the inbox:\n{note}\nPut it in the right category. <how>"),
    Wording("options", "Is it damage, delivery, billing or returns? <how>\nText: {note}"),
    Wording("facts", "<how>\n\n{note}", system="You extract the facts from a message."),
    Wording("clerk", "Here is a note from the inbox. <how>\nNote: {note}", system="You are a clerk.", heldout=True),
    Wording("wrote", 'Extract the facts for the help desk. A customer wrote: "{note}"\n<how>', heldout=True),
    Wording("form", "Message: {note}\n\nPlease fill in the form. <how>", system="You read messages.", heldout=True),
)

NOTES = (
    "My {product} {trouble}. I have waited {wait} {unit}. {pressure}",
    "{pressure} The {product} {trouble} and I wrote {wait} {unit} ago.",
    "It is {wait} {unit} now: the {product} {trouble}. {pressure}",
    "I bought a {product} {wait} {unit} ago. It {trouble}. {pressure}",
)


def draw(rng: random.Random) -> dict[str, str]:
    category = rng.choice(tuple(TROUBLES))
    urgent = rng.choice(tuple(PRESSURES))
    row = {
        "category": category,
        "product": rng.choice(PRODUCTS),
        "wait": str(rng.choice(WAITS)),
        "unit": rng.choice(UNITS),
        "urgent": urgent,
    }
    parts = {"trouble": rng.choice(TROUBLES[category]), "pressure": rng.choice(PRESSURES[urgent])}
    return row | {"note": fill(rng.choice(NOTES), row | parts)}


TRIAGE = Family(
    name="triage",
    templates=phrasings(WORDINGS, FORMATS),
    draw=draw,
    identity=("note",),
    schema={
        "category": Field(str, choices=tuple(TROUBLES)),
        "product": Field(str, choices=PRODUCTS),
        "wait": Field(int, choices=WAITS),
        "unit": Field(str, choices=UNITS),
        "urgent": Field(bool),
    },
)
