"""What `transformers` makes of an exported folder: our ids, our text, our loss mask, one begin of text."""

import random

import jinja2
import pytest

from itjax.base.records import Message
from itjax.text import chat, formats, published
from itjax.text.formats import FORMATS
from itjax.text.tokenizer import SentencePiece, train, with_tokens
from tests.text.conversations import conversation, rows
from tests.text.test_as_jinja import expected, joined, messages
from tests.text.test_tokenizer import BYTE_LEVEL, LINES

transformers = pytest.importorskip("transformers")

BRACKETS_ARE_TEXT = ("llama2", "mistral_v1")  # white space of content and of the format may be one token there
WORDS = (
    "The capital",
    "of France",
    "is 12.50!",
    "\n\n",
    "def f(x):\n    x",
    "\u6f22\u5b57",
    "\U0001f389",
    "  ",
    "it's",
    "a\tb",
)


def talks(number, *, trimmed):
    """Conversations without names of control tokens, which transformers would take for control tokens."""
    return [_talk(random.Random(seed), trimmed) for seed in range(number)]


def _talk(rng, trimmed):
    said = [Message("system", _text(rng, trimmed))] if rng.random() < 0.5 else []
    for _ in range(rng.randint(1, 3)):
        said += [Message("user", _text(rng, trimmed)), Message("assistant", _text(rng, trimmed))]
    return conversation(*said)


def _text(rng, trimmed):
    text = " ".join(rng.choice(WORDS) for _ in range(rng.randint(1, 5)))
    return "x" + text.strip() + "x" if trimmed else text


def opened(folder, tokenizer, fmt):
    for name, content in published.files(tokenizer, fmt, max_length=2048).items():
        (folder / name).write_bytes(content)
    return transformers.AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("name", FORMATS)
def test_ids_and_mask_are_ours(name, tmp_path):
    fmt = FORMATS[name]
    tokenizer = SentencePiece(train(LINES, size=600, controls=fmt.controls))
    fmt = formats.resolve(name, tokenizer)
    theirs = opened(tmp_path, tokenizer, fmt)
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (
        tokenizer.bos,
        tokenizer.eos,
        tokenizer.pad,
    )
    for talk in talks(12, trimmed=name in BRACKETS_ARE_TEXT):
        ids, weights = chat.encode(chat.render(talk, fmt, prompt_weight=0.0), tokenizer)
        encoded = theirs.apply_chat_template(messages(talk), return_dict=True, return_assistant_tokens_mask=True)
        assert encoded["input_ids"] == ids.tolist()
        assert encoded["assistant_masks"] == weights.astype(int).tolist()
        asked = talk.messages[:-1]
        prompt, _ = chat.encode(chat.prompt(asked, fmt), tokenizer)
        said = theirs.apply_chat_template(messages(conversation(*asked)), add_generation_prompt=True, return_dict=True)
        assert said["input_ids"] == prompt.tolist()
        assert prompt.tolist().count(tokenizer.bos) == said["input_ids"].count(theirs.bos_token_id)
        assert prompt.tolist()[:2] != [tokenizer.bos] * 2


@pytest.mark.parametrize("name", FORMATS)
def test_the_template_writes_the_format_with_tools_and_thoughts(name, tmp_path):
    fmt = FORMATS[name]
    tokenizer = SentencePiece(train(LINES, size=600, controls=fmt.controls))
    theirs = opened(tmp_path, tokenizer, formats.resolve(name, tokenizer))
    for row in rows(20, tools=bool(fmt.tools), thinks=fmt.reasoning is not None):
        ours = expected(row, fmt)
        if ours is None:
            with pytest.raises(jinja2.TemplateError, match="one tool call a turn"):
                theirs.apply_chat_template(messages(row), tools=list(row.tools) or None, tokenize=False)
            continue
        assert theirs.apply_chat_template(messages(row), tools=list(row.tools) or None, tokenize=False) == ours[0]


def test_a_byte_level_tokenizer_keeps_its_ids_and_gets_the_marks(tmp_path):
    tokenizer = with_tokens(BYTE_LEVEL, ["<|im_start|>", "<|im_end|>"])
    fmt = formats.resolve("chatml", tokenizer)
    theirs = opened(tmp_path, tokenizer, fmt)
    for talk in talks(20, trimmed=True):  # its words begin with any number of line breaks, the format's among them
        ids, weights = chat.encode(chat.render(talk, fmt, prompt_weight=0.0), tokenizer)
        encoded = theirs.apply_chat_template(messages(talk), return_dict=True, return_assistant_tokens_mask=True)
        assert encoded["input_ids"] == ids.tolist()
        spans = joined([(n, n + 1) for n, on in enumerate(encoded["assistant_masks"]) if on])
        assert spans == joined([(n, n + 1) for n, weight in enumerate(weights) if weight])
    assert theirs("The capital").input_ids == tokenizer.encode("The capital")
    assert theirs.decode(tokenizer.encode("a  b\n\u6f22")) == "a  b\n\u6f22"


def test_names_of_control_tokens_in_text_are_control_tokens_there_and_text_here(tmp_path):
    """The one difference that stays: the other library reads the rendered text, in which both look the same."""
    tokenizer = SentencePiece(train(LINES, size=420, controls=("<|im_start|>", "<|im_end|>")))
    fmt = formats.resolve("chatml", tokenizer)
    theirs = opened(tmp_path, tokenizer, fmt)
    talk = [Message("user", "say <|im_end|>")]
    ours, _ = chat.encode(chat.prompt(talk, fmt), tokenizer)
    said = theirs.apply_chat_template(messages(conversation(*talk)), add_generation_prompt=True, return_dict=True)
    end = tokenizer.control("<|im_end|>")
    assert (ours.tolist().count(end), said["input_ids"].count(end)) == (1, 2)
