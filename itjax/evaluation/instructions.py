"""Does it follow instructions? Held-out rows of embedded tasks, answered greedily and scored, per family and phrasing group."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from itjax.base.records import Conversation
from itjax.data.prepare import HeldOut
from itjax.data.tasks import TaskSource
from itjax.evaluation import tasks
from itjax.models.model import Params
from itjax.text import chat
from itjax.text.tokenizer import Tokenizer

Generate = Callable[[Params, Sequence[Sequence[int]]], list[list[int]]]  # prompts of ids -> answers of ids


@dataclass(frozen=True)
class Answer:
    """One prompt with what the model said to it."""

    task: str
    template: str
    prompt: str
    reference: str
    completion: str
    scores: dict[str, float]


def answer_scores(
    generate: Generate,
    held: Sequence[HeldOut],
    *,
    tokenizer: Tokenizer,
    fmt: chat.Writes,
    count: int,
    keep: Callable[[int, list[Answer]], None],
) -> Callable[[int, Params], list[dict[str, Any]]]:
    """An evaluator: (step, parameters) -> one line per (task, phrasing group, metric), over `count` prompts of each group.

    All answers of an evaluation are handed to `keep` with the step, so that a report can show them.
    """
    groups = [_Group.of(part, count) for part in held if part.task]
    prompts = [
        chat.encode(chat.prompt(conversation.messages[:-1], fmt), tokenizer)[0].tolist()
        for group in groups
        for conversation in group.conversations
    ]

    def evaluate(step: int, params: Params) -> list[dict[str, Any]]:
        completions = iter([tokenizer.decode(ids) for ids in generate(params, prompts)])
        lines, answers = [], []
        for group in groups:
            given = _answers(group, [next(completions) for _ in group.conversations])
            lines.extend(_lines(group, given))
            answers.extend(given)
        keep(step, answers)
        return lines

    return evaluate


@dataclass(frozen=True)
class _Group:
    """The first prompts of one task in one group of phrasings."""

    name: str
    template_split: str | None
    task: TaskSource
    conversations: tuple[Conversation, ...]

    @classmethod
    def of(cls, part: HeldOut, count: int) -> "_Group":
        assert part.task is not None
        conversations = tuple(part.task.conversation(index) for index in range(min(count, len(part.task))))
        return cls(part.name, part.template_split, part.task, conversations)


def _answers(group: _Group, completions: Sequence[str]) -> list[Answer]:
    given = [(group.task[index], group.task.template(index), text) for index, text in enumerate(completions)]
    answers = []
    scores = tasks.score_all(group.task.family, given)
    for conversation, completion, score in zip(group.conversations, completions, scores, strict=True):
        *asked, reply = conversation.messages
        prompt = "\n\n".join(message.content for message in asked)
        answers.append(Answer(group.name, conversation.template, prompt, reply.content, completion, score))
    return answers


def _lines(group: _Group, answers: Sequence[Answer]) -> list[dict[str, Any]]:
    values: dict[str, list[float]] = defaultdict(list)
    for answer in answers:
        for metric, value in answer.scores.items():
            values[metric].append(value)
    return [
        {
            "task": group.name,
            "split": "heldout",
            "template_split": group.template_split,
            "metric": metric,
            "value": float(np.mean(found)),
            "count": len(found),
        }
        for metric, found in values.items()
    ]
