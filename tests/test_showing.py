"""`show --templates`: every phrasing of every source, filled from a row of the source's own."""

import dataclasses
import gzip
import io
import json

import pytest
from rich.console import Console

from itjax import show, showing
from itjax.base.schema import Run, Source
from itjax.data import library
from itjax.data.tasks import FAMILIES


@pytest.fixture
def run(tmp_path):
    reviews = [{"review": "Late \u202eagain {label}", "stars": "bad"}, {"review": "Nice", "stars": "good"}]
    (tmp_path / "reviews.jsonl").write_text("".join(json.dumps(row) + "\n" for row in reviews))
    (tmp_path / "stars.toml").write_text(
        'extends = "classification"\nkind = "stars"\nfields.labels = { default = ["bad", "good"] }\n'
    )
    columns = {"text": "review", "label": "stars"}
    files = str(tmp_path / "reviews.jsonl")
    nested = {"mine": Source(files=files, templates=str(tmp_path / "stars.toml"), columns=columns)}
    return Run(
        sources={
            "triage": Source(task="triage", examples=5),
            "reviews": Source(files=files, kind="classification", columns=columns),
            "both": Source(sources=nested),
        }
    )


def printed(run):
    console = Console(file=io.StringIO(), width=200)
    showing.print_templates(run, console, visible=show.visible)
    return console.file.getvalue()


def test_every_phrasing_of_every_source_is_shown_on_a_row_of_its_own(run):
    text = printed(run)
    first, second, third = (text.index(f"{name} · ") for name in ("triage", "reviews", "both/mine"))
    assert first < second < third
    for start, stop, phrasings in (
        (first, second, FAMILIES["triage"].templates),
        (second, third, library.family("classification").templates),
        (third, None, library.family("classification").templates),
    ):
        for template in phrasings:
            assert text[start:stop].count(f"\n{template.name}  {'held out' if template.heldout else 'seen'}") == 1


def test_what_does_not_fit_the_row_says_why_and_what_fits_is_filled(run):
    text = printed(run)
    plain, extended = text[text.index("reviews · ") : text.index("both/mine · ")], text[text.index("both/mine · ") :]
    assert "not for this row: the row has no labels" in plain
    assert "not for this row" not in extended
    assert "Answer with its category." in plain
    assert "\\u202eagain {label}" in plain, "what hides is shown, and data is no pattern"


def test_a_run_without_phrasings_says_so(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    assert "No source of this run is asked in phrasings" in printed(Run(files=str(tmp_path / "a.jsonl")))


def test_a_column_that_is_missing_is_told_with_those_there_are(run):
    source = run.sources["reviews"]
    wrong = Run(sources={"reviews": Source(files=source.files, kind="classification", columns={"text": "review"})})
    with pytest.raises(ValueError, match=r"reviews.jsonl:1: field 'label' of family 'classification' .* 'stars'"):
        printed(wrong)


def test_the_command_knows_the_flag(run, capsys, monkeypatch):
    monkeypatch.setattr(show.freeze, "load", lambda argv, values: (values(["show", *argv]), run)[1])
    assert show.command(["--templates"]) == 0
    assert "seen" in capsys.readouterr().out


def test_a_mistake_in_a_nested_source_names_its_place(run):
    nested = {"both": Source(sources={"mine": Source(files="nowhere.jsonl", kind="qa")})}
    with pytest.raises(ValueError, match=r"config\.sources\.both\.sources\.mine\.files: nothing matches"):
        printed(dataclasses.replace(run, sources=nested))


def test_copies_of_packed_files_are_kept_in_the_cache_of_the_run(run, tmp_path):
    packed = tmp_path / "reviews.jsonl.gz"
    packed.write_bytes(gzip.compress((tmp_path / "reviews.jsonl").read_bytes()))
    source = dataclasses.replace(run.sources["reviews"], files=str(packed))
    printed(dataclasses.replace(run, sources={"reviews": source}, cache_dir=str(tmp_path / "cache")))
    assert list((tmp_path / "cache").rglob("*"))
