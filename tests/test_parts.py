"""What does not fit the model is told before any data is read."""

import pytest

from itjax import parts
from itjax.base.schema import Lora, Optimizer, Run


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"optimizer": Optimizer(rates={"layers/atn/q/kernel": 0.5})}, r"rates: .*Did you mean 'layers/attn/q/kernel'"),
        ({"optimizer": Optimizer(decays={"head/*": 0.1})}, r"decays: 'head/\*' fits no parameter that is trained"),
        ({"lora": Lora(rank=2, targets=("layers/atn/q",))}, r"config\.lora\.targets: .*Did you mean 'layers/attn/q'"),
        ({"lora": Lora(rank=2, also=("*nrom*",))}, r"config\.lora\.also: '\*nrom\*' fits nothing"),
        (
            {"lora": Lora(rank=2), "optimizer": Optimizer(rates={"embed/*": 0.1})},
            r"rates: 'embed/\*' fits no parameter",
        ),
    ],
)
def test_patterns_that_fit_nothing_are_told_with_the_nearest_name(settings, message):
    with pytest.raises(ValueError, match=message):
        parts.check_model(Run(**settings))
