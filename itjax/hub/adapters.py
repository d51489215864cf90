"""Adapters as PEFT folders, out and in: `adapter_config.json` and `adapter_model.safetensors`.

PEFT names an adapter after the module that it wraps, one for each layer:

    layers/attn/q/lora_a (L, D, r)      base_model.model.model.layers.3.self_attn.q_proj.lora_A.weight   (r, D)
    layers/attn/q/lora_b (L, r, N, H)   base_model.model.model.layers.3.self_attn.q_proj.lora_B.weight   (N·H, r)

Where one module of theirs is several of ours (Phi-3's qkv_proj), our pairs become one pair of the summed rank, and any pair
of theirs becomes one of ours for each part, of which all have the same A:

    A = [A_q; A_k; A_v]   (3r, D)       B = [B_q . . ; . B_k . ; . . B_v]   (N·H + 2·K·H, 3r)

All experts of a layer are one parameter in transformers, and their adapters one pair: A is (E·r, inputs) with the experts
outermost, B is (outputs, r·E) with the experts innermost. L layers, D width, N, K heads, H head size, E experts, r rank.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from itjax.base import tree
from itjax.base.files import write_whole
from itjax.base.schema import Lora
from itjax.hub import names, tensors
from itjax.hub.names import Entry
from itjax.hub.weights import Convert
from itjax.models import lora as adapters
from itjax.models import quantize
from itjax.models.config import ModelConfig
from itjax.models.model import build
from itjax.parallel import cluster

if TYPE_CHECKING:
    from itjax.models.model import Params

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
A, B, M = "lora_A.weight", "lora_B.weight", "lora_magnitude_vector"
STACKED = "model.layers.0.mlp.experts.down_proj"  # in the layout that transformers holds experts in
WAY_OUT = "merge it with PEFT's merge_and_unload and give the merged folder as --config.model"

# Settings that change what an adapter computes, with the values that are read.
READ: Mapping[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "task_type": ("CAUSAL_LM", None),
    "bias": ("none", None),
    "fan_in_fan_out": (False, None),
    "lora_bias": (False, None),
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),  # others change the base
    **dict.fromkeys(
        (
            "layer_replication", "layers_to_transform", "trainable_token_indices", "use_qalora", "use_bdlora",
            "alora_invocation_tokens", "arrow_config", "kasa_config", "monteclora_config", "velora_config",
        ),
        (None, False),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Part:
    """One linear layer of ours within a module of theirs."""

    place: str  # "layers/attn/q"
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    rows: slice  # of the module's outputs


@dataclass(frozen=True)
class Module:
    """What PEFT wraps: a linear layer, or the parameter of all experts of a layer."""

    name: str  # "model.layers.{layer}.self_attn.q_proj"
    parts: tuple[Part, ...]
    experts: int  # 0: a linear layer

    @property
    def num_inputs(self) -> int:
        return math.prod(self.parts[0].inputs)

    @property
    def num_outputs(self) -> int:
        return sum(math.prod(part.outputs) for part in self.parts)


@dataclass(frozen=True)
class Pair:
    """Their A and B of one module: L layers and, of experts, E of them lead."""

    a: np.ndarray  # (..., r, inputs)
    b: np.ndarray  # (..., outputs, r)
    m: np.ndarray | None  # (..., outputs)


def quantiser(config: ModelConfig, kind: str) -> Convert:
    """What makes codes and scales of the kernels of a folder, layer by layer, as `weights.load` asks for."""
    known = {entry.path: entry for entry in names.entries(config)}

    def convert(path: str, kernel: jax.Array) -> Mapping[str, jax.Array]:
        entry = known[path]
        return quantize.quantize(kernel, kind, contract=entry.contract, lead=int(entry.experts))

    return convert


def modules(config: ModelConfig) -> list[Module]:
    """The modules of the family that may have an adapter, as transformers holds them."""
    kernels: dict[str, list[Entry]] = {}
    for entry in names.entries(config, [STACKED]):
        if (
            entry.path.startswith("layers/")
            and entry.path.endswith("/kernel")
            and not entry.path.endswith("router/kernel")
        ):
            kernels.setdefault(entry.name.removesuffix(".weight"), []).append(entry)
    abstract = _abstract(config)
    return [_module(name, found, abstract) for name, found in kernels.items()]


@functools.cache
def _abstract(config: ModelConfig) -> Mapping[str, Any]:
    return tree.flatten(build(config, dtype="float32", attention="auto", remat="none").abstract)


def _module(name: str, found: list[Entry], abstract: Mapping[str, Any]) -> Module:
    parts = []
    num_outputs = sum(math.prod(_shapes(entry, abstract)[1]) for entry in found)
    for entry in found:
        inputs, outputs = _shapes(entry, abstract)
        rows = entry.part or slice(0, num_outputs)
        parts.append(Part(entry.path.removesuffix("/kernel"), inputs, outputs, rows))
    return Module(name, tuple(parts), abstract[found[0].path].shape[1] if found[0].experts else 0)


def _shapes(entry: Entry, abstract: Mapping[str, Any]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(inputs, outputs) of a kernel, without layers and experts."""
    shape = abstract[entry.path].shape[2 if entry.experts else 1 :]
    return shape[: entry.contract], shape[entry.contract :]


