"""What a report promises: every number of the run directory is found again, whatever the run has got to."""

import dataclasses
import html.parser
import io
import json
import math
import re
import time

import pytest
from rich.console import Console

from itjax.base import freeze
from itjax.base.schema import Run, Source
from itjax.evaluation import report
from itjax.evaluation.instructions import Answer

FAMILIES = ("triage", "arithmetic", "functions", "support")
QUICKSTART = Run(steps=40, sources={name: Source(task=name, examples=100) for name in FAMILIES})
FILES = Run(steps=40, files="data/*.jsonl")


def train_line(step, **changes):
    line = {
        "kind": "train",
        "step": step,
        "loss": 4 * math.exp(-step / 20) + 0.5 + 0.05 * math.sin(7 * step),
        "grad_norm": 1.0 + 0.2 * math.cos(step),
        "learning_rate": 6e-3 * min(1, step / 5),
        "tokens": 2040,
        "trained_tokens": 700,
        "fill": 0.996,
        "step_seconds": 0.05,
        "input_wait_seconds": 0.0,
        "tokens_per_second": 40_000.0 + step,
        "mfu": None,
        "epoch": step / 40,
        "skipped": False,
        "example_ids": "0123456789abcdef",
    }
    return line | changes


def eval_line(step, task, metric, value, split="seen"):
    return {
        "kind": "eval",
        "step": step,
        "task": task,
        "split": "heldout",
        "template_split": split,
        "metric": metric,
        "value": value,
        "count": 64,
    }


def family_lines(steps=(0, 20, 40)):
    """Right answers grow from nothing: on held-out phrasings to 0.6, 0.7, 0.8, 0.9."""
    for step in steps:
        share = step / steps[-1]
        for number, task in enumerate(FAMILIES):
            for split, end in (("seen", 1.0), ("heldout", 0.6 + number / 10)):
                yield eval_line(step, task, "exact_match", share * end, split)
                if task == "functions":
                    yield eval_line(step, task, "tests_passed", share * end, split)
                if task in ("triage", "support"):
                    yield eval_line(step, task, "valid_json", share, split)
                yield eval_line(step, task, "loss", 7 - 5 * share * end, split)


def source_lines(num, steps=(0, 20, 40)):
    """Source i falls from 6 to 6 - i / 10."""
    for step in steps:
        for number in range(num):
            yield eval_line(step, f"task{number:03}", "loss", 6 - number / 10 * step / steps[-1], None)


def manifest(names):
    share = {"examples": 1 / len(names), "tokens": 1 / len(names), "trained_tokens": 1 / len(names)}
    return {
        "plan": {
            "hash": "feedbeef",
            "num_steps": 40,
            "num_rows": 320,
            "examples": 4000,
            "tokens": 81_600,
            "trained_tokens": 28_000,
            "trained_share": 0.343,
            "fill": 0.996,
            "epochs": 1.0,
        },
        "sources": {
            name: {
                "rows_read": 1000,
                "kept": 990,
                "dropped": {"too long": 7, "no trained token": 3},
                "truncated": 0,
                "epochs": 1.01,
                "planned_share": share,
                "realised_share": share,
            }
            for name in names
        },
    }


def a_run(path, run=QUICKSTART, *, steps=40, lines=None, names=FAMILIES):
    """A run directory as training leaves it."""
    path.mkdir(parents=True)
    (path / "config.json").write_text(freeze.to_json(run))
    every = [train_line(step) for step in range(1, steps + 1)] + list(family_lines() if lines is None else lines)
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in every))
    (path / "data_manifest.json").write_text(json.dumps(manifest(names)))
    return path


def answers(text):
    """Ten answers of each of two families, first in phrasings of training, then in others."""
    return [
        Answer(task, "ops/json", f"{task} {number}", "right", text, {"exact_match": 0.0})
        for task in ("triage", "support")
        for number in range(10)
    ]


def shown(table):
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(table)
    return console.export_text()


class Reader(html.parser.HTMLParser):
    """Text, tags and attributes of a page, as a browser would find them."""

    VOID = ("meta", "br")

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.attributes, self.text = [], [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes.extend((tag, name, value) for name, value in attrs)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes.extend((tag, name, value) for name, value in attrs)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "script"):
            self.text.append(data)


