"""The text side of a model's folder: tokenizer, chat template and what ends an answer, as other libraries read them.

    tokenizer.json            the ids of our tokenizer; a SentencePiece model is written in this form too
    tokenizer.model           beside it, where the tokenizer is a SentencePiece model
    tokenizer_config.json     special tokens by their role, longest text, chat template
    special_tokens_map.json   the same roles, for older readers
    chat_template.jinja       renders what we train on; `{% generation %}` around what is learned. A model that came
                              with another template for tools has that one under additional_chat_templates/
    generation_config.json    the ids that end an answer

What goes out is compared with what we have, on texts chosen to show a difference, before anything is returned.
"""

import base64
import json
import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from itjax.text import chat, spm
from itjax.text.as_jinja import jinja_of
from itjax.text.formats import BOS, EOS, Format
from itjax.text.jinja import TOOL_USE, ChatTemplate
from itjax.text.tokenizer import CONFIG, SPACE_MARK, HuggingFace, SentencePiece, Tokenizer

log = logging.getLogger(__name__)

TEMPLATE = "chat_template.jinja"
WITH_TOOLS = f"additional_chat_templates/{TOOL_USE}.jinja"
ROLES = ("bos_token", "eos_token", "pad_token", "unk_token")
PROBES = (
    "The quick brown fox jumps over 12 lazy dogs, 3.14 times.",
    "  two  spaces \n\n\n\tdef f(x):\n        return x + 1\r\n",
    "é ü ß \u6f22\u5b57 \u043f\u0440\u0438\u0432\u0435\u0442 \U0001f389\U0001f468\u200d\U0001f469 \u05e9\u05dc\u05d5\u05dd",
    "a\0b \ufeff \u00a0 \u2581 \u2585 \ufb01\u2460\uff21 e\u0301",
    "1234567890 0x41 <0x41> {\"a\": [1, 2]} <b>bold</b> it's \\n",
    "aaaaaaaaaaaaaaaa    bbbbbbbb        ccc!!!!!!??????",
    "",
    " ",
    "\n",
)  # fmt: skip


def files(tokenizer: Tokenizer, fmt: Format | ChatTemplate, *, max_length: int) -> dict[str, bytes]:
    """The files by name, one of which may be in a folder. A tokenizer that cannot be written exactly is an error."""
    fmt = _named(fmt, tokenizer) if isinstance(fmt, Format) else fmt
    template = fmt.source if isinstance(fmt, ChatTemplate) else jinja_of(fmt)
    roles = _roles(tokenizer)
    config = {
        **roles,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_length,
        "model_input_names": ["input_ids", "attention_mask"],  # or callers of a model pass it a third
        "clean_up_tokenization_spaces": False,
        "chat_template": _all_templates(fmt, template),
        **_declared(tokenizer),
    }
    found = {
        "tokenizer.json": _exact_json(tokenizer),
        "tokenizer_config.json": config,
        "special_tokens_map.json": roles,
        "generation_config.json": generation_config(tokenizer, fmt),
    }
    written = {name: _json(value) for name, value in found.items()} | {TEMPLATE: template.encode()}
    if isinstance(fmt, ChatTemplate) and fmt.tool_source:
        written[WITH_TOOLS] = fmt.tool_source.encode()
    return written | ({tokenizer.file_name: tokenizer.model} if isinstance(tokenizer, SentencePiece) else {})


def generation_config(tokenizer: Tokenizer, fmt: Format | ChatTemplate) -> dict[str, Any]:
    """The ids that begin, end and fill a text."""
    ids = {
        "bos_token_id": tokenizer.bos,
        "eos_token_id": sorted(chat.stop_ids(fmt, tokenizer)),
        "pad_token_id": tokenizer.pad,
    }
    return {name: id for name, id in ids.items() if id is not None}


def tokenizer_json(tokenizer: Tokenizer) -> dict[str, Any]:
    """The tokenizer as the `tokenizers` library reads it."""
    if isinstance(tokenizer, HuggingFace):
        return {name: part for name, part in json.loads(tokenizer.model).items() if name != CONFIG}
    assert isinstance(tokenizer, SentencePiece)
    return _converted(tokenizer)


def differences(tokenizer: Tokenizer, made: Tokenizer, texts: Sequence[str] = PROBES) -> list[str]:
    """The texts that the two do not read as the same ids."""
    return [text for text in texts if tokenizer.encode(text) != made.encode(text)]


def _named(fmt: Format, tokenizer: Tokenizer) -> Format:
    """The format, its own text free of names that the exported tokenizer would read as control tokens."""
    spelt = sorted(name for name in (BOS, EOS) if name in fmt.default_system + fmt.preamble)
    if spelt:
        raise ValueError(f"format {fmt.name!r}: its system prompt spells {spelt[0]!r}; give it words")
    return replace(fmt, begin="") if tokenizer.bos is None else fmt


def _exact_json(tokenizer: Tokenizer) -> dict[str, Any]:
    made = tokenizer_json(tokenizer)
    if isinstance(tokenizer, HuggingFace):
        return made
    other = differences(tokenizer, HuggingFace(json.dumps(made, ensure_ascii=False).encode(), _roles(tokenizer)))
    if other:
        raise ValueError(
            f"tokenizer: written as tokenizer.json it would read {other[0]!r} as other ids; "
            "export with the tokenizer.json its makers published"
        )
    return made


