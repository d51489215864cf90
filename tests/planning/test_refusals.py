"""What a mesh does not divide is said with its numbers, and with numbers that would do."""

import re

import pytest

from itjax.base.schema import Lora, Run
from itjax.models import families
from itjax.models.config import ModelConfig
from itjax.planning.refusals import undivided, untrained

LLAMA, MIXTRAL = families.PRESETS["llama31_8b"], families.PRESETS["mixtral_8x7b"]
ONE = {"data": 1, "fsdp": 1, "expert": 1, "context": 1, "tensor": 1}


def said(run: Run, config: ModelConfig = LLAMA, **sizes: int) -> list[str]:
    return list(undivided(run, config, {**ONE, **sizes}))


def test_what_divides_is_not_spoken_of():
    assert said(Run(rows=64, length=4096), data=2, fsdp=8, context=2, tensor=4) == []
    assert said(Run(rows=64, length=4096), MIXTRAL, fsdp=8, expert=8) == []


@pytest.mark.parametrize(
    "run, config, sizes, words",
    [
        (Run(rows=12), LLAMA, {"data": 2, "fsdp": 4}, "12 rows do not divide over data 2 x fsdp 4 = 8; .* has 16 rows"),
        (
            Run(rows=16, accumulate=4),
            LLAMA,
            {"fsdp": 8},
            r"4 rows of a micro-batch \(16 / 4\) do not divide over fsdp 8",
        ),
        (Run(), LLAMA, {"tensor": 64}, "32 query heads do not divide over tensor 64; .* to 1, 2, 4, 8, 16, 32$"),
        (Run(), LLAMA, {"tensor": 3}, "14336 feed-forward width do not divide over tensor 3"),
        (Run(length=4096), LLAMA, {"context": 3}, "context 3, which needs a multiple of 9; set config.length to 4104"),
        (Run(), MIXTRAL, {"expert": 3}, "8 experts do not divide over expert 3; .* to 1, 2, 4, 8$"),
        (Run(), LLAMA, {"expert": 2}, "has none; set config.parallel.expert to 1"),
    ],
)
def test_what_does_not_divide_is_named_with_a_way_out(run, config, sizes, words):
    lines = said(run, config, **sizes)
    assert any(re.search(words, line) for line in lines), lines


def test_adapters_that_fit_no_layer_train_nothing():
    small = families.PRESETS["tiny"]
    assert not list(untrained(Run(lora=Lora(rank=2, targets=("layers/attn/*",))), small))
    assert not list(untrained(Run(lora=Lora(rank=2, targets=("no/*",), also=("*norm*",))), small))
    (line,) = untrained(Run(lora=Lora(rank=2, targets=("no/*",))), small)
    assert "'no/*' fit no linear layer; there are layers/attn/k, layers/attn/o" in line
