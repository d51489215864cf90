"""From a config to encoded data: what is held out is never trained on, what is left out is told."""

import dataclasses
import gzip
import json
import os

import pytest

from itjax.base.schema import Evaluation, Run, Source
from itjax.data.prepare import prepare
from itjax.text import formats


def quiet(*_: object) -> None:
    """Nobody watches."""


@pytest.fixture
def run(tmp_path):
    rows = [{"prompt": f"question {number}?", "completion": f"answer {number}"} for number in range(40)]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "long.jsonl").write_text(json.dumps({"prompt": "x " * 300, "completion": "y"}) + "\n")
    return Run(
        files=f"{tmp_path}/mine.jsonl",
        steps=1,
        length=64,
        vocab_size=400,
        cache_dir=str(tmp_path / "cache"),
        evaluation=Evaluation(examples=6, fraction=0.5),
    )


def addresses(source) -> set[str]:
    return {source.address(index) for index in range(len(source))}


def test_held_out_rows_are_not_trained_on(run):
    data = prepare(run, progress=quiet)
    train, held = addresses(data.train[0]), addresses(data.held[0].encoded)
    assert (len(train), len(held)) == (34, 6)
    assert not train & held


def test_named_evaluation_files_leave_the_training_files_whole(run, tmp_path):
    data = prepare(dataclasses.replace(run, eval_files=f"{tmp_path}/long.jsonl", length=2000), progress=quiet)
    assert len(data.train[0]) == 40
    assert [part.name for part in data.held] == ["long"]


def test_a_source_that_loses_every_row_is_left_out_and_told(run, tmp_path):
    data = prepare(dataclasses.replace(run, files=f"{run.files},{tmp_path}/long.jsonl"), progress=quiet)
    assert [source.name for source in data.train] == ["mine"]
    assert any("long is left out" in note for note in data.notes())
    assert any("1 of 35 examples dropped: too long" in note for note in data.notes())


def test_no_example_at_all_is_an_error_with_the_way_out(run, tmp_path):
    with pytest.raises(ValueError, match=r"no example is left .*too long.* Raise config.length \(now 64\)"):
        prepare(dataclasses.replace(run, files=f"{tmp_path}/long.jsonl"), progress=quiet)


def test_an_embedded_task_is_held_out_in_seen_and_other_phrasings(run):
    sources = {"a": Source(task="triage", examples=30), "b": Source(files=run.files, weight=0.5)}
    data = prepare(dataclasses.replace(run, files="", sources=sources, length=400), progress=quiet)
    assert [source.name for source in data.train] == ["a", "b"]
    assert [node.weight for node in data.gathered.mixture.members] == [None, 0.5]
    assert [(part.name, part.template_split) for part in data.held] == [("a", "seen"), ("a", "heldout"), ("b", None)]


@pytest.mark.parametrize("name", sorted(formats.FORMATS))
def test_the_automatic_tokenizer_has_the_control_tokens_of_the_format(run, name):
    data = prepare(dataclasses.replace(run, format=name, length=512), progress=quiet)
    assert data.format.name == name
    assert all(data.tokenizer.control(control) is not None for control in formats.FORMATS[name].controls)


def test_the_automatic_tokenizer_is_made_once_for_the_same_rows(run, tmp_path):
    first, second = (prepare(run, progress=quiet).tokenizer.fingerprint() for _ in range(2))
    assert first == second
    assert len(list((tmp_path / "cache" / "tokenizers").glob("*.model"))) == 1


@pytest.mark.parametrize("is_there", [False, True])
def test_nobody_else_can_read_what_is_kept_of_the_data(run, tmp_path, is_there):
    """A cache folder of one's own that others may list: what is put into it they may not."""
    place = tmp_path / "cache"
    packed = tmp_path / "packed.jsonl.gz"
    packed.write_bytes(gzip.compress((tmp_path / "mine.jsonl").read_bytes()))
    before = os.umask(0o022)
    try:
        if is_there:
            place.mkdir(mode=0o755)
        prepare(dataclasses.replace(run, files=str(packed), bad_rows="skip", filters=("personal",)), progress=quiet)
    finally:
        os.umask(before)
    made = [place, *place.rglob("*")][is_there:]
    assert {path.name for path in made} >= {"checked", "files", "filtered", "tokenizers", "findings.jsonl", "tokens"}
    assert [path for path in made if path.stat().st_mode & 0o077] == []