# --- writing ----------------------------------------------------------------------------------------------------------


def write_peft(folder: str | Path, params: "Params", lora: Lora, config: ModelConfig, *, base: str) -> None:
    """Writes the adapters among the parameters into a folder that PEFT opens; `base` is the model that they are for.

    Every process calls this; the first one writes. Raises ValueError for what a PEFT folder cannot say.
    """
    flat = {path: leaf for path, leaf in tree.flatten(params).items() if _is_written(path, lora)}
    leaves = {path: _on_host(leaf) for path, leaf in flat.items()}
    adapted = [module for module in modules(config) if any(f"{part.place}/lora_a" in leaves for part in module.parts)]
    written: dict[str, np.ndarray] = {}
    for module in adapted:
        written |= _tensors(module, _stacked(module, leaves, lora), _wrapped(module, adapted))
    also = _also(leaves, config)
    for entry in also:
        written |= _whole_tensors(entry, leaves[entry.path])
    if cluster.writes():
        shapes = {name: value.shape for name, value in written.items()}
        tensors.write(Path(folder) / WEIGHTS, shapes, "F32", iter(written.values()))
        write_whole(Path(folder) / CONFIG, tensors.dump_json(_fields(adapted, also, lora, config, base)))


def _is_written(path: str, lora: Lora) -> bool:
    return path.rpartition(tree.SEPARATOR)[2] in adapters.ADAPTERS or tree.matches(path, lora.also)


def _on_host(leaf: Any) -> np.ndarray:
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        return np.asarray(multihost_utils.process_allgather(leaf, tiled=True), np.float32)
    return np.asarray(leaf, np.float32)


def _stacked(module: Module, leaves: Mapping[str, np.ndarray], lora: Lora) -> Pair:
    """Our pairs as one of theirs; a part without an adapter has zeros."""
    lead_ndim, rank, parts = 2 if module.experts else 1, lora.rank, module.parts
    lead = next(leaves[f"{part.place}/lora_a"].shape for part in parts if f"{part.place}/lora_a" in leaves)[:lead_ndim]
    a = np.zeros((*lead, rank * len(parts), module.num_inputs), np.float32)
    b = np.zeros((*lead, module.num_outputs, rank * len(parts)), np.float32)
    m = np.zeros((*lead, module.num_outputs), np.float32) if lora.dora else None
    for number, part in enumerate(parts):
        block = slice(number * rank, (number + 1) * rank)
        if f"{part.place}/lora_a" in leaves:
            a[..., block, :] = leaves[f"{part.place}/lora_a"].reshape(*lead, -1, rank).swapaxes(-1, -2)
            b[..., part.rows, block] = leaves[f"{part.place}/lora_b"].reshape(*lead, rank, -1).swapaxes(-1, -2)
            if m is not None:
                m[..., part.rows] = leaves[f"{part.place}/lora_m"].reshape(*lead, -1)
        elif lora.dora:
            raise ValueError(
                f"lora.targets: {part.place} has no DoRA adapter, and other parts of {_short(module.name)} have; PEFT takes "
                "them together. Export the merged model instead"
            )
    return Pair(a, b, m)


def _tensors(module: Module, pair: Pair, wrapped: str) -> Iterator[tuple[str, np.ndarray]]:
    """Their tensors of one module, layer by layer."""
    for layer in range(len(pair.a)):
        name = PREFIX + wrapped.format(layer=layer)
        a, b = pair.a[layer], pair.b[layer]
        if module.experts:
            a, b = a.reshape(-1, module.num_inputs), b.transpose(1, 2, 0).reshape(module.num_outputs, -1)
        yield f"{name}.{A}", a
        yield f"{name}.{B}", b
        if pair.m is not None:
            yield f"{name}.{M}", pair.m[layer]


