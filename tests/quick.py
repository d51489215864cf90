"""Programs that run once or twice need not be fast: compiled without effort they are there in half the time."""

import contextlib
import functools
from collections.abc import Iterator

import jax
import pytest

from itjax.base.schema import Lora
from itjax.models import model
from itjax.models.config import ModelConfig
from itjax.models.model import NO_LORA, Model

HASTY = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


@contextlib.contextmanager
def compiled() -> Iterator[None]:
    """What is jitted in here is compiled so. It cannot be called from what is jitted elsewhere."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "jit", functools.partial(jax.jit, compiler_options=HASTY))
        yield


def build(config: ModelConfig, *, lora: Lora = NO_LORA) -> Model:
    """The decoder in float32, whose layers are a loop on CPUs too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "UNROLLED_ON_CPU", 0)
        return model.build(config, dtype="float32", attention="auto", remat="none", lora=lora)
