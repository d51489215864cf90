"""Rotary positions in config.json: how fast pairs turn, and how that is stretched."""

from collections.abc import Mapping
from typing import Any

from itjax.hub.fields import FULL, SLIDING, Fields, is_real
from itjax.models.config import ModelConfig, Rope

# Of rotary positions: our fields and theirs, of all and of each scaling.
_ALWAYS = {"theta": "rope_theta", "share": "partial_rotary_factor"}
_SCALING: dict[str, dict[str, str]] = {
    "none": {},
    "linear": {"factor": "factor"},
    "llama3": {
        "factor": "factor", "original_length": "original_max_position_embeddings", "low": "low_freq_factor",
        "high": "high_freq_factor",
    },
    "yarn": {
        "factor": "factor", "original_length": "original_max_position_embeddings", "beta_fast": "beta_fast",
        "beta_slow": "beta_slow", "truncate": "truncate", "attention_factor": "attention_factor", "mscale": "mscale",
        "mscale_all_dim": "mscale_all_dim",
    },
    "longrope": {
        "factor": "factor", "original_length": "original_max_position_embeddings", "short": "short_factor",
        "long": "long_factor", "attention_factor": "attention_factor",
    },
}  # fmt: skip


# --- reading ----------------------------------------------------------------------------------------------------------


def read(fields: Fields, *, length: int) -> dict[str, Any]:
    """The rotations of a decoder that claims this context."""
    theta = fields.real("rope_theta")
    name, settings = _settings(fields)
    if fields.family != "gemma3_text":
        return {"rope": _rope(fields, settings, name, theta=theta, length=length)}
    local = fields.real("rope_local_base_freq")
    if name == "rope_scaling":  # which is of the layers that see everything
        nested, places = {FULL: settings}, {FULL: name, SLIDING: name}
    else:
        nested, places = dict(settings), {FULL: f"{name}.{FULL}", SLIDING: f"{name}.{SLIDING}"}
    full, sliding = nested.pop(FULL, None), nested.pop(SLIDING, None)
    for stray, value in nested.items():
        fields.fault(f"{name}.{stray}", value, f"its fields are {FULL} and {SLIDING}; correct the file")
    return {
        "rope": _rope(fields, full, places[FULL], theta=theta, length=length),
        "local_rope": _rope(fields, sliding, places[SLIDING], theta=local, length=length),
    }


def _settings(fields: Fields) -> tuple[str, Any]:
    """The field that says how positions are turned, and its value."""
    old, new = fields.take("rope_scaling"), fields.take("rope_parameters")
    if new and "rope_scaling" in fields and old:
        fields.fault("rope_scaling", old, "rope_parameters says the same in another way; keep the one that is meant")
    if isinstance(new, Mapping) and new:
        return "rope_parameters", new
    if fields.family == "gpt_oss" and old is None:
        fields.fault(
            "rope_scaling", old, "readers take this for different things; leave the field out if it is the usual"
        )
    return "rope_scaling", old


def _rope(fields: Fields, settings: Any, place: str, *, theta: float, length: int) -> Rope:
    """One set of rotations. `length` is the context that the model claims."""
    if not isinstance(settings, Mapping | None):
        fields.fault(place, settings, "this is no object; copy the file again")
        settings = None
    left = {name: value for name, value in (settings or {}).items() if value is not None}
    kind = left.pop("rope_type", left.get("type", "default"))
    left.pop("type", None)
    scaling = _scaling_of(fields, kind, place)
    numbers: dict[str, Any] = {"theta": theta}
    for ours, theirs in (_ALWAYS | _SCALING[scaling]).items():
        if theirs in left:
            numbers[ours] = _number(fields, ours, left.pop(theirs), f"{place}.{theirs}")
    for stray, value in left.items():
        fields.fault(f"{place}.{stray}", value, f"it is not known what this changes in {kind}; correct the file")
    if fields.family == "phi3":
        numbers.setdefault("share", fields.real("partial_rotary_factor"))
        original = fields.size("original_max_position_embeddings")
        if scaling != "none":
            numbers["original_length"] = original  # beside the scaling, and it counts more than one within
    elif numbers.pop("share", 1) != 1:
        fields.fault(
            f"{place}.partial_rotary_factor", settings, "only phi3 turns a part of a head; use a model without"
        )
    if scaling in ("llama3", "yarn", "longrope"):
        numbers.setdefault("original_length", length)
    if scaling in ("yarn", "longrope"):
        numbers.setdefault("factor", length / numbers["original_length"])
    if scaling in ("linear", "llama3") and "factor" not in numbers:
        fields.fault(f"{place}.factor", None, f"{kind} needs it; copy the file again")
    return Rope(**numbers, scaling=scaling)


def _number(fields: Fields, name: str, value: Any, place: str) -> Any:
    """The value in the type that `Rope` has for it; where it is no such thing, a fault and something harmless."""
    if name in ("short", "long"):
        if isinstance(value, list) and all(is_real(one) and one > 0 for one in value):
            return tuple(float(one) for one in value)
    elif name == "truncate":
        if isinstance(value, bool):
            return value
    elif is_real(value) and (value > 0 or (value == 0 and name in ("mscale", "mscale_all_dim"))):
        return int(value) if name == "original_length" else float(value)
    fields.fault(place, value, "this is nothing that can be computed with; copy the file again")
    return () if name in ("short", "long") else 1


def _scaling_of(fields: Fields, kind: Any, place: str) -> str:
    if fields.family == "phi3" and kind in ("su", "yarn"):
        return "longrope"  # the names it had before
    known = {"default": "none"} | {name: name for name in _SCALING if name != "none"}
    if fields.family == "phi3":
        known = {"default": "none", "longrope": "longrope"}
    if kind not in known:
        fields.fault(f"{place}.rope_type", kind, f"only {', '.join(known)} are computed here; use a model that has one")
    return known.get(kind, "none")


# --- writing ----------------------------------------------------------------------------------------------------------


def write(config: ModelConfig) -> dict[str, Any]:
    """The fields that say the rotations."""
    fields: dict[str, Any] = {"rope_theta": config.rope.theta, "rope_scaling": _scaling(config)}
    if config.family == "phi3":
        fields["partial_rotary_factor"] = config.rope.share
        fields["original_max_position_embeddings"] = config.rope.original_length or config.max_length
    if config.family == "gemma3_text" and config.local_rope:
        fields["rope_local_base_freq"] = config.local_rope.theta
    return fields


def _scaling(config: ModelConfig) -> dict[str, Any] | None:
    rope, phi = config.rope, config.family == "phi3"
    if rope.scaling == "none":  # where nothing is said, GPT-OSS is stretched
        return {"rope_type": "default"} if config.family == "gpt_oss" else None
    fields: dict[str, Any] = {"type" if phi else "rope_type": rope.scaling}
    for ours, theirs in _SCALING[rope.scaling].items():
        value = getattr(rope, ours)
        if value is None or (value == 0 and ours.startswith("mscale")):
            continue
        fields[theirs] = list(value) if isinstance(value, tuple) else value
    if phi:  # said beside it, and older readers want no further field in here
        fields.pop("original_max_position_embeddings", None)
        if rope.original_length and rope.factor == config.max_length / rope.original_length:
            fields.pop("factor", None)
    return fields


def plain(rope: Rope) -> Rope:
    """Without numbers that its scaling does not use."""
    used = {name: getattr(rope, name) for name in ("theta", "share", "scaling", *_SCALING[rope.scaling])}
    return Rope(**used)
