"""How a conversation is written down: chat formats as data.

A format says what stands around the content of each role. In its strings `<s>` and `</s>` are the tokenizer's own begin
and end of text, and the names listed in `controls` are single control tokens; everything else is ordinary text.

    <|im_start|>assistant\\n   Paris.   <|im_end|>   \\n
    header                    content  terminator   separator
"""

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from itjax.text.tokenizer import Tokenizer

BOS = "<s>"
EOS = "</s>"
CHATML_CONTROLS = ("<|im_start|>", "<|im_end|>")


@dataclass(frozen=True)
class Turn:
    """What stands around the content of one role. The terminator is what a model emits to end its turn."""

    header: str = ""
    terminator: str = ""
    separator: str = ""


@dataclass(frozen=True)
class Format:
    """One way to write conversations. A role that is not in `turns` cannot be written, except a first system message
    where `system_joiner` is given: it then stands before the first user content."""

    name: str
    turns: Mapping[str, Turn]
    begin: str = ""
    controls: tuple[str, ...] = ()
    default_system: str = ""
    system_joiner: str | None = None
    trims: bool = False  # whether content loses the white space around it

    @cached_property
    def specials(self) -> re.Pattern[str]:
        """Finds the control tokens in the format's own strings, never in content."""
        return re.compile("(" + "|".join(re.escape(name) for name in (BOS, EOS, *self.controls)) + ")")


def _same_for(roles: Mapping[str, str], turn: Turn) -> dict[str, Turn]:
    """One shape of turn for several roles; `{role}` in the header is the role's name in the format."""
    return {role: replace(turn, header=turn.header.replace("{role}", name)) for role, name in roles.items()}


ROLES = {"system": "system", "user": "user", "assistant": "assistant"}

_ALL = (
    Format(
        name="plain",
        begin=BOS,
        turns={
            "system": Turn("", "", "\n\n"),
            "user": Turn("User:\n", "", "\n\n"),
            "tool": Turn("Tool:\n", "", "\n\n"),
            "assistant": Turn("Assistant:\n", EOS, "\n\n"),
        },
    ),
    Format(
        name="alpaca",  # https://github.com/tatsu-lab/stanford_alpaca#data-release
        begin=BOS,
        default_system=(
            "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        ),
        turns={
            "system": Turn("", "", "\n\n"),
            "user": Turn("### Instruction:\n", "", "\n\n"),
            "assistant": Turn("### Response:\n", EOS, "\n\n"),
        },
    ),
    Format(
        name="zephyr",
        turns=_same_for(ROLES, Turn("<|{role}|>\n", EOS, "\n")),
    ),
    Format(
        name="chatml",
        controls=CHATML_CONTROLS,
        turns=_same_for(ROLES | {"tool": "tool"}, Turn("<|im_start|>{role}\n", "<|im_end|>", "\n")),
    ),
    Format(
        name="llama3",  # https://github.com/meta-llama/llama-models/blob/main/models/llama3_1/prompt_format.md
        begin="<|begin_of_text|>",
        controls=("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        trims=True,
        turns=_same_for(
            ROLES | {"tool": "ipython"}, Turn("<|start_header_id|>{role}<|end_header_id|>\n\n", "<|eot_id|>", "")
        ),
    ),
    Format(
        name="gemma2",  # https://ai.google.dev/gemma/docs/core/prompt-structure
        begin=BOS,
        controls=("<start_of_turn>", "<end_of_turn>"),
        trims=True,
        system_joiner="\n\n",
        turns=_same_for({"user": "user", "assistant": "model"}, Turn("<start_of_turn>{role}\n", "<end_of_turn>", "\n")),
    ),
)
FORMATS: dict[str, Format] = {format.name: format for format in _ALL}


def resolve(name: str, tokenizer: Tokenizer) -> Format:
    """The format of that name, as this tokenizer can write it. `auto`: chatml where its control tokens exist, else plain.

    A tokenizer without a begin of text writes none.
    """
    if name == "auto":
        name = "plain" if _missing(FORMATS["chatml"], tokenizer) else "chatml"
    if name not in FORMATS:
        raise ValueError(f"format: {name!r} is unknown{_nearest(name)} Known: auto, {', '.join(sorted(FORMATS))}")
    format = FORMATS[name]
    missing = _missing(format, tokenizer)
    if missing:
        raise ValueError(
            f"format: {name!r} needs the control tokens {missing}, which the tokenizer lacks; "
            "choose a format made for this tokenizer, 'plain', or a tokenizer trained with these controls"
        )
    return replace(format, begin="") if format.begin == BOS and tokenizer.bos is None else format


def _missing(format: Format, tokenizer: Tokenizer) -> list[str]:
    missing = [control for control in format.controls if tokenizer.control(control) is None]
    ends_with_eos = any(EOS in turn.terminator for turn in format.turns.values())
    return missing + ([EOS] if ends_with_eos and tokenizer.eos is None else [])


def _nearest(name: str) -> str:
    closest = difflib.get_close_matches(name, [*FORMATS, "auto"], n=1, cutoff=0.5)
    return f"; did you mean {closest[0]!r}?" if closest else "."
