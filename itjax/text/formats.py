"""How a conversation is written down: chat formats as data.

A format says what stands around the content of each role. In its strings `<s>` and `</s>` are the tokenizer's own begin
and end of text, and the names listed in `controls` are single control tokens; everything else is ordinary text.

    <|im_start|>assistant\\n   Paris.   <|im_end|>   \\n
    header                    content  terminator   separator

The formats of published models write what the model's own template writes. Where that template leaves something out, or
writes what its own prompt contradicts, the format refuses or writes what the prompt leads to, and `as_published` gives
the format with the template's text.
"""

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, overload

from itjax.text import jinja
from itjax.text.jinja import ChatTemplate
from itjax.text.tokenizer import Tokenizer
from itjax.text.tools import STYLES

BOS = "<s>"
EOS = "</s>"
CHATML_CONTROLS = ("<|im_start|>", "<|im_end|>")
KEPT = ("all", "last", "none")


@dataclass(frozen=True)
class Turn:
    """What stands around the content of one role. The terminator is what a model emits to end its turn."""

    header: str = ""
    terminator: str = ""
    separator: str = ""
    space: str = ""  # before the content and one with it, for tokenizers whose words begin with their space


@dataclass(frozen=True)
class Reasoning:
    """What the assistant thought before it spoke, as it is written around the thought."""

    opening: str = "<think>\n"
    closing: str = "\n</think>\n\n"
    kept: str = "last"  # in "all" turns, in those after the "last" question, or in "none"
    prompted: bool = False  # whether the prompt of an answer has the opening already


@dataclass(frozen=True)
class Format:
    """One way to write conversations. A role that is not in `turns` cannot be written, except system messages
    where `system_joiner` is given: they then stand before the content of a user."""

    name: str
    turns: Mapping[str, Turn]
    begin: str = ""
    end: str = ""  # after the last turn of a whole conversation; nobody has to say it
    controls: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()  # control tokens where the tokenizer has them, else text
    default_system: str = ""
    preamble: str = ""  # what every system prompt begins with; a conversation without one gets one for it
    system_prefix: str = ""
    system_joiner: str | None = None
    system_at: str = "first"  # whose content the system messages join: the "first" user's or the "last"
    trims: bool = False  # whether content loses the white space around it
    trims_system: bool = False
    trims_joined: bool = False  # whether system text and content are trimmed as one
    alternates: bool = False  # whether user and assistant must take turns, a user first
    merges: str | None = None  # what joins messages of one role in a row; None: they stay apart
    separates_last: bool = True  # whether an answer that comes last has its separator
    tools: str = ""  # a style of itjax.text.tools
    answers_tools: bool = True  # whether an answer to tool results has a header
    forgets_tools: bool = False  # whether calls and results before the last question are left out
    reasoning: Reasoning | None = None
    omits: tuple[str, ...] = ()  # what is left out silently: "tools", "calls", "results", "reasoning", "empty system"
    published: Mapping[str, Any] = field(default_factory=dict)  # fields that the published template has otherwise

    @cached_property
    def specials(self) -> re.Pattern[str]:
        """Finds the control tokens in the format's own strings, never in content."""
        return re.compile(self.special_names)

    @cached_property
    def special_names(self) -> str:
        """The same as text."""
        names = sorted((BOS, EOS, *self.controls), key=len, reverse=True)
        return "(" + "|".join(re.escape(name) for name in names) + ")"

    @cached_property
    def rewrites_history(self) -> bool:
        """Whether a turn may be written otherwise once more turns follow."""
        moves_tools = bool(self.tools) and STYLES[self.tools].declared == "last"
        moves_system = self.system_joiner is not None and self.system_at == "last"
        forgets = self.forgets_tools or (self.reasoning is not None and self.reasoning.kept == "last")
        return moves_tools or moves_system or forgets


def as_published(format: Format) -> Format:
    """The format with exactly the text of the model's template, also where it leaves things out without a word."""
    return replace(format, **format.published)


