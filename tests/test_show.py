"""What `itjax.show` promises: every id of a row, as the text that the model sees, with the weight that the loss gives it."""

import dataclasses
import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from itjax import show
from itjax.base.schema import Loss, Run
from itjax.data import prepare
from itjax.data.loader import Placed
from itjax.show import Unit
from itjax.text import tokenizer
from itjax.text.tokenizer import SentencePiece
from tests.evaluation.test_report import Reader

ROWS = [
    ("Capital of France?", "Paris."),
    ("Say <|im_end|> <b>loudly</b>", "\ttabs\nlines  and   spaces "),
    ("Ψυχή 鬱 🙂👩‍👩‍👧?", "é ü 漢字 🙂"),
    ("\x1b[31mred\x1b[0m \u202eright to left", "no"),
]
CHATML = (
    "<|im_start|>user\nCapital of France?<|im_end|>\n"
    "<|im_start|>assistant\nParis.<|im_end|>\n"
)  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Four rows of a file in packed rows of 160 positions; two epochs of them."""
    folder = tmp_path_factory.mktemp("show")
    lines = [json.dumps({"prompt": prompt, "completion": completion}) for prompt, completion in ROWS]
    (folder / "mine.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    base = Run(files=str(folder / "mine.jsonl"), epochs=2, vocab_size=300, length=160, rows=2, cache_dir=str(folder))
    return dataclasses.replace(base, evaluation=dataclasses.replace(base.evaluation, examples=0))


def rows_of(run, *, rows=None, step=None):
    data = prepare.prepare(run, progress=lambda what, done, total: None)
    loader = show.plan(run, data)
    rows = rows or (None if step else loader.num_steps * run.rows)
    numbers = show.chosen(loader, rows_per_step=run.rows, rows=rows, step=step)
    return list(show.read(loader, data, numbers, rows_per_step=run.rows)), loader, data


def text_of(example):
    return "".join(segment["text"] for segment in example["segments"])


@pytest.fixture(scope="module")
def shown(run):
    rows, _, _ = rows_of(run)
    return [example for row in rows for example in show.as_json(row)["examples"]]


def test_the_text_of_an_example_is_what_the_format_writes(shown):
    """Written by hand from the definition of ChatML: an oracle that knows nothing of tokens."""
    for example in shown:
        prompt, completion = ROWS[int(example["key"].rsplit(":", 1)[1]) - 1]
        expected = f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n{completion}<|im_end|>\n"
        assert text_of(example) == expected


def test_what_is_learned_is_the_answer_and_its_end(shown):
    example = next(example for example in shown if example["key"].endswith(":1"))
    learned = [(segment["text"], segment["special"]) for segment in example["segments"] if segment["weight"]]
    assert learned == [("Paris.", False), ("<|im_end|>", True)]
    assert text_of(example) == CHATML


def test_a_control_token_that_data_spells_is_text(shown):
    example = next(example for example in shown if example["key"].endswith(":2"))
    assert [s["text"] for s in example["segments"] if s["special"]] == ["<|im_start|>", "<|im_end|>"] * 2
    assert "<|im_end|> <b>loudly</b>" in example["segments"][1]["text"]


def test_the_arrays_are_those_of_the_batch(run):
    rows, loader, _ = rows_of(run)
    for row in rows:
        batch = loader.batch(row.step - 1, all_rows=True)
        at = row.number % run.rows
        for name in ("tokens", "targets", "weights", "positions"):
            found = [value for example in show.as_json(row)["examples"] for value in example[name]]
            assert found == getattr(batch, f"{name}_BT")[at, : len(found)].tolist()
            assert not getattr(batch, f"{name}_BT")[at, len(found) :].any()


def test_weights_that_the_reduction_made_small_are_coloured_in_full(run):
    run = dataclasses.replace(run, loss=Loss(reduction="example", prompt_weight=0.5))
    (row, *_), _, _ = rows_of(run)
    for example in row.examples:
        assert sum(example.weights) == pytest.approx(1)
        shades = [example.shade(unit) for unit in example.units]
        assert shades[0] == 0
        assert sorted({round(shade, 4) for shade in shades}) == [0, 0.5, 1]


def test_the_rows_of_a_step_are_those_that_metrics_name(run):
    """metrics.jsonl counts steps from 1, the loader from 0."""
    rows, loader, data = rows_of(run, step=2)
    found = [(one.placed.source, one.placed.index, one.placed.epoch) for row in rows for one in row.examples]
    assert found == loader.examples(1)
    assert f"Step 2: example_ids {loader.digest(1)}." in show.about(run, data, loader, 2)


@pytest.mark.parametrize(
    "rows, step, message",
    [
        (0, None, "--rows=0: nothing to show"),
        (None, 0, "--step=0: this run has steps 1 to"),
        (None, 10_000, "--step=10000: this run has steps 1 to"),
        (3, 1, "--rows=3: step 1 has 2 rows"),
        (10_000, None, "--rows=10000: the run has"),
    ],
)
def test_rows_that_are_not_there_are_refused(run, rows, step, message):
    _, loader, _ = rows_of(run)
    with pytest.raises(ValueError, match=message):
        show.chosen(loader, rows_per_step=run.rows, rows=rows, step=step)


# --- ids to text


@pytest.fixture(scope="module")
def pieces():
    texts = [text for row in ROWS for text in row] * 20
    return SentencePiece(tokenizer.train(texts, size=290, controls=("<|im_start|>", "<|im_end|>")))


def units_of(ids, pieces, weights=None):
    return list(show.units(ids, weights or [0.0] * len(ids), pieces))


def byte_ids(text, pieces):
    names = [f"<0x{byte:02X}>" for byte in text.encode()]
    ids = {pieces.token(id): id for id in range(pieces.size)}
    return [ids[name] for name in names]


def test_bytes_of_one_character_are_one_unit(pieces):
    assert units_of(byte_ids("€", pieces), pieces) == [Unit("€", 0.0, False, 0, 3)]


def test_a_character_cut_by_truncation_harms_no_other(pieces):
    """The last two bytes of one euro sign, a whole one, and the first byte of a third."""
    ids = byte_ids("€€€", pieces)[1:-2]
    assert [unit.text for unit in units_of(ids, pieces)] == ["\ufffd", "\ufffd", "€", "\ufffd"]


def test_a_character_of_two_weights_is_not_one_text(pieces):
    found = units_of(byte_ids("é", pieces), pieces, [0.0, 1.0])
    assert [(unit.weight, unit.start, unit.stop) for unit in found] == [(0.0, 0, 1), (1.0, 1, 2)]


@pytest.mark.parametrize("seed", range(20))
def test_no_id_is_lost_and_none_is_shown_twice(pieces, seed):
    draw = np.random.default_rng(seed)
    ids = draw.integers(0, pieces.size, 200).tolist()
    found = units_of(ids, pieces, draw.choice([0.0, 0.5, 1.0], 200).tolist())
    assert [at for unit in found for at in range(unit.start, unit.stop)] == list(range(200))


# --- for the eye


def test_the_page_holds_every_character_and_no_markup_of_the_data(run):
    rows, loader, data = rows_of(run)
    reader = Reader(show.as_page(rows, show.about(run, data, loader, None), data.tokenizer))
    text = "".join(reader.text)
    assert "Capital of France?" in text
    assert "<b>loudly</b>" in text
    assert "script" not in reader.tags
    tips = [value for _, name, value in reader.attributes if name == "data-t"]
    assert any(
        tip.startswith('id 5 "<|im_end|>" · position') and "predicted with weight 1\ntarget" in tip for tip in tips
    )
    assert sum("never predicted" in tip for tip in tips) == sum(len(row.examples) for row in rows)
    assert sum("only predicted, not fed" in tip for tip in tips) == sum(len(row.examples) for row in rows)


def test_the_markup_of_data_is_shown_not_read(run):
    rows, _, data = rows_of(run)
    evil = dataclasses.replace(rows[0].examples[0], key="<img>", units=(Unit("<img src=x>", 1.0, False, 0, 1),))
    reader = Reader(show.as_page([dataclasses.replace(rows[0], examples=[evil])], "<img>", data.tokenizer))
    assert "img" not in reader.tags
    assert "<img src=x>" in reader.text


def test_data_cannot_steer_the_terminal(run):
    rows, _, _ = rows_of(run)
    out = io.StringIO()
    show.print_rows(rows, Console(file=out, width=100))
    assert "␛[31mred␛[0m \\u202eright to left" in out.getvalue()
    assert "\x1b" not in out.getvalue()


def test_the_terminal_shows_where_an_example_is_from(run):
    rows, _, _ = rows_of(run)
    out = io.StringIO()
    show.print_rows(rows[:1], Console(file=out, width=400))
    first = rows[0].examples[0]
    assert first.placed == Placed("mine", first.placed.index, 0, 1)
    assert f"[1] mine · {first.key}" in out.getvalue()
    assert f"{rows[0].num_tokens} of 160 positions" in out.getvalue()
    assert "<|im_start|>assistant↵" in out.getvalue()


def test_the_command_writes_both_files_and_starts_no_device(run, tmp_path):
    code = (
        "import sys; from itjax import show; code = show.command(sys.argv)\n"
        "jax = sys.modules.get('jax._src.xla_bridge'); print(code, bool(jax and jax._backends))"
    )
    root = Path(__file__).resolve().parents[1]
    arguments = [f"--config={root / 'configs' / 'sft_files.py'}", f"--config.files={run.files}", "--config.rows=2"]
    arguments += ["--config.length=160", "--config.vocab_size=300", "--config.evaluation.examples=0", "--rows=1"]
    arguments += [f"--json={tmp_path / 'rows.json'}", f"--html={tmp_path / 'rows.html'}"]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=root)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [str(tmp_path / "rows.html"), str(tmp_path / "rows.json"), "0 False"]
    (row,) = json.loads((tmp_path / "rows.json").read_text())
    assert set(row) == {"examples", "fill"}
    names = {"source", "key", "template", "segments", "tokens", "targets", "weights", "positions"}
    assert all(set(example) == names for example in row["examples"])


def shown_mixture(run, *arguments):
    root = Path(__file__).resolve().parents[1]
    config = [f"--config={root / 'configs' / 'sft_files.py'}", f"--config.files={run.files}", "--config.rows=2"]
    config += ["--config.length=160", "--config.vocab_size=300", "--config.evaluation.examples=0", "--config.steps=3"]
    return show.command(["show", *config, "--mixture", *arguments])


def test_the_mixture_is_the_manifest_of_the_run(run, tmp_path, capsys):
    assert shown_mixture(run, f"--json={tmp_path / 'mixture.json'}") == 0
    told = json.loads((tmp_path / "mixture.json").read_text())
    assert told["sources"]["mine"]["realised_share"] == {"examples": 1.0, "tokens": 1.0, "trained_tokens": 1.0}
    assert told["plan"]["num_steps"] == 3
    capsys.readouterr()
    assert shown_mixture(run) == 0
    assert "by size in examples. Weights are shares of the examples." in capsys.readouterr().out


def test_the_mixture_has_no_rows(run):
    with pytest.raises(ValueError, match="--step: is about rows"):
        shown_mixture(run, "--step=2")