def _roles(tokenizer: Tokenizer) -> dict[str, str]:
    """Special tokens by their role."""
    ids = dict(zip(ROLES, (tokenizer.bos, tokenizer.eos, tokenizer.pad, tokenizer.unk), strict=True))
    if isinstance(tokenizer, SentencePiece):
        names = {id: piece.name for id, piece in enumerate(spm.read(tokenizer.model).pieces)}
    else:
        assert isinstance(tokenizer, HuggingFace)
        names = {id: str(tokenizer.config[role]) for role, id in ids.items() if id is not None}
    return {role: names[id] for role, id in ids.items() if id is not None}


def _declared(tokenizer: Tokenizer) -> dict[str, Any]:
    """Tokens that only the file beside the tokenizer declares."""
    more = tokenizer.config.get("added_tokens_decoder") if isinstance(tokenizer, HuggingFace) else None
    return {"added_tokens_decoder": more} if more else {}


def _all_templates(fmt: Format | ChatTemplate, template: str) -> str | list[dict[str, str]]:
    if isinstance(fmt, ChatTemplate) and fmt.tool_source:
        return [{"name": "default", "template": template}, {"name": TOOL_USE, "template": fmt.tool_source}]
    return template


def _json(value: Any) -> bytes:
    return (json.dumps(value, ensure_ascii=False, indent=2) + "\n").encode()


# ------------------------------------------------------------------------------------------ SentencePiece


def _converted(tokenizer: SentencePiece) -> dict[str, Any]:
    """A SentencePiece model in the form of the other library.

    A model that keeps text as it is has its spaces as spaces there, so that the mark which stands for a space inside
    SentencePiece is a character like any other. Other models keep the mark, and what they change in text.
    """
    facts = spm.read(tokenizer.model)
    keeps = tokenizer.keeps_text
    pieces = [(piece.name.replace(SPACE_MARK, " ") if keeps else piece.name, piece.score) for piece in facts.pieces]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added(tokenizer, facts, [name for name, _ in pieces]),
        "normalizer": None if keeps else _normalizer(facts),
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": _decoder(facts, keeps=keeps),
        "model": _bpe(tokenizer, facts, pieces) if facts.kind == spm.BPE else _unigram(tokenizer, facts, pieces),
    }


def _added(tokenizer: SentencePiece, facts: spm.Model, names: Sequence[str]) -> list[dict[str, Any]]:
    """Control tokens, and pieces that are found in any text before it is cut."""
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    controls = {*tokenizer.controls.values(), *([] if tokenizer.unk is None else [tokenizer.unk])}
    added = []
    for id, piece in enumerate(facts.pieces):
        if id in controls or piece.kind == spm.USER_DEFINED:
            added.append({"id": id, "content": names[id], **plain, "special": id in controls})
    return added


def _bpe(tokenizer: SentencePiece, facts: spm.Model, pieces: Sequence[tuple[str, float]]) -> dict[str, Any]:
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": None if tokenizer.unk is None else pieces[tokenizer.unk][0],
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": True,
        "byte_fallback": facts.byte_fallback,
        "ignore_merges": False,
        "vocab": {name: id for id, (name, _) in enumerate(pieces)},
        "merges": _merges(facts, pieces),
    }


def _merges(facts: spm.Model, pieces: Sequence[tuple[str, float]]) -> list[list[str]]:
    """Every way to put a piece together, the piece with the highest score first."""
    ids = {name: id for id, (name, _) in enumerate(pieces) if facts.pieces[id].kind == spm.NORMAL}
    found = []
    for name, id in ids.items():
        for cut in range(1, len(name)):
            left, right = name[:cut], name[cut:]
            if left in ids and right in ids:
                found.append((-pieces[id][1], id, cut, left, right))
    return [[left, right] for *_, left, right in sorted(found)]


def _unigram(tokenizer: SentencePiece, facts: spm.Model, pieces: Sequence[tuple[str, float]]) -> dict[str, Any]:
    return {
        "type": "Unigram",
        "unk_id": tokenizer.unk,
        "vocab": [[name, score] for name, score in pieces],
        "byte_fallback": facts.byte_fallback,
    }


def _normalizer(facts: spm.Model) -> dict[str, Any] | None:
    steps: list[dict[str, Any]] = []
    if facts.charsmap:
        steps.append({"type": "Precompiled", "precompiled_charsmap": base64.b64encode(facts.charsmap).decode()})
    if facts.squeezes:
        steps += [
            {"type": "Replace", "pattern": {"Regex": rf"\A +|[ {SPACE_MARK}]+\z"}, "content": ""},
            {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "},
        ]
    if facts.dummy_prefix:
        steps.append({"type": "Prepend", "prepend": SPACE_MARK})
    steps.append({"type": "Replace", "pattern": {"String": " "}, "content": SPACE_MARK})
    return {"type": "Sequence", "normalizers": steps}


def _decoder(facts: spm.Model, *, keeps: bool) -> dict[str, Any]:
    spaces: list[dict[str, Any]] = (
        [] if keeps else [{"type": "Replace", "pattern": {"String": SPACE_MARK}, "content": " "}]
    )
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if facts.dummy_prefix else []
    return {"type": "Sequence", "decoders": [*spaces, {"type": "ByteFallback"}, {"type": "Fuse"}, *strip]}
