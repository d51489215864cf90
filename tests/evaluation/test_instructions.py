"""Scored answers: a model that answers right scores 1, one that says nothing scores 0."""

import pytest

from itjax.base.schema import Evaluation, Run, Source
from itjax.data.prepare import prepare
from itjax.evaluation.instructions import answer_scores
from itjax.text import chat


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    sources = {name: Source(task=name, examples=20) for name in ("triage", "functions")}
    folder = str(tmp_path_factory.mktemp("cache"))
    run = Run(sources=sources, steps=1, length=400, vocab_size=600, cache_dir=folder, evaluation=Evaluation(generate=3))
    return prepare(run, progress=lambda *_: None)


def scores(data, say):
    """Runs the evaluator with a model that says `say(conversation)` to each prompt."""
    conversations = [part.task.conversation(i) for part in data.held for i in range(3)]
    answers = {}
    for conversation in conversations:
        ids, _ = chat.encode(chat.prompt(conversation.messages[:-1], data.format), data.tokenizer)
        answers[tuple(ids.tolist())] = data.tokenizer.encode(say(conversation))
    kept = []
    evaluate = answer_scores(
        lambda params, prompts: [answers[tuple(prompt)] for prompt in prompts],
        data.held,
        tokenizer=data.tokenizer,
        fmt=data.format,
        count=3,
        keep=lambda step, given: kept.extend(given),
    )
    return evaluate(7, {}), kept


def test_right_answers_score_one_for_every_task_and_phrasing_group(data):
    lines, kept = scores(data, lambda conversation: conversation.messages[-1].content)
    assert {(line["task"], line["template_split"]) for line in lines} == {
        (task, split) for task in ("triage", "functions") for split in ("seen", "heldout")
    }
    assert {line["value"] for line in lines} == {1.0}
    assert len(kept) == 12
    assert all(answer.completion == answer.reference for answer in kept)


def test_silence_scores_zero(data):
    lines, _ = scores(data, lambda conversation: "")
    assert {line["value"] for line in lines} == {0.0}
    assert all(line["count"] >= 1 for line in lines)
