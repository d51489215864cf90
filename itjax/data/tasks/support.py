"""Replies to customers that cite the knowledge-base article given and carry the data of the ticket."""

import random

from itjax.data.tasks.family import Family, Field, Format, Wording, phrasings
from itjax.data.tasks.words import NAMES, PRODUCTS

PRIORITIES = ("low", "normal", "high")
SERIES = "ABCDEFGH"
STEPS = (
    "hold the button for five seconds",
    "clean the filter with warm water",
    "charge the battery for one night",
    "turn the switch to the left",
    "press the green key two times",
    "remove the cover and close it again",
    "use the short cable",
    "wait until the light is blue",
    "put it on a flat table",
    "take out the card and try again",
    "open the back and dry the inside",
    "start the update and wait",
)

FORMATS = (
    Format(
        "subject",
        "Start with a subject line and sign as Support.",
        "Subject: {ticket} ({priority})\nDear {name},\n"
        "please {step}. See article {article} about your {product}.\nSupport",
    ),
    Format(
        "footer",
        "End with a line of ticket, priority and article.",
        "Hello {name},\nto fix your {product}, please {step}.\nTicket {ticket}, priority {priority}, article {article}",
    ),
    Format(
        "json",
        "Use one line of JSON with the keys ticket, priority, article, reply.",
        '{{"ticket": "{ticket}", "priority": "{priority}", "article": "{article}", '
        '"reply": "Dear {name}, please {step}."}}',
    ),
)

WORDINGS = (
    Wording(
        "reply",
        "Reply to {name} about the {product}. Ticket: {ticket}. Priority: {priority}.\n"
        "Article {article}: {step}.\n<how>",
    ),
    Wording(
        "ticket",
        "Ticket {ticket}, priority {priority}\nCustomer: {name}\nProduct: {product}\n"
        "Article {article}: {step}\n\n<how>",
        system="You answer for Support.",
    ),
    Wording(
        "article",
        "Article {article}: {step}.\n\nUse it to help {name}, whose {product} does not work. "
        "The ticket is {ticket} and the priority is {priority}. <how>",
    ),
    Wording(
        "system",
        "{name} has a {product} that does not work. Ticket {ticket}, priority {priority}.",
        system="You write to customers. Article {article}: {step}. <how>",
    ),
    Wording(
        "write",
        "Write an e-mail to {name}. <how>\nProduct: {product}\nTicket: {ticket}\nPriority: {priority}\n"
        "Article {article}: {step}",
    ),
    Wording(
        "please",
        "Please answer ticket {ticket} ({priority}) from {name}: the {product} does not work. "
        "Article {article} says: {step}. <how>",
        system="You are kind and short.",
    ),
    Wording(
        "before",
        "<how>\n\nCustomer: {name}. Product: {product}. Ticket: {ticket}. Priority: {priority}. "
        "Article {article}: {step}.",
    ),
    Wording(
        "quote",
        '{name} wrote: "My {product} does not work." This is ticket {ticket}, its priority is {priority}. '
        "In article {article} you read: {step}. <how>",
    ),
    Wording(
        "labelled",
        "Task: answer the customer {name}.\nFormat: <how>\nTicket: {ticket} ({priority})\nProduct: {product}\n"
        "Article {article}: {step}",
    ),
    Wording(
        "base",
        "From the knowledge base, article {article}: {step}.\nFrom the inbox, ticket {ticket}: {name} needs help with "
        "the {product}, priority {priority}.\n<how>",
        system="You work at a help desk.",
    ),
    Wording(
        "answer",
        "Please write to the customer {name} about the {product}.\nArticle {article}: {step}.\n"
        "Ticket: {ticket}. Priority: {priority}.\n<how>",
        system="You work for Support.",
        heldout=True,
    ),
    Wording(
        "inbox",
        "In the inbox is ticket {ticket}, priority {priority}: the {product} from {name} does not work. "
        "Article {article} says: {step}.\n\n<how>",
        heldout=True,
    ),
    Wording(
        "help",
        "Task: help {name}. <how>\nPriority: {priority}\nTicket: {ticket}\nProduct: {product}\n"
        "Article {article}: {step}",
        system="You answer customers.",
        heldout=True,
    ),
)


def draw(rng: random.Random) -> dict[str, str]:
    return {
        "name": rng.choice(NAMES),
        "product": rng.choice(PRODUCTS),
        "ticket": f"{rng.choice(SERIES)}{rng.randint(10, 59)}",
        "priority": rng.choice(PRIORITIES),
        "article": f"KB{rng.randint(1, 20)}",
        "step": rng.choice(STEPS),
    }


SUPPORT = Family(
    name="support",
    templates=phrasings(WORDINGS, FORMATS),
    draw=draw,
    identity=("name", "product", "ticket", "priority", "article", "step"),
    schema={
        "ticket": Field(str, pattern=f"[{SERIES}][1-5][0-9]"),
        "priority": Field(str, choices=PRIORITIES),
        "article": Field(str, pattern="KB[1-9][0-9]?"),
        "reply": Field(str, pattern=r"\S(.|\n)*"),
    },
)