def keep_reasoning(format: Format, kept: str) -> Format:
    """The format with reasoning in "all" turns, in those after the "last" question, or in "none"."""
    if kept not in KEPT:
        raise ValueError(f"reasoning: {kept!r} is unknown. Known: {', '.join(KEPT)}")
    if format.reasoning is None and kept == "none":
        return replace(format, omits=(*format.omits, "reasoning"))
    if format.reasoning is None:
        raise ValueError(f"format {format.name!r} has no place for reasoning; choose qwen3 or deepseek_r1")
    prompted = format.reasoning.prompted and kept != "none"  # a prompt opens no thought that no answer has
    return replace(format, reasoning=replace(format.reasoning, kept=kept, prompted=prompted))


def _same_for(roles: Mapping[str, str], turn: Turn) -> dict[str, Turn]:
    """One shape of turn for several roles; `{role}` in the header is the role's name in the format."""
    return {role: replace(turn, header=turn.header.replace("{role}", name)) for role, name in roles.items()}


ROLES = {"system": "system", "user": "user", "assistant": "assistant"}
CHATML_TURN = Turn("<|im_start|>{role}\n", "<|im_end|>", "\n")
GEMMA_TURNS = _same_for({"user": "user", "assistant": "model"}, Turn("<start_of_turn>{role}\n", "<end_of_turn>", "\n"))
TULU_TURNS = {
    "system": Turn("<|system|>\n", "", "\n"),
    "user": Turn("<|user|>\n", "", "\n"),
    "assistant": Turn("<|assistant|>\n", EOS, "\n"),
}
MISTRAL_TURNS = {"user": Turn("[INST]", "[/INST]"), "assistant": Turn("", EOS)}
MISTRAL_CONTROLS = ("[INST]", "[/INST]")
MISTRAL_TOOLS = ("[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]")
NO_TOOLS = ("tools", "calls", "reasoning")
NO_TOOL_ROLE = (*NO_TOOLS, "results")

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
        name="vicuna",
        begin=BOS,
        turns={
            "system": Turn("", "", "\n\n"),
            "user": Turn("USER:", "", "\n", space=" "),
            "assistant": Turn("ASSISTANT:", EOS, "\n", space=" "),
        },
    ),
    Format(
        name="zephyr",
        turns=_same_for(ROLES, Turn("<|{role}|>\n", EOS, "\n")),
    ),
    Format(
        name="chatml",
        controls=CHATML_CONTROLS,
        turns=_same_for(ROLES | {"tool": "tool"}, CHATML_TURN),
    ),
    Format(
        name="qwen2",  # Qwen2.5; https://huggingface.co/Qwen/Qwen2.5-7B-Instruct
        controls=CHATML_CONTROLS,
        optional=("<tool_call>", "</tool_call>"),
        default_system="You are Qwen, created by Alibaba Cloud. You are a helpful assistant.",
        turns=_same_for(ROLES, CHATML_TURN),
        tools="qwen",
        published={"tools": "qwen2_published", "omits": ("reasoning",)},
    ),
    Format(
        name="qwen3",  # https://huggingface.co/Qwen/Qwen3-4B
        controls=CHATML_CONTROLS,
        optional=("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>"),
        turns=_same_for(ROLES, CHATML_TURN),
        tools="qwen",
        reasoning=Reasoning(),
    ),
    Format(
        name="llama2",  # https://huggingface.co/meta-llama/Llama-2-7b-chat-hf
        turns={
            "user": Turn(BOS + "[INST]", " [/INST]", space=" "),
            "assistant": Turn("", " " + EOS, space=" "),
        },
        system_prefix="<<SYS>>\n",
        system_joiner="\n<</SYS>>\n\n",
        trims=True,
        trims_joined=True,
        alternates=True,
    ),
    Format(
        name="llama3",  # https://github.com/meta-llama/llama-models/blob/main/models/llama3_1/prompt_format.md
        begin="<|begin_of_text|>",
        controls=("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        trims=True,
        trims_system=True,
        turns=_same_for(
            ROLES | {"tool": "ipython"}, Turn("<|start_header_id|>{role}<|end_header_id|>\n\n", "<|eot_id|>", "")
        ),
        published={
            "omits": NO_TOOLS,  # the template of 3.0 knows no tools and writes every role by its name
            "turns": _same_for(
                ROLES | {"tool": "tool"}, Turn("<|start_header_id|>{role}<|end_header_id|>\n\n", "<|eot_id|>", "")
            ),
        },
    ),
    Format(
        name="llama3_1",  # 3.1 and 3.3, and 3.2 where nobody tells it the date; same page as llama3
        begin="<|begin_of_text|>",
        controls=("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        preamble="Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n",
        trims=True,
        trims_system=True,
        turns=_same_for(ROLES, Turn("<|start_header_id|>{role}<|end_header_id|>\n\n", "<|eot_id|>", "")),
        tools="llama3_1",
        published={"tools": "llama3_1_published", "omits": ("reasoning",)},
    ),
    Format(
        name="gemma2",  # https://ai.google.dev/gemma/docs/core/prompt-structure
        begin=BOS,
        controls=("<start_of_turn>", "<end_of_turn>"),
        trims=True,
        trims_system=True,
        trims_joined=True,
        alternates=True,
        system_joiner="\n\n",
        turns=GEMMA_TURNS,
        published={"omits": NO_TOOLS},
    ),
    Format(
        name="gemma3",
        begin=BOS,
        controls=("<start_of_turn>", "<end_of_turn>"),
        trims=True,
        alternates=True,
        system_joiner="\n\n",
        turns=GEMMA_TURNS,
        published={"omits": NO_TOOLS},
    ),
    Format(
        name="mistral_v1",  # [INST] is text here, and what follows it begins with its own space
        begin=BOS,
        turns={"user": Turn("[INST]", " [/INST]", space=" "), "assistant": Turn("", EOS, space=" ")},
        system_joiner="\n\n",
        merges="\n\n",
        alternates=True,
    ),
    Format(
        name="mistral_v2",
        begin=BOS,
        controls=(*MISTRAL_CONTROLS, *MISTRAL_TOOLS),
        turns=MISTRAL_TURNS,
        system_joiner="\n\n",
        system_at="last",
        merges="\n\n",
        alternates=True,
        tools="mistral_v2",
        forgets_tools=True,
    ),
    Format(
        name="mistral_v3",
        begin=BOS,
        controls=(*MISTRAL_CONTROLS, *MISTRAL_TOOLS),
        turns=MISTRAL_TURNS,
        system_joiner="\n\n",
        system_at="last",
        merges="\n\n",
        alternates=True,
        tools="mistral_v3",
    ),
    Format(
        name="mistral_v7",
        begin=BOS,
        controls=(*MISTRAL_CONTROLS, *MISTRAL_TOOLS, "[TOOL_CONTENT]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"),
        turns={"system": Turn("[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"), **MISTRAL_TURNS},
        merges="\n\n",
        alternates=True,
        tools="mistral_v7",
    ),
    Format(
        name="phi3",  # Phi-3 and Phi-3.5; https://huggingface.co/microsoft/Phi-3.5-mini-instruct
        end=EOS,
        controls=("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
        turns=_same_for(ROLES, Turn("<|{role}|>\n", "<|end|>", "\n")),
        omits=("empty system",),
        published={"omits": (*NO_TOOL_ROLE, "empty system")},
    ),
    Format(
        name="phi4",  # https://huggingface.co/microsoft/phi-4
        controls=("<|im_start|>", "<|im_sep|>", "<|im_end|>"),
        turns=_same_for(ROLES, Turn("<|im_start|>{role}<|im_sep|>", "<|im_end|>", "")),
        published={"omits": NO_TOOL_ROLE},
    ),
    Format(
        name="smollm2",  # https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct
        controls=CHATML_CONTROLS,
        default_system="You are a helpful AI assistant named SmolLM, trained by Hugging Face",
        turns=_same_for(ROLES | {"tool": "tool"}, CHATML_TURN),
        published={"omits": NO_TOOLS},
    ),
    Format(
        name="olmo2",  # https://huggingface.co/allenai/OLMo-2-1124-7B-Instruct
        begin=BOS,
        turns=TULU_TURNS,
        separates_last=False,
        published={"omits": NO_TOOL_ROLE},
    ),
    Format(
        name="tulu",  # https://huggingface.co/allenai/Llama-3.1-Tulu-3-8B
        turns=TULU_TURNS,
        separates_last=False,
        published={"omits": NO_TOOL_ROLE},
    ),
    Format(
        name="deepseek_r1",  # https://huggingface.co/deepseek-ai/DeepSeek-R1-Distill-Qwen-7B
        begin=BOS,
        controls=("<｜User｜>", "<｜Assistant｜>"),
        optional=("<think>", "</think>"),
        turns={
            "system": Turn(),
            "user": Turn("<｜User｜>"),
            "assistant": Turn("<｜Assistant｜>", EOS),
        },
        reasoning=Reasoning(prompted=True),
        published={
            # answers are written without the thought that their prompt opens
            "reasoning": Reasoning(kept="none", prompted=True),
            "tools": "deepseek_published",
            "answers_tools": False,
            "optional": (
                "<think>",
                "</think>",
                "<｜tool▁outputs▁begin｜>",
                "<｜tool▁outputs▁end｜>",
                "<｜tool▁output▁begin｜>",
                "<｜tool▁output▁end｜>",
            ),
            "omits": ("tools", "calls", "reasoning"),
        },
    ),
)
FORMATS: dict[str, Format] = {format.name: format for format in _ALL}
HF = "hf"


@overload
def resolve(name: str, tokenizer: Tokenizer, *, folder: None = None) -> Format: ...
@overload
def resolve(name: str, tokenizer: Tokenizer, *, folder: str | Path | None) -> Format | ChatTemplate: ...
def resolve(name: str, tokenizer: Tokenizer, *, folder: str | Path | None = None) -> Format | ChatTemplate:
    """The format of that name, as this tokenizer can write it. `hf` is the own template of the model in `folder`.

    `auto`: the model's own template where `folder` has one; else chatml where its control tokens exist, else plain. A
    tokenizer without a begin of text writes none.
    """
    if name == "auto" and folder is not None and jinja.is_in(folder):
        name = HF
    if name == HF:
        if folder is None:
            raise ValueError("format: 'hf' is a model's own template; name the folder of the model")
        return ChatTemplate.open(folder, tokenizer)
    if name == "auto":
        name = "plain" if missing(FORMATS["chatml"], tokenizer) else "chatml"
    if name not in FORMATS:
        raise ValueError(f"format: {name!r} is unknown{_nearest(name)} Known: auto, {', '.join(sorted(FORMATS))}, {HF}")
    return fit(FORMATS[name], tokenizer)


def fit(format: Format, tokenizer: Tokenizer) -> Format:
    """The format as this tokenizer can write it; a tokenizer that lacks its control tokens is refused."""
    lacking = missing(format, tokenizer)
    if lacking:
        raise ValueError(
            f"format: {format.name!r} needs the control tokens {lacking}, which the tokenizer lacks; "
            "choose a format made for this tokenizer, 'plain', or a tokenizer trained with these controls; "
            "config.new_tokens gives them to the tokenizer of a model's folder"
        )
    found = tuple(name for name in format.optional if tokenizer.control(name) is not None)
    format = replace(format, controls=format.controls + found, optional=()) if format.optional else format
    return without_begin(format) if tokenizer.bos is None else format


def without_begin(format: Format) -> Format:
    """The format without the tokenizer's begin of text."""
    turns = {role: replace(turn, header=turn.header.replace(BOS, "")) for role, turn in format.turns.items()}
    return replace(format, begin=format.begin.replace(BOS, ""), turns=turns)


def missing(format: Format, tokenizer: Tokenizer) -> list[str]:
    """Control tokens that the format needs and the tokenizer lacks."""
    missing = [control for control in format.controls if tokenizer.control(control) is None]
    ends_with_eos = any(EOS in turn.terminator for turn in format.turns.values())
    return missing + ([EOS] if ends_with_eos and tokenizer.eos is None else [])


def _nearest(name: str) -> str:
    closest = difflib.get_close_matches(name, [*FORMATS, "auto", HF], n=1, cutoff=0.5)
    return f"; did you mean {closest[0]!r}?" if closest else "."
