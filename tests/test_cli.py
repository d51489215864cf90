"""Every fault of a user ends with exit code 2 and one message that names place, value and way out; never a traceback."""

import json

import pytest

from itjax import cli, main
from itjax.text import tokenizer
from tests.contract import runs

ROW = {"instruction": "Name a colour.", "output": "Blue."}
LONG = {"instruction": "Count.", "output": " ".join(str(number) for number in range(400))}


def outcome(capsys, argv: list[str]) -> tuple[int, str]:
    """What the command line would exit with, and what it would print on stderr."""
    try:
        code = main.command(["itjax.main", *argv])
    except Exception as error:
        code = cli.explain(error)
    return code, capsys.readouterr().err


@pytest.fixture
def files(tmp_path):
    """Writes a data file and gives the arguments that train on it."""

    def arguments(text: str, *more: str, name: str = "data.jsonl") -> list[str]:
        path = tmp_path / name
        path.write_text(text)
        small = [f"--config.{name}={value}" for name, value in runs.SMALL.items() if not name.startswith("sources")]
        config = f"--config={runs.ROOT / 'configs' / 'sft_files.py'}"
        return [config, f"--config.files={path}", f"--config.run_dir={tmp_path / 'run'}", *small, *more]

    return arguments


def lines(*rows: dict) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


GOOD = lines(*[ROW] * 20)

FAULTS = {
    "empty file": (["", ()], "data.jsonl"),
    "malformed row": ([GOOD + "{oops}\n" + GOOD, ()], "data.jsonl:21"),
    "unknown fields": ([lines({"question": "?", "reply": "!"}), ()], "data.jsonl:1"),
    "unknown format": ([GOOD, ("--config.format=chatlm",)], "'chatlm' is unknown; did you mean 'chatml'"),
    "id beyond the vocabulary": (
        [GOOD, ("--config.architecture.vocab=200",)],
        "config.architecture.vocab: 200 is smaller",
    ),
    "row too long": ([GOOD + lines(LONG), ("--config.truncation=error",)], "data.jsonl:21"),
    "every row too long": ([lines(LONG, LONG), ()], "no example is left to train on"),
    "unknown preset": ([GOOD, ("--config.model=tyni",)], "Did you mean 'tiny'"),
    "no tokenizer file": ([GOOD, ("--config.tokenizer=no.model",)], "config.tokenizer: no.model: no such file"),
    "heads that do not divide": ([GOOD, ("--config.architecture.kv_heads=3",)], "architecture.kv_heads"),
    "unknown attention": ([GOOD, ("--config.attention=blockwse",)], "Did you mean 'blockwise'"),
    "mesh that does not fit": ([GOOD, ("--config.parallel.fsdp=3",)], "config.parallel: "),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_of_the_user_is_one_message(capsys, files, name):
    (text, more), message = FAULTS[name]
    code, err = outcome(capsys, files(text, *more))
    assert code == cli.FAULT_OF_USER, err
    assert message in err
    assert "Traceback" not in err
    assert err.strip().count("\n") <= 1, "one message"


@pytest.mark.parametrize(
    "model, words",
    [
        ("tyni", "is neither a folder nor a preset. Did you mean 'tiny'?"),
        ("", "is neither a folder nor a preset"),
        ("nowhere/Llama-3.2-1B", ": there is no such folder; give one of a published model"),
    ],
)
def test_a_model_that_is_not_there_is_told_before_data_is_read(capsys, files, model, words):
    code, err = outcome(capsys, files("{oops}", f"--config.model={model}"))
    assert (code, err.count("\n")) == (cli.FAULT_OF_USER, 1)
    assert f"config.model: {model!r}" in err
    assert words in err


def test_files_that_do_not_exist_are_named(capsys, files):
    argv = files(GOOD, "--config.files=nowhere/*.jsonl")
    code, err = outcome(capsys, argv)
    assert (code, "nowhere/*.jsonl" in err) == (2, True)


def test_a_fault_of_ours_shows_where(capsys):
    assert cli.explain(KeyError("oops")) == cli.FAULT_OF_OURS
    assert "KeyError" in capsys.readouterr().err


def test_a_value_error_of_a_library_is_not_taken_for_a_message(capsys):
    with pytest.raises(ValueError, match="Expecting") as caught:
        json.loads("{")
    assert cli.explain(caught.value) == cli.FAULT_OF_OURS


@pytest.mark.parametrize("command", list(cli.COMMANDS))
def test_help_of_every_command_shows_an_example(capsys, command):
    import importlib

    assert importlib.import_module(cli.COMMANDS[command][0]).command([command, "--help"]) == 0
    assert "python -m itjax" in capsys.readouterr().out


def test_a_format_of_another_tokenizer_is_one_message(capsys, files, tmp_path):
    model = tmp_path / "own.model"
    model.write_bytes(tokenizer.train(["one two three"], size=300, controls=("<|im_end|>",)))
    code, err = outcome(capsys, files(GOOD, f"--config.tokenizer={model}", "--config.format=llama3"))
    assert code == cli.FAULT_OF_USER, err
    assert "needs the control tokens" in err
    assert err.count("\n") == 1


def test_patterns_of_parameters_are_checked_before_data_is_read(capsys, files):
    code, err = outcome(capsys, files("{oops}", "--config.lora.rank=2", "--config.lora.targets=('layers/atn/*',)"))
    assert code == cli.FAULT_OF_USER
    assert "config.lora.targets: 'layers/atn/*' fits nothing. Did you mean 'layers/attn/" in err