def page_of(run_dir):
    return Reader(report.write(run_dir).read_text())


def words(reader):
    return " ".join(" ".join(reader.text).split())


def test_the_page_of_a_run_tells_its_numbers(tmp_path):
    text = words(page_of(a_run(tmp_path / "mine")))
    assert "mine step 40 of 40" in text
    assert "0% → 75% right answers, held-out phrasings" in text  # mean of 60, 70, 80 and 90 %
    assert "functions tests passed 0% 100% 64 0% 80% 64" in text
    assert "triage (held-out) 7.000 4.000 -3.000 64" in text
    assert "triage 1,000 990 0 7 too long 3 no trained token 1.01 25% 25%" in text
    assert "optimizer.learning_rate 2e-05" in text


def test_the_page_needs_nothing_from_elsewhere(tmp_path):
    reader = page_of(a_run(tmp_path / "mine"))
    assert not {"link", "img", "iframe", "object", "base"} & set(reader.tags)
    assert [value for _, name, value in reader.attributes if name in ("src", "href")] == []
    assert any("default-src 'none'" in (value or "") for _, _, value in reader.attributes)


def test_what_data_holds_is_never_read_as_html(tmp_path):
    evil = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)>"
    lines = [eval_line(step, evil, "loss", 5 - step, None) for step in (0, 1)]
    run = a_run(tmp_path / "mine", dataclasses.replace(FILES, files=evil), lines=lines, names=[evil])
    report.save_samples(run, 1, [Answer(evil, evil, evil, evil, evil, {evil: 0.0})])
    reader = page_of(run)
    assert reader.tags.count("script") == 1
    assert "img" not in reader.tags
    assert evil in "".join(reader.text)
    compared = Reader(report.compare([run, run], tmp_path / "both.html").read_text())
    assert compared.tags.count("script") == 1


def test_every_step_with_a_finite_value_is_in_its_curve(tmp_path):
    run = a_run(tmp_path / "mine", lines=[])
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(train_line(41, loss=None, skipped=True)) + "\n")
    reader = page_of(run)
    curves = [json.loads(value) for _, name, value in reader.attributes if name == "data-curves"]
    assert curves[0]["curves"][0]["steps"] == list(range(1, 41))
    assert curves[2]["curves"][0]["steps"] == list(range(1, 42))
    assert "1 steps skipped, not finite" in words(reader)


def test_a_run_that_goes_on_has_a_page(tmp_path):
    run = a_run(tmp_path / "mine", steps=7, lines=[])
    (run / "data_manifest.json").unlink()
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "st')
    text = words(page_of(run))
    assert "step 7 of 40, not finished" in text
    assert "No evaluation has been logged yet." in text


def test_a_run_without_a_step_has_a_page(tmp_path):
    run = a_run(tmp_path / "mine", steps=0, lines=[])
    assert "No step has been logged yet." in words(page_of(run))
    (run / "metrics.jsonl").unlink()
    assert "step 0 of 40, not finished" in words(page_of(run))


def test_sixty_sources_are_all_listed_and_their_mean_stands_out(tmp_path):
    names = [f"task{number:03}" for number in range(60)]
    reader = page_of(a_run(tmp_path / "mine", FILES, lines=list(source_lines(60)), names=names))
    text = words(reader)
    assert all(f"{name} 6.000" in text for name in names)
    assert "mean of 60 6.000 3.050 -2.950" in text
    assert "60 others in grey" in text


def test_a_long_run_has_a_small_page_made_at_once(tmp_path):
    run = a_run(tmp_path / "mine", steps=20_000, lines=[])
    before = time.perf_counter()
    path = report.write(run)
    assert time.perf_counter() - before < 5
    assert path.stat().st_size < 300_000


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match=re.escape("no config.json and no metrics.jsonl; give the run_dir")):
        report.write(tmp_path)


def test_a_damaged_line_is_named(tmp_path):
    run = a_run(tmp_path / "mine", steps=2, lines=[])
    (run / "metrics.jsonl").write_text('{"kind": "train"\n{}\n')
    with pytest.raises(ValueError, match=re.escape("metrics.jsonl:1: not JSON")):
        report.write(run)


