"""What is a fault of a row, what only looks like one, and what becomes of both."""

import pickle
import time

import pytest

from itjax.base.records import Conversation, Message, ToolCall
from itjax.base.schema import Filters
from itjax.data import quality
from itjax.data.quality import Quality
from itjax.data.stages import Example


def look(answer, asked="Tell me.", **options):
    messages = (Message("user", asked), Message("assistant", answer))
    return Quality(Filters(**options)).look(Example(0, "train", Conversation(messages, "mine", "mine.jsonl:1")))


def reasons(answer, asked="Tell me.", **options):
    return [finding.reason for finding in look(answer, asked, **options)]


LONG = "The river rises in the hills, passes four old towns and meets the sea beside a harbour where small boats wait for wind."


@pytest.mark.parametrize(
    "answer, kind",
    [
        ("I'm sorry, but I can't assist with that.", "full"),
        ("I cannot help with that request.", "full"),
        ("Sorry, I am unable to share this.", "full"),
        ("As an AI, I am not able to browse the web.", "full"),
        ("I\u2019m sorry, I can\u2019t do that.", "full"),
        ("I can't write that story. However, here is another one that you may like: " + LONG, "partial"),
        (LONG + " " + LONG + " I cannot provide more than that.", "partial"),
        ("I'm sorry to hear that your cat is ill. Keep it warm and call a vet.", None),
        ("I won't be able to help with this.", "full"),
        ("I cannot in good conscience provide this.", "full"),
        ("I must respectfully decline.", "full"),
        ("I can't wait to tell you about it!", None),
        ("You cannot divide by zero.", None),
        ("We won't know until tomorrow.", None),
        ("Sure, I can help with that!", None),
        (LONG, None),
    ],
)
def test_refusals_are_full_partial_or_none(answer, kind):
    assert quality.refusal(answer) == kind


@pytest.mark.parametrize(
    "answer, asked, expected",
    [
        ("", "Tell me.", ["empty answer"]),
        (" \n\t", "Tell me.", ["empty answer"]),
        ("Blue.", "Tell me.", []),
        ("As an AI language model, I love it.", "Tell me.", ["boilerplate"]),
        ("Hello! I am {{name}}, made by {{ author }}.", "Tell me.", ["placeholder", "placeholder"]),
        ("Dear <INSERT NAME HERE>, hello", "Tell me.", ["placeholder"]),
        ("Use it like this:\n```\nHello {{ name }}\n```", "Tell me.", []),
        (r"\frac{{a}}{{b}} and x^{{ab}}", "Tell me.", []),
        ("skiing down a mountain<|endoftext|>", "Tell me.", ["control text"]),
        ("Yes</s>", "Tell me.", ["control text"]),
        ("<s>old price</s> is now 3 <b>EUR</b>", "Tell me.", []),
        ("It\u00e2\u20ac\u2122s a caf\u00c3\u00a9", "Tell me.", ["mojibake"]),
        ("N\u00c3O, \u00c2ngela caf\u00e9 \u00a9 2020 \u20ac5", "Tell me.", []),
        ('```json\n{"a": 1,}\n```', "Tell me.", ["broken json"]),
        ('```json\n{"a": 1}\n``` and ```json\n[1, 2]\n```', "Tell me.", []),
        ('```json\n{"a": NaN}\n```', "Tell me.", ["broken json"]),
        ('```json5\n{a: 1,}\n```', "Tell me.", []),
        ('Here it is: {"a": 1}', "Answer with JSON only.", ["broken json"]),
        ('{"a": 1}', "Answer with JSON only.", []),
        ("JSON is a format.", "What is JSON?", []),
        ("It carries data.", "What is JSON only for?", []),
        ("Use d.keys().", "How do I print only JSON keys in Python?", []),
    ],
)  # fmt: skip
def test_faults_and_what_only_looks_like_one(answer, asked, expected):
    assert reasons(answer, asked) == expected


def test_a_repetition_is_the_share_of_words_that_stood_there_before():
    assert quality.repetition("a b c d a b c d e") == pytest.approx(4 / 9)
    assert quality.repetition("a b c d e f g h") == 0
    assert quality.repetition("漢字仮名漢字仮名") == 0.5
    assert quality.repetition("") == 0