def _wrapped(module: Module, adapted: list[Module]) -> str:
    """The module that PEFT puts an adapter into: of experts, one around the other for each parameter, the last outermost."""
    if not module.experts:
        return module.name
    around = [other for other in adapted if other.experts]
    depth = len(around) - 1 - around.index(module)
    return module.name.rpartition(".")[0] + ".base_layer" * depth


def _also(leaves: Mapping[str, np.ndarray], config: ModelConfig) -> list[Entry]:
    """Tensors that were trained in full. PEFT replaces modules as a whole: embedding, head and norms."""
    own = [path for path in leaves if path.rpartition(tree.SEPARATOR)[2] not in adapters.ADAPTERS]
    known = {entry.path: entry for entry in names.entries(config, [STACKED])}
    for path in own:
        if path not in known or known[path].contract or path.endswith("/bias") or path.endswith("sinks"):
            raise ValueError(
                f"lora.also: {path} is trained, and a PEFT folder has no place for it; export the merged model"
            )
    # PEFT gives a tied head a module of its own, which is to be the embedding.
    repeated = names.duplicates(config, [STACKED]) if "embed/kernel" in own else []
    return [known[path] for path in own] + repeated


def _whole_tensors(entry: Entry, leaf: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    if "{layer}" not in entry.name:
        yield PREFIX + entry.name, leaf
        return
    for layer, value in enumerate(leaf):
        yield PREFIX + entry.name.format(layer=layer), value.reshape(-1)


def _fields(adapted: list[Module], also: list[Entry], lora: Lora, config: ModelConfig, base: str) -> dict[str, Any]:
    """adapter_config.json"""
    linear = [module for module in adapted if not module.experts]
    experts = [module for module in adapted if module.experts]
    fused = {_short(module.name): len(module.parts) for module in adapted if len(module.parts) > 1}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": lora.rank,
        "lora_alpha": _plain(lora.alpha),
        "lora_dropout": 0.0 if experts else lora.dropout,  # PEFT has no dropout before experts, and refuses any
        "use_rslora": lora.rank_stabilized,
        "use_dora": lora.dora,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "target_modules": _targets(linear, config),
        "target_parameters": [_short(module.name) for module in experts] or None,
        "rank_pattern": {name: lora.rank * count for name, count in fused.items()},
        # The scale stays that of one part, although the rank is that of all.
        "alpha_pattern": {
            name: _plain(lora.alpha * (math.sqrt(count) if lora.rank_stabilized else count))
            for name, count in fused.items()
        },
        "modules_to_save": sorted({_short(entry.name.removesuffix(".weight")) for entry in also}) or None,
    }


def _plain(number: float) -> float | int:
    return int(number) if number == int(number) else number


def _short(name: str) -> str:
    """A module's name within a layer: "self_attn.q_proj". PEFT compares ends of names."""
    return name.partition("{layer}.")[2] or name


def _targets(adapted: list[Module], config: ModelConfig) -> list[str]:
    """Ends of the names of all adapted modules and of no others: "q_proj", as people write them, where that is enough."""
    chosen = {module.name for module in adapted}
    others = {
        entry.name.removesuffix(".weight") for entry in names.entries(config, [STACKED]) if entry.contract
    } - chosen  # fmt: skip
    targets = []
    for name in sorted(chosen):
        last = name.rpartition(".")[2]
        targets.append(_short(name) if any(f".{other}".endswith(f".{last}") for other in others) else last)
    return sorted(targets)


# --- reading ----------------------------------------------------------------------------------------------------------


def read_peft(folder: str | Path, config: ModelConfig) -> tuple[Lora, dict[str, np.ndarray]]:
    """The adapters of a PEFT folder: their settings, and the leaves that they are in our tree, by path, float32.

    Raises ValueError where the folder says what our adapters cannot do, or holds tensors that they have no place for.
    """
    place = Path(folder)
    for name in (CONFIG, WEIGHTS):
        if not (place / name).is_file():
            raise ValueError(f"{place}: there is no {name}; give the folder of a PEFT adapter, with safetensors")
    fields = tensors.parse_json((place / CONFIG).read_bytes(), str(place / CONFIG))
    written = _settings(fields, place / CONFIG)
    found = _Found(place / WEIGHTS)
    every = modules(config)
    present = [module for module in every if not module.experts or _is_parameter(module, fields)]
    read = ((module, _pair(module, present, found, fields, config.layers)) for module in present)
    pairs = [(module, pair) for module, pair in read if pair is not None]
    also = _also_leaves(found, config)
    found.check_all_read()
    if not pairs:
        raise ValueError(f"{found.file}: adapts no linear layer of this model; give an adapter of the same family")
    ours = {part.place: (part, own) for module, pair in pairs for part, own in _parted(module, pair, written)}
    rank = max(pair.a.shape[-2] for _, pair in ours.values())
    everywhere = {part.place for module in every for part in module.parts}
    lora = dataclasses.replace(
        written,
        rank=rank,
        alpha=_alpha(written, rank),
        targets=() if ours.keys() == everywhere else tuple(sorted(ours)),
        also=tuple(sorted(also)),
    )
    return lora, also | {path: leaf for part, pair in ours.values() for path, leaf in _leaves(part, pair, rank)}