def test_sample_answers_stand_beside_their_reference(tmp_path):
    run = a_run(tmp_path / "mine")
    report.save_samples(run, 0, answers("nothing yet"))
    report.save_samples(run, 40, answers("done"))
    text = words(page_of(run))
    assert "triage 0 reference right step 0: ✗ exact match nothing yet step 40: ✗ exact match done" in text


def test_samples_are_few_spread_and_kept_once_a_step(tmp_path):
    report.save_samples(tmp_path, 0, answers("first"))
    report.save_samples(tmp_path, 20, answers("second"))
    report.save_samples(tmp_path, 20, answers("second again"))
    lines = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert [line["prompt"] for line in lines[:6]] == [f"triage {number}" for number in (0, 1, 3, 5, 6, 8)]
    assert [(line["step"], line["completion"]) for line in lines[::12]] == [(0, "first"), (20, "second again")]
    assert set(lines[0]) == {"step", "task", "template", "prompt", "reference", "completion", "scores"}


def test_the_table_of_tasks_shows_each_family_before_and_after(tmp_path):
    text = shown(report.task_table(a_run(tmp_path / "mine")))
    rows = [
        [cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines() if "->" in line and "│" in line
    ]
    assert rows == [
        ["triage", "exact match", "0% -> 100%", "0% -> 60%"],
        ["triage", "valid json", "0% -> 100%", "0% -> 100%"],
        ["arithmetic", "exact match", "0% -> 100%", "0% -> 70%"],
        ["functions", "tests passed", "0% -> 100%", "0% -> 80%"],
        ["support", "exact match", "0% -> 100%", "0% -> 90%"],
        ["support", "valid json", "0% -> 100%", "0% -> 100%"],
        ["average", "primary metric", "0% -> 100%", "0% -> 75%"],
        ["average", "valid json", "0% -> 100%", "0% -> 100%"],
    ]


def test_a_source_with_a_name_of_its_own_is_known_by_its_family(tmp_path):
    run = Run(steps=40, sources={"code": Source(task="functions", examples=9)})
    lines = [eval_line(step, "code", name, step / 40) for step in (0, 40) for name in ("exact_match", "tests_passed")]
    text = shown(report.task_table(a_run(tmp_path / "mine", run, lines=lines, names=["code"])))
    assert "tests passed" in text
    assert "exact match" not in text


def test_one_evaluation_alone_is_no_change(tmp_path):
    text = shown(report.task_table(a_run(tmp_path / "mine", lines=list(family_lines((40,))))))
    assert "->" not in text.split("\n", 1)[1]
    assert "60%" in text


def test_the_table_of_losses_shows_the_best_and_the_worst_of_many(tmp_path):
    few = shown(report.loss_table(a_run(tmp_path / "few", FILES, lines=list(source_lines(12)))))
    many = shown(report.loss_table(a_run(tmp_path / "many", FILES, lines=list(source_lines(60)))))
    assert all(f"task{number:03}" in few for number in range(12))
    assert [f"task{number:03}" in many for number in (59, 56, 55, 4, 3, 0)] == [True, True, False, False, True, True]
    assert "52 between" in many
    assert re.search(r"mean of 60 *│ 6.000 │ 3.050 │ -2.950", many)


def test_a_name_with_brackets_is_shown_as_it_is(tmp_path):
    lines = [eval_line(0, "[red]apples[/red]", metric, 0.5) for metric in ("loss", "exact_match")]
    run = a_run(tmp_path / "mine", lines=lines)
    assert "[red]apples[/red]" in shown(report.task_table(run))
    assert "[red]apples[/red]" in shown(report.loss_table(run))


def test_a_comparison_shows_what_differs(tmp_path):
    one = a_run(tmp_path / "one")
    two = a_run(tmp_path / "two", dataclasses.replace(QUICKSTART, seed=7), lines=list(family_lines((0, 20))))
    text = words(Reader(report.compare([one, two], tmp_path / "both.html").read_text()))
    assert "seed 0 7" in text
    assert "steps 40 40" not in text
    assert "triage held-out exact match 60% 60%" in text


def test_the_next_commands_name_the_run(tmp_path):
    text = report.next_commands("runs/my run", config="configs/quickstart.py")
    commands = [line for line in text.splitlines() if line.startswith("  python -m itjax.")]
    assert [line.split()[2] for line in commands] == ["itjax.show", "itjax.verify", "itjax.main"]
    assert "--html='runs/my run/rows.html'" in text