def test_answers_that_repeat_themselves_are_tagged_beyond_the_limit():
    answer = "It is good to eat fruit. " * 5
    (finding,) = look(answer)
    assert (finding.reason, finding.action) == ("repetition", "tag")
    assert finding.score == pytest.approx(0.8)
    assert reasons(answer, max_repetition=0.9) == []


def test_limits_on_words_drop_rows():
    assert reasons("Two words", min_words=3) == ["short answer"]
    assert reasons("One two three four", max_words=3) == ["long answer"]
    assert reasons("漢字仮名", max_words=3) == ["long answer"]
    assert {finding.action for finding in look("Two words", min_words=3)} == {"drop"}


def test_a_tool_call_is_no_empty_answer():
    messages = (Message("user", "go"), Message("assistant", "", tool_calls=(ToolCall("go", {}),)))
    assert Quality(Filters()).look(Example(0, "train", Conversation(messages, "mine", "k"))) == []


def test_actions_are_the_readers():
    assert [finding.action for finding in look("", actions={"empty answer": "tag"})] == ["tag"]
    assert [finding.action for finding in look("I cannot help.", actions={"refusal": "drop"})] == ["drop"]


@pytest.mark.parametrize(
    "actions, message",
    [({"refusals": "drop"}, "Did you mean 'refusal'"), ({"refusal": "mask"}, "use 'drop' or 'tag'")],
)
def test_a_wrong_action_is_one_message(actions, message):
    with pytest.raises(ValueError, match=r"config\.audit\.actions") as error:
        Quality(Filters(actions=actions))
    assert message in str(error.value)


def test_answers_in_other_languages_are_dropped():
    pytest.importorskip("py3langid")
    german = "Der Fluss kommt aus den Bergen, fließt durch vier alte Städte und erreicht am Ende das Meer."
    assert reasons(german, languages=("en",)) == ["other language"]
    assert reasons(german, languages=("en", "de")) == []
    assert reasons(LONG, languages=("en",)) == []
    assert reasons("Ja.", languages=("en",)) == []  # too short to tell


def test_a_missing_package_is_missed_at_the_start(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "py3langid", None)
    with pytest.raises(ValueError, match=r"config\.audit\.languages: .* pip install 'itjax\[language\]'"):
        Quality(Filters(languages=("en",)))


def test_the_stage_travels_to_other_processes():
    stage = pickle.loads(pickle.dumps(Quality(Filters())))
    assert stage.look(Example(0, "train", Conversation((Message("assistant", ""),), "mine", "k")))


def test_identity_rows_and_template_rows_of_real_data(shared_data):
    from itjax.data import sources

    def count(path, reason):
        (source,) = sources.open_files(str(shared_data / path))
        stage, rows = Quality(Filters()), [source.conversation(number) for number in range(len(source))]
        return sum(any(one.reason == reason for one in stage.look(Example(0, "train", row))) for row in rows), len(rows)

    found, rows = count("llama_factory/identity.json", "placeholder")
    assert found / rows > 0.9
    found, _ = count("llama_factory/v1_sft_demo.jsonl", "placeholder")
    assert found > 40


BAD = (
    "i can't ", "sorry, but i a ", "as an ai ", "i cannot a a a ", "{{", "{{a ", "<INSERT ", "<|a", "[INST]", "</s>", "```json",
    "```", "[[", '{"a":', "\u00c3", "\u00e2\u20ac", "a a a a ", "漢", " ", "however ", "return ", "use only a b ",
)  # fmt: skip


@pytest.mark.parametrize("seed", BAD)
def test_time_grows_with_the_text_and_no_faster(seed):
    def seconds(size):
        started = time.process_time()
        look((seed * size)[:size], asked=(f"json only {seed}" * size)[:size])
        return time.process_time() - started

    times = [min(seconds(size) for _ in range(2)) for size in (15_000, 60_000)]
    assert times[1] < 1
    assert times[1] < 9 * times[0] + 0.02
