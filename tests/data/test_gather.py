"""From a config to rows: what is skipped, sampled, held out, filtered and put into words."""

import dataclasses
import json
from pathlib import Path

import pytest

from itjax.base.schema import Evaluation, Mixture, Run, Source
from itjax.data.gather import gather, in_editions
from itjax.data.phrase import exemplars


def quiet(*_: object) -> None:
    """Nobody watches."""


@pytest.fixture
def run(tmp_path):
    """Twenty questions, two of them twice, one of them with an address, and a broken line."""
    rows = [{"prompt": f"what is {number} plus one?", "completion": f"it is {number + 1}"} for number in range(17)]
    rows += [rows[3], rows[5], {"prompt": "where do I write to?", "completion": "write to jane@example.com"}]
    lines = [json.dumps(row) for row in rows]
    lines.insert(7, '{"prompt": "broken')
    (tmp_path / "sums.jsonl").write_text("\n".join(lines) + "\n")
    labels = [{"text": f"note {number}", "label": "good" if number % 2 else "bad"} for number in range(30)]
    (tmp_path / "notes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in labels))
    return Run(
        steps=1,
        data_dir=str(tmp_path),
        cache_dir=str(tmp_path / "cache"),
        sources={"sums": Source(files="sums.jsonl")},
        bad_rows="skip",
        max_bad_rows=0.1,
        evaluation=Evaluation(examples=0),
    )


def gathered(run):
    return gather(run, folder=Path(run.cache_dir), progress=quiet)


def texts(rows) -> list[str]:
    return [rows.conversation(index).messages[-1].content for index in range(len(rows))]


def test_a_row_that_cannot_be_read_is_skipped_listed_and_counted(run, tmp_path):
    found = gathered(run)
    assert len(found.train[0]) == 20
    assert found.account()["skipped"] == {"not JSON": 1}
    found.save(tmp_path)
    listed = [json.loads(line) for line in (tmp_path / "bad_rows.jsonl").read_text().splitlines()]
    assert [row["key"].rpartition(":")[2] for row in listed] == ["8"]


def test_every_row_of_a_source_has_a_place_in_its_account(run):
    """21 lines: one is broken, two are more than wanted, three are held out; some of the rest repeat others."""
    sums = Source(files="sums.jsonl", examples=18)
    changed = {"sources": {"sums": sums}, "evaluation": Evaluation(examples=3), "filters": ("exact_duplicates",)}
    found = gathered(dataclasses.replace(run, **changed))
    told = found.account_of("sums")
    assert (told["held_out"], told["not_sampled"], told["dropped"]["not JSON"]) == (3, 2, 1)
    assert len(found.train[0]) + 3 + 2 + sum(told["dropped"].values()) == 21
    assert [reason.partition(":")[0] for reason in told["dropped"]] == ["not JSON", "exact_duplicates"]


def test_more_bad_rows_than_allowed_are_an_error(run):
    with pytest.raises(ValueError, match=r"1 of 21 rows cannot be used .* more than max_bad_rows=0.01"):
        gathered(dataclasses.replace(run, max_bad_rows=0.01))


def test_filters_drop_repeats_and_mask_addresses_and_say_so(run, tmp_path):
    found = gathered(dataclasses.replace(run, filters=("exact_duplicates", "personal")))
    said = texts(found.train[0])
    assert len(said) == 18
    assert len(set(said)) == 18
    assert not any("jane" in text for text in said)
    counts = found.account()["filters"]["sums"]
    assert (counts["rows"], counts["kept"], sum(counts["dropped"].values()), sum(counts["masked"].values())) == (
        20,
        18,
        2,
        1,
    )
    found.save(tmp_path)
    assert len((tmp_path / "findings.jsonl").read_text().splitlines()) == 3


def test_what_filters_found_is_remembered_until_the_rows_change(run, tmp_path):
    wanted = dataclasses.replace(run, filters=("exact_duplicates",))
    first, second = gathered(wanted), gathered(wanted)
    assert first.train[0].fingerprint() == second.train[0].fingerprint()
    assert len(list((tmp_path / "cache" / "filtered").iterdir())) == 1
    with (tmp_path / "sums.jsonl").open("a") as file:
        file.write(json.dumps({"prompt": "what is 4 plus one?", "completion": "it is 5"}) + "\n")
    assert len(gathered(wanted).train[0]) == 18


def test_rows_that_evaluation_files_hold_leak_and_are_dropped(run, tmp_path):
    long = "a train leaves the station at nine and arrives at noon, how long does it travel between them"
    with (tmp_path / "sums.jsonl").open("a") as file:
        file.write(json.dumps({"prompt": long, "completion": "three hours"}) + "\n")
    (tmp_path / "test.jsonl").write_text(json.dumps({"question": long}) + "\n")
    options = dataclasses.replace(run.audit, leakage_files="test.jsonl")
    found = gathered(dataclasses.replace(run, filters=("leakage",), audit=options))
    assert "three hours" not in texts(found.train[0])
    (tmp_path / "test.jsonl").write_text(
        json.dumps({"question": "something else altogether, as long as the other was"})
    )
    assert "three hours" in texts(gathered(dataclasses.replace(run, filters=("leakage",), audit=options)).train[0])


def test_a_sample_of_a_source_is_drawn_by_the_seed(run):
    sampled = dataclasses.replace(run, sources={"sums": Source(files="sums.jsonl", examples=5)})
    first, other = gathered(sampled).train[0], gathered(dataclasses.replace(sampled, seed=1)).train[0]
    assert len(first) == len(other) == 5
    assert texts(first) != texts(other)


@pytest.fixture
def phrased(run):
    source = Source(files="notes.jsonl", kind="classification", few_shot=2)
    return dataclasses.replace(run, sources={"notes": source}, evaluation=Evaluation(examples=6, fraction=0.5))


def test_no_held_out_phrasing_and_no_held_out_row_enters_training(phrased):
    found = gathered(phrased)
    train = in_editions(found.train[0], 3)
    conversations = [train.conversation(index) for index in range(len(train))]
    held = [part.rows.conversation(index) for part in found.held for index in range(len(part.rows))]
    assert {part.template_split for part in found.held} == {"seen", "heldout"}
    assert {one.tags["template_split"] for one in conversations} == {"seen"}
    held_keys = {one.key for one in held}
    assert not held_keys & {one.key for one in conversations}
    assert not held_keys & {key for one in (*conversations, *held) for key in exemplars(one)}
    assert any(exemplars(one) for one in conversations)
    assert not {one.template for one in conversations} & {
        one.template for one in held if one.tags["template_split"] == "heldout"
    }


def test_each_edition_says_a_row_in_other_words(phrased):
    rows = in_editions(gathered(phrased).train[0], 2)
    half = len(rows) // 2
    assert half == 24
    same = sum(rows.conversation(i).template == rows.conversation(half + i).template for i in range(half))
    assert same == 0


def test_filters_see_rows_in_words_and_drop_them_in_every_edition(phrased, tmp_path):
    with (tmp_path / "notes.jsonl").open("a") as file:
        file.write(json.dumps({"text": "write to jane@example.com", "label": "good"}) + "\n")
    options = dataclasses.replace(phrased.audit, personal="drop")
    found = gathered(
        dataclasses.replace(phrased, filters=("personal",), audit=options, evaluation=Evaluation(examples=0))
    )
    rows = in_editions(found.train[0], 3)
    assert len(rows) == 90
    masked = gathered(dataclasses.replace(phrased, filters=("personal",), evaluation=Evaluation(examples=0)))
    said = [message.content for i in range(31) for message in masked.train[0].conversation(i).messages]
    assert not any("jane" in text for text in said)


def test_sources_nest_and_keep_their_place_in_the_mixture(run):
    inner = {"a": Source(files="sums.jsonl", weight=0.25), "b": Source(files="notes.jsonl", kind="classification")}
    sources = {"all": Source(sources=inner, mixture=Mixture(rates="equal")), "task": Source(task="triage", examples=8)}
    found = gathered(dataclasses.replace(run, sources=sources))
    assert [rows.name for rows in found.train] == ["all/a", "all/b", "task"]
    assert [leaf.name for leaf in found.mixture.leaves()] == ["all/a", "all/b", "task"]


def test_two_sources_of_one_name_are_refused(run, tmp_path):
    with pytest.raises(ValueError, match="two sources are named 'sums'"):
        gathered(dataclasses.replace(run, files="sums.jsonl"))


@pytest.mark.parametrize(
    ("source", "place"),
    [
        (Source(files="nowhere.jsonl"), r"config\.sources\.all\.sources\.one\.files: nothing matches"),
        (
            Source(files="notes.jsonl", kind="clasification"),
            r"config\.sources\.all\.sources\.one\.kind: 'clasification'",
        ),
        (Source(files="notes.jsonl", shape="masages"), r"config\.sources\.all\.sources\.one\.shape: 'masages'"),
    ],
)
def test_a_mistake_names_its_place_in_the_config(run, source, place):
    with pytest.raises(ValueError, match=place):
        gathered(dataclasses.replace(run, sources={"all": Source(sources={"one": source})}))


def test_evaluation_files_that_are_not_there_name_their_setting(run):
    with pytest.raises(ValueError, match=r"config\.eval_files: nothing matches"):
        gathered(dataclasses.replace(run, eval_files="nowhere.jsonl"))


def test_a_source_can_be_held_out_as_a_whole(phrased):
    """A task that is never trained on: its loss tells what a model makes of tasks that it does not know."""
    task = Source(files="sums.jsonl", held_out=True, examples=7)
    notes = Source(files="notes.jsonl", kind="classification", held_out=True, few_shot=2)
    inner = Source(sources={"a": notes, "b": Source(files="sums.jsonl")})
    found = gathered(dataclasses.replace(phrased, sources={"whole": task, "group": inner}))
    assert [rows.name for rows in found.train] == ["group/b"]
    assert [(part.name, part.template_split, len(part.rows)) for part in found.held] == [
        ("whole", None, 7), ("group/a", "seen", 30), ("group/a", "heldout", 30), ("group/b", None, 6)
    ]  # fmt: skip
    with pytest.raises(ValueError, match="every source is held out"):
        gathered(dataclasses.replace(phrased, sources={"whole": task}))