class _Found:
    """The tensors of a file, each to be read once."""

    def __init__(self, file: Path) -> None:
        self.file, self._left = file, dict(tensors.header(file))

    def take(self, name: str, shape: tuple[int | None, ...]) -> np.ndarray | None:
        """A tensor in float32, None where there is none of that name; a None in the shape is any number."""
        tensor = self._left.pop(PREFIX + name, None)
        if tensor is None:
            return None
        fits = len(shape) == len(tensor.shape) and all(b in (a, None) for a, b in zip(tensor.shape, shape, strict=True))
        if not fits or tensor.dtype not in tensors.FLOATS:
            wanted = "x".join("any" if extent is None else str(extent) for extent in shape)
            raise ValueError(
                f"{tensor.place}: {tensor.dtype} of shape {tensor.shape}, and this model takes floats of {wanted}; "
                "give an adapter of the same model"
            )
        with tensors.Reader() as reader:
            box = tensors.Box(0, (math.prod(tensor.shape),), (1,))
            return reader.read(tensor, box).reshape(tensor.shape).astype(np.float32)

    def check_all_read(self) -> None:
        if self._left:
            names = ", ".join(list(self._left)[:3])
            raise ValueError(f"{self.file}: {len(self._left)} tensors have no place here: {names}, ...; {WAY_OUT}")


def _settings(fields: Mapping[str, Any], place: Path) -> Lora:
    """What adapter_config.json says, without what depends on the tensors."""
    for name, read in READ.items():
        value = fields.get(name, read[-1] if name != "peft_type" else None)
        if value not in read:
            raise ValueError(f"{place}: {name}: {value!r} is not read, only {read[0]!r}; {WAY_OUT}")
    rank, alpha = fields.get("r"), fields.get("lora_alpha")
    if type(rank) is not int or rank < 1 or not isinstance(alpha, int | float) or not alpha > 0:
        raise ValueError(f"{place}: r and lora_alpha: {rank!r} and {alpha!r}; both should be numbers above 0")
    dropout = fields.get("lora_dropout") or 0.0
    if not isinstance(dropout, int | float) or not 0 <= dropout < 1:
        raise ValueError(f"{place}: lora_dropout: {dropout!r}; it should be a number from 0 and below 1")
    return Lora(
        rank=rank,
        alpha=float(alpha),
        dropout=float(dropout),
        rank_stabilized=bool(fields.get("use_rslora")),
        dora=bool(fields.get("use_dora")),
    )


def _is_parameter(module: Module, fields: Mapping[str, Any]) -> bool:
    """Whether the experts' parameter is among those that the config names, by the end of its name."""
    return any(f".{_short(module.name)}".endswith(f".{target}") for target in fields.get("target_parameters") or ())


def _pair(module: Module, present: list[Module], found: _Found, fields: Mapping[str, Any], layers: int) -> Pair | None:
    """The adapters of a module in all layers; None where it has none. Smaller ranks are filled with zeros."""
    written = _settings(fields, found.file)
    wrapped, E = _wrapped(module, present), module.experts
    a_L, b_L, m_L, missing = [], [], [], []
    for layer in range(layers):
        name = wrapped.format(layer=layer)
        a, b = (
            found.take(f"{name}.{A}", (None, module.num_inputs)),
            found.take(f"{name}.{B}", (module.num_outputs, None)),
        )
        m = found.take(f"{name}.{M}", (module.num_outputs,))
        if a is None or b is None or (m is None) == written.dora:
            missing.append(layer)
            continue
        if len(a) != b.shape[1]:
            raise ValueError(f"{found.file}: {name}: A has rank {len(a)} and B {b.shape[1]}; the file is damaged")
        if E:
            a, b = a.reshape(E, -1, module.num_inputs), b.reshape(module.num_outputs, -1, E).transpose(2, 0, 1)
        own = _own(written, module.name.format(layer=layer), fields, rank=a.shape[-2])
        a_L.append(a)
        b_L.append(b * np.float32(adapters.scale(own) / adapters.scale(written)))
        m_L.append(m)
    if not a_L:
        return None
    if missing:
        raise ValueError(f"{found.file}: {_short(module.name)} has no adapter in layers {missing}; {WAY_OUT}")
    rank = max(a.shape[-2] for a in a_L)
    a_LrI, b_LOr = np.stack([_filled(a, -2, rank) for a in a_L]), np.stack([_filled(b, -1, rank) for b in b_L])
    return Pair(a_LrI, b_LOr, np.stack([m for m in m_L if m is not None]) if written.dora else None)


