"""Does it follow instructions? Held-out rows of embedded tasks, answered greedily and scored, per family and phrasing group."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from itjax.data.prepare import HeldOut
from itjax.evaluation import tasks
from itjax.models.model import Params
from itjax.text import chat
from itjax.text.formats import Format
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
    fmt: Format,
    count: int,
    keep: Callable[[list[Answer]], None],
) -> Callable[[Params], list[dict[str, Any]]]:
    """An evaluator: parameters -> one line per (task, phrasing group, metric), over `count` prompts of each group.

    All answers of an evaluation are handed to `keep`, so that a report can show them.
    """
    prompts = [
        chat.encode(chat.prompt(part.rows.conversation(index).messages[:-1], fmt), tokenizer)[0].tolist()
        for part in held
        for index in range(min(count, len(part.rows)))
    ]

    def evaluate(params: Params) -> list[dict[str, Any]]:
        completions = iter([tokenizer.decode(ids) for ids in generate(params, prompts)])
        lines, answers = [], []
        for part in held:
            group = _answers(part, [next(completions) for _ in range(min(count, len(part.rows)))])
            lines.extend(_lines(part, group))
            answers.extend(group)
        keep(answers)
        return lines

    return evaluate


def _answers(part: HeldOut, completions: Sequence[str]) -> list[Answer]:
    rows = [part.rows[index] for index in range(len(completions))]  # type: ignore[index]
    templates = [part.rows.template(index) for index in range(len(completions))]  # type: ignore[attr-defined]
    scores = tasks.score_all(part.task, list(zip(rows, templates, completions, strict=True)))
    answers = []
    for index, (completion, score) in enumerate(zip(completions, scores, strict=True)):
        *asked, reply = part.rows.conversation(index).messages
        prompt = "\n\n".join(message.content for message in asked)
        answers.append(Answer(part.name, templates[index].name, prompt, reply.content, completion, score))
    return answers


def _lines(part: HeldOut, answers: Sequence[Answer]) -> list[dict[str, Any]]:
    values: dict[str, list[float]] = defaultdict(list)
    for answer in answers:
        for metric, value in answer.scores.items():
            values[metric].append(value)
    return [
        {
            "task": part.name,
            "split": "heldout",
            "template_split": part.template_split,
            "metric": metric,
            "value": float(np.mean(found)),
            "count": len(found),
        }
        for metric, found in values.items()
    ]
