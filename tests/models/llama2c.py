"""Models of llama2.c: seven whole numbers, then float32 numbers, one kind of parameter after the other for all layers.

https://github.com/karpathy/llama2.c. L layers, D width, N query heads, K key/value heads, H head size, F feed-forward,
V vocabulary, S positions, P pairs of a head.
"""

import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from itjax.base.files import write_whole
from itjax.hub import configs, names, tensors, weights
from itjax.hub.folder import CONFIG
from itjax.models.config import ModelConfig
from itjax.models.model import Params

HEADER = 7
BOS, EOS = 1, 2


def read(path: Path) -> tuple[ModelConfig, Params]:
    """The model of a .bin file."""
    D, F, L, N, K, V, S = (int(number) for number in np.fromfile(path, "<i4", HEADER))
    H = D // N
    left = np.fromfile(path, "<f4", offset=4 * HEADER)

    def take(*shape: int) -> np.ndarray:
        nonlocal left
        taken, left = np.split(left, [int(np.prod(shape))])
        return taken.reshape(shape)

    embed, attn_norm = take(abs(V), D), take(L, D)
    q, k, v, o = take(L, N, H, D), take(L, K, H, D), take(L, K, H, D), take(L, D, N, H)
    mlp_norm, gate, down, up, final_norm = take(L, D), take(L, F, D), take(L, D, F), take(L, F, D), take(D)
    take(2, S, H // 2)  # cosines and sines, which follow from the positions
    attn = {"q": _halves(q), "k": _halves(k), "v": v.transpose(0, 3, 1, 2), "o": o.transpose(0, 2, 3, 1)}
    mlp = {name: kernel.swapaxes(1, 2) for name, kernel in (("gate", gate), ("up", up), ("down", down))}
    params: Params = {
        "embed": {"kernel": embed},
        "layers": {
            "attn_norm": {"scale": attn_norm},
            "attn": {name: {"kernel": kernel} for name, kernel in attn.items()},
            "mlp_norm": {"scale": mlp_norm},
            "mlp": {name: {"kernel": kernel} for name, kernel in mlp.items()},
        },
        "final_norm": {"scale": final_norm},
    }
    if V < 0:  # its way to say that the head is not the embedding
        params["head"] = {"kernel": take(-V, D)}
    assert not left.size, f"{path}: {left.size} numbers more than a model of these sizes has"
    config = ModelConfig(
        vocab=abs(V), layers=L, dim=D, heads=N, kv_heads=K, head_size=H, ffn=F, norm_eps=1e-5, tie_embeddings=V > 0,
        max_length=S,
    )  # fmt: skip
    return config, _as_jax(params)


def convert(path: Path, tokenizer: Path, out: Path) -> None:
    """The folder that libraries of published models open."""
    config, params = read(path)
    fields = configs.write(config, dtype="float32", bos=BOS, eos=EOS, pad=None, length=config.max_length)
    write_whole(out / CONFIG, tensors.dump_json(fields).encode())
    weights.save(out, params, names.entries(config), dtype="float32")
    shutil.copyfile(tokenizer, out / "tokenizer.model")


def _halves(kernel_LNHD: np.ndarray) -> np.ndarray:
    """(L, D, N, H) with the first numbers of all pairs before the second ones, as ours are turned.

    theirs  a0 b0 a1 b1    ours  a0 a1 b0 b1
    """
    L, N, H, D = kernel_LNHD.shape
    kernel_LNP2D = kernel_LNHD.reshape(L, N, H // 2, 2, D)
    return kernel_LNP2D.transpose(0, 4, 1, 3, 2).reshape(L, D, N, H)


def _as_jax(params: Params) -> Params:
    return {name: _as_jax(below) if isinstance(below, dict) else jnp.asarray(below) for name, below in params.items()}