def _own(written: Lora, name: str, fields: Mapping[str, Any], *, rank: int) -> Lora:
    """The rank and alpha of one module: patterns are regular expressions for the end of its name."""
    alpha = written.alpha
    for pattern, value in (fields.get("alpha_pattern") or {}).items():
        try:
            fits = re.match(rf"(.*\.)?({pattern})$", name) is not None
        except re.error as error:
            raise ValueError(f"{CONFIG}: alpha_pattern: {pattern!r}: {error}; give a regular expression") from None
        if not isinstance(value, int | float) or not value > 0:
            raise ValueError(f"{CONFIG}: alpha_pattern: {pattern!r}: {value!r} should be a number above 0")
        if fits:
            alpha = float(value)
            break
    return dataclasses.replace(written, rank=rank, alpha=alpha)


def _filled(x: np.ndarray, axis: int, rank: int) -> np.ndarray:
    """Zeros in A and in B add nothing, and never move."""
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, rank - x.shape[axis])
    return np.pad(x, widths)


def _parted(module: Module, pair: Pair, written: Lora) -> Iterator[tuple[Part, Pair]]:
    """Our adapters of one of theirs: the blocks that it was made of, or its A for each part.

    A part whose block says nothing has no adapter, unless that is so for all: then nothing has been trained yet.
    """
    parts, rank = module.parts, pair.a.shape[-2] // len(module.parts)
    blocks = [slice(number * rank, (number + 1) * rank) for number in range(len(parts))]
    is_made_of_blocks = len(parts) > 1 and pair.a.shape[-2] == len(parts) * written.rank and all(
        not pair.b[..., part.rows, other].any()
        for part, own in zip(parts, blocks, strict=True) for other in blocks if other != own
    )  # fmt: skip
    for part, block in zip(parts, blocks, strict=True):
        b = pair.b[..., part.rows, :]
        m = None if pair.m is None else pair.m[..., part.rows]
        if not is_made_of_blocks:
            yield part, Pair(pair.a, b, m)
        elif pair.a[..., block, :].any():
            yield part, Pair(pair.a[..., block, :], b[..., block], m)


def _alpha(written: Lora, rank: int) -> float:
    """The alpha that gives another rank the same scale."""
    if rank == written.rank:
        return written.alpha
    return adapters.scale(written) * (math.sqrt(rank) if written.rank_stabilized else rank)


def _leaves(part: Part, pair: Pair, rank: int) -> Iterator[tuple[str, np.ndarray]]:
    a, b = _filled(pair.a, -2, rank).swapaxes(-1, -2), _filled(pair.b, -1, rank).swapaxes(-1, -2)
    lead = a.shape[:-2]
    yield f"{part.place}/lora_a", a.reshape(*lead, *part.inputs, rank)
    yield f"{part.place}/lora_b", b.reshape(*lead, rank, *part.outputs)
    if pair.m is not None:
        yield f"{part.place}/lora_m", pair.m.reshape(*lead, *part.outputs)


def _also_leaves(found: _Found, config: ModelConfig) -> dict[str, np.ndarray]:
    """Tensors of modules that were trained as a whole: embedding, head and norms."""
    abstract = _abstract(config)
    leaves: dict[str, np.ndarray] = {}
    for entry in (*names.entries(config, [STACKED]), *names.duplicates(config, [STACKED])):
        if entry.contract or entry.path.endswith(("/bias", "sinks")):
            continue
        shape = abstract[entry.path].shape
        stacked = "{layer}" in entry.name
        theirs = (math.prod(shape[1:]),) if stacked else shape
        values = [found.take(entry.name.format(layer=n), theirs) for n in range(shape[0] if stacked else 1)]
        kept = [value for value in values if value is not None]
        if not kept:
            continue
        if len(kept) < len(values):
            raise ValueError(f"{found.file}: {entry.name} is not there for all layers; {WAY_OUT}")
        leaf = np.stack(kept).reshape(shape) if stacked else kept[0]
        if entry.path in leaves and not np.array_equal(leaves[entry.path], leaf):
            raise ValueError(f"{found.file}: {entry.name} differs from the embedding that it is tied to; {WAY_OUT}")
        leaves[entry.path] = leaf
    return leaves
