"""From a config file and its overrides to a frozen `schema.Run`; every mistake is one message with place, value and way out."""

import dataclasses
import difflib
import json
import math
import runpy
import sys
import traceback
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import config_dict, config_flags

from itjax.base import schema, tree


class Fault(ValueError):
    """Something a user can mend: the message names place, value and way out, and the command exits with 2."""


def nearest(name: str, known: Sequence[str]) -> str:
    """` Did you mean 'x'?` or nothing: a sentence to append to an error about an unknown name."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f" Did you mean {close[0]!r}?" if close else ""


# --- schema -> ConfigDict ---------------------------------------------------------------------------------------------


def thaw(value: Any) -> config_dict.ConfigDict:
    """The dataclass as a ConfigDict whose fields keep their types; fields that are None become typed placeholders."""
    out = config_dict.ConfigDict()
    hints = typing.get_type_hints(type(value))
    for field in dataclasses.fields(value):
        item = getattr(value, field.name)
        if dataclasses.is_dataclass(item):
            item = thaw(item)
        elif isinstance(item, Mapping):
            entries = {name: thaw(entry) if dataclasses.is_dataclass(entry) else entry for name, entry in item.items()}
            item = config_dict.ConfigDict(entries)
            item.unlock()  # names are the user's
        elif item is None:
            item = config_dict.placeholder(_required(hints[field.name]))
        out[field.name] = item
    return out.lock()


def _required(hint: Any) -> type:
    """`int | None` -> int."""
    options = typing.get_args(hint)
    return next(option for option in options if option is not types.NoneType) if types.NoneType in options else hint


# --- ConfigDict -> schema ---------------------------------------------------------------------------------------------


def freeze(config: Mapping[str, Any], *, needs_data: bool = True) -> schema.Run:
    """A checked `Run`. Raises Fault naming the path of a misspelt, ill-typed or out-of-range field, or a contradiction."""
    run = _build(schema.Run, config, path="config")
    contradictions(run, needs_data=needs_data)
    return run


def _build(kind: type, config: Mapping[str, Any], *, path: str) -> Any:
    hints = typing.get_type_hints(kind)
    fields = {field.name: field for field in dataclasses.fields(kind)}
    for name in config:
        if name not in fields:
            raise Fault(
                f"{path}.{name}: no such setting.{nearest(name, list(fields))} Known: {', '.join(sorted(fields))}"
            )
    values = {}
    for name in config:
        place = f"{path}.{name}"
        values[name] = _value(hints[name], config[name], path=place)
        _bounds(values[name], fields[name].metadata, path=place)
    return kind(**values)


def _value(hint: Any, value: Any, *, path: str) -> Any:
    """The value as the type the schema asks for; ints are welcome where floats are."""
    if value is None and types.NoneType in typing.get_args(hint):
        return None
    wanted = _required(hint)
    origin = typing.get_origin(wanted)
    if dataclasses.is_dataclass(wanted):
        if not isinstance(value, Mapping):
            raise Fault(f"{path}: {value!r} should be a group of settings; set its members, e.g. {path}.name=value")
        return _build(typing.cast(type, wanted), value, path=path)
    if origin is not None and issubclass(origin, Mapping):
        member = typing.get_args(wanted)[1]
        return {name: _value(member, entry, path=f"{path}.{name}") for name, entry in value.items()}
    if origin is tuple and isinstance(value, (tuple, list)) and all(isinstance(item, str) for item in value):
        return tuple(value)
    if wanted is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    if isinstance(wanted, type) and isinstance(value, wanted) and not (wanted is int and isinstance(value, bool)):
        return value
    name = getattr(wanted, "__name__", str(wanted)) if origin is None else str(wanted)
    raise Fault(f"{path}: {value!r} is a {type(value).__name__}; it should be {name}")


def _bounds(value: Any, bounds: Mapping[str, Any], *, path: str) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise Fault(f"{path}: {value} is not a finite number")
    if value is None:
        return
    if "choices" in bounds and value not in bounds["choices"]:
        choices = list(bounds["choices"])
        raise Fault(f"{path}: {value!r} is not a choice.{nearest(str(value), choices)} Choices: {', '.join(choices)}")
    tests = {
        "at_least": (lambda limit: value >= limit, "at least"),
        "above": (lambda limit: value > limit, "above"),
        "at_most": (lambda limit: value <= limit, "at most"),
        "below": (lambda limit: value < limit, "below"),
    }
    for name, (holds, words) in tests.items():
        if name in bounds and not holds(bounds[name]):
            raise Fault(f"{path}: {value} is out of range; it must be {words} {bounds[name]}")


def contradictions(run: schema.Run, *, needs_data: bool = True) -> None:
    """Settings that are fine alone and wrong together."""
    if not run.steps and not run.epochs:
        raise Fault("config.steps: neither steps nor epochs is set; set one, e.g. --config.steps=1000")
    if run.steps and run.epochs:
        raise Fault(
            f"config.steps: steps={run.steps} and epochs={run.epochs} are both set; "
            "keep one, e.g. --config.steps=0 to train for epochs"
        )
    if run.rows % run.accumulate:
        raise Fault(
            f"config.accumulate: {run.rows} rows do not divide into {run.accumulate} micro-batches; "
            f"try --config.rows={run.accumulate * math.ceil(run.rows / run.accumulate)}"
        )
    if needs_data and not run.files and not run.sources:
        raise Fault("config.files: no data; name files, e.g. --config.files='data/*.jsonl', or set config.sources")
    _contradictions_of_sources(run.sources, path="config.sources")
    _contradictions_of_mixture(run.mixture, run.sources, place="config", others=bool(run.files))
    _contradictions_of_limits(run)
    _contradictions_of_adapters(run)
    contradictions_of_optimizer(run.optimizer)
    axes = [
        field.name
        for field in dataclasses.fields(schema.Parallel)
        if isinstance(getattr(run.parallel, field.name), int)
    ]
    free = [axis for axis in axes if getattr(run.parallel, axis) == -1]
    if len(free) > 1:
        raise Fault(f"config.parallel: {' and '.join(free)} are both -1; only one axis can take what is left")
    for axis in axes:
        if getattr(run.parallel, axis) == 0:
            raise Fault(f"config.parallel.{axis}: 0 devices; use 1 for no split, -1 for what is left")


def _contradictions_of_adapters(run: schema.Run) -> None:
    if run.lora.adapter:
        decided = [name for name in ("rank", "targets", "also", "dora", "rank_stabilized") if getattr(run.lora, name)]
        if decided:
            raise Fault(
                f"config.lora.{decided[0]}: the folder {run.lora.adapter} of lora.adapter says it; leave it out"
            )
    if run.lora.rank or run.lora.adapter:
        return
    given = [name for name in ("targets", "also", "dora", "dropout", "rank_stabilized") if getattr(run.lora, name)]
    if given:
        raise Fault(f"config.lora.{given[0]}: set, and lora.rank is 0, so there is no adapter; set the rank, e.g. 16")
    if run.lora.base != "auto":
        raise Fault(
            f"config.lora.base: {run.lora.base!r} is how a frozen base is kept, and with lora.rank=0 all of it is trained; "
            "set a rank, or leave base at 'auto'"
        )


def contradictions_of_optimizer(config: schema.Optimizer) -> None:
    """Raises Fault for settings of an optimizer that are fine alone and wrong together."""
    place = "config.optimizer"
    if config.moments != "float32" and config.kind != "adamw":
        raise Fault(
            f"{place}.moments: {config.moments!r} has no effect with kind={config.kind!r}; set kind='adamw' or leave it out"
        )
    if config.kind == "schedule_free_adamw" and not config.b1:
        raise Fault(f"{place}.b1: 0, and it is the share of the average that schedule-free trains at; set e.g. 0.9")
    if config.kind == "schedule_free_adamw" and config.average:
        raise Fault(
            f"{place}.average: {config.average:g}, but schedule_free_adamw evaluates an average of its own; set 0"
        )
    for name, rules in (("rates", config.rates), ("decays", config.decays)):
        for pattern, value in rules.items():
            if not 0 <= value < math.inf:
                raise Fault(f"{place}.{name}[{pattern!r}]: {value:g} is out of range; it must be at least 0")


def _contradictions_of_sources(sources: Mapping[str, schema.Source], *, path: str) -> None:
    for name, source in sources.items():
        if sum(map(bool, (source.files, source.task, source.sources))) != 1:
            raise Fault(
                f"{path}.{name}: set one of files, task and sources "
                f"(files={source.files!r}, task={source.task!r}, sources={sorted(source.sources)})"
            )
        if source.task and not source.examples:
            raise Fault(f"{path}.{name}.examples: 0 rows of task {source.task!r}; set how many to draw")
        _contradictions_of_sources(source.sources, path=f"{path}.{name}.sources")


def _contradictions_of_mixture(
    mixture: schema.Mixture, sources: Mapping[str, schema.Source], *, place: str, others: bool
) -> None:
    """`others`: there are sources beside `sources`, none of them with a weight."""
    path = f"{place}.mixture"
    if mixture.rates == "unimax" and mixture.budget is None:
        raise Fault(f"{path}.budget: not set; rates='unimax' divides it: how many {mixture.unit} are drawn in all")
    if mixture.rates != "unimax" and mixture.budget is not None:
        raise Fault(f"{path}.budget: {mixture.budget:g} has no effect with rates={mixture.rates!r}; set rates='unimax'")
    if mixture.rates != "proportional":
        unused = {"cap": mixture.cap is not None, "temperature": mixture.temperature != 1}
        unused |= {f"sources.{name}.scale": source.scale != 1 for name, source in sources.items()}
        if name := next((name for name, is_set in unused.items() if is_set), ""):
            place = place if name.startswith("sources.") else path
            raise Fault(f"{place}.{name}: has no effect with rates={mixture.rates!r}; remove it, or set 'proportional'")
    for name, source in sources.items():
        if source.weight is not None and source.scale != 1:
            raise Fault(
                f"{place}.sources.{name}.scale: has no effect beside weight={source.weight:g}; keep one of them"
            )
        inside = f"{place}.sources.{name}"  # the nested sources of a source, or its files
        _contradictions_of_mixture(source.mixture, source.sources, place=inside, others=not source.sources)
    own = {name: source.weight for name, source in sources.items()}
    _contradictions_of_weights(own, place=f"{place}.sources", others=others)
    starts: dict[int, str] = {}
    for name, stage in mixture.stages.items():
        if stage.start in starts:
            raise Fault(f"{path}.stages.{name}.start: {stage.start}, as {starts[stage.start]!r} has; give each its own")
        starts[stage.start] = name
        unknown = [member for member in stage.weights if member not in sources]
        if unknown and not others:  # otherwise the names of the files must be known first: data/recipe.py
            raise Fault(
                f"{path}.stages.{name}.weights.{unknown[0]}: no such source.{nearest(unknown[0], list(sources))} "
                f"Known: {', '.join(sources)}"
            )
        for member, weight in stage.weights.items():
            if not 0 <= weight < math.inf:
                raise Fault(
                    f"{path}.stages.{name}.weights.{member}: {weight:g} is not a weight; give a share, or 0 to leave it out"
                )
        _contradictions_of_weights({**own, **stage.weights}, place=f"{path}.stages.{name}.weights", others=others)


def _contradictions_of_weights(weights: Mapping[str, float | None], *, place: str, others: bool) -> None:
    given = math.fsum(weight for weight in weights.values() if weight is not None)
    without = [name for name, weight in weights.items() if weight is None]
    if without or others:
        if given >= 1:
            who = ", ".join([*without, *(["config.files"] if others else [])])
            raise Fault(
                f"{place}: the weights given add up to {given:g}, which leaves nothing for {who}; "
                "make them shares below 1 in all, or give every source a weight"
            )
    elif weights and not given:
        raise Fault(f"{place}: all weights are 0, so nothing is drawn; give one source a weight")


def _contradictions_of_limits(run: schema.Run) -> None:
    limits, policies = _limits(run.sources, "config.sources"), _policies(run.sources, "config.sources")
    for path, limit in limits.items():
        if run.mixture.exhausted == "repeat":
            raise Fault(
                f"{path}.max_epochs: {limit:g} has no effect while sources repeat; set --config.mixture.exhausted=stop "
                "to end the run there, or drop to go on without the source"
            )
    if run.mixture.exhausted != "repeat" and not limits:
        raise Fault(
            f"config.mixture.exhausted: {run.mixture.exhausted!r}, but no source has max_epochs; set some, e.g. "
            f"--config.sources.{next(iter(run.sources), 'NAME')}.max_epochs=1"
        )
    if policies:
        raise Fault(f"{policies[0]}: a run has one policy; set --config.mixture.exhausted instead")


def _limits(sources: Mapping[str, schema.Source], path: str) -> dict[str, float]:
    """Place -> passes at most, of every source and nested source that has a limit."""
    found: dict[str, float] = {}
    for name, source in sources.items():
        found |= {f"{path}.{name}": source.max_epochs} if source.max_epochs is not None else {}
        found |= _limits(source.sources, f"{path}.{name}.sources")
    return found


def _policies(sources: Mapping[str, schema.Source], path: str) -> list[str]:
    """Places of nested mixtures that say what happens when a source is exhausted."""
    found: list[str] = []
    for name, source in sources.items():
        found += [f"{path}.{name}.mixture.exhausted"] if source.mixture.exhausted != "repeat" else []
        found += _policies(source.sources, f"{path}.{name}.sources")
    return found


OPEN = (("parallel", "flags"),)  # groups of texts under names that no schema knows


# --- the command line -------------------------------------------------------------------------------------------------


def load(argv: Sequence[str], flag_values: flags.FlagValues, *, needs_data: bool = True) -> schema.Run:
    """Reads `--config=FILE.py` with its `--config.path=value` overrides, and the command's own flags, from `argv`.

    `flag_values` holds the command's own flags; they are parsed too. Raises Fault for anything a user got wrong; that no
    data is named, only where the command needs some.
    """
    argv, own = _own_names(argv)
    config_flags.DEFINE_config_file(
        "config", None, "the experiment: a Python file with get_config()", flag_values=flag_values, sys_argv=list(argv)
    )
    file = config_file(argv)
    known = _known_paths(file)
    for argument in argv[1:]:
        name = argument.split("=", 1)[0].lstrip("-")
        if name.startswith("config.") and not _is_known(name.removeprefix("config."), known):
            raise Fault(f"--{name}: no such setting in {file}.{_nearest_path(name, known)}")
    try:
        rest = flag_values(list(argv))
    except (flags.Error, AttributeError, TypeError, ValueError) as error:
        raise Fault(str(error)) from error
    if rest[1:]:
        raise Fault(f"{rest[1]!r}: not a flag; settings are written --config.name=value")
    config = flag_values.config.to_dict()
    for (group, setting), entries in own.items():
        config[group][setting] = {**config[group][setting], **entries}
    return freeze(config, needs_data=needs_data)


def _own_names(argv: Sequence[str]) -> tuple[list[str], dict[tuple[str, str], dict[str, str]]]:
    """The arguments without those that name something of the user's own in a group (OPEN), and those by their group.

    ml_collections takes no override of a name that the config file does not have.
    """
    own: dict[tuple[str, str], dict[str, str]] = {place: {} for place in OPEN}
    rest = []
    for argument in argv:
        name, equals, value = argument.lstrip("-").partition("=")
        parts = name.removeprefix("config.").split(".", 2)
        if name.startswith("config.") and equals and len(parts) == 3 and (parts[0], parts[1]) in own:
            own[parts[0], parts[1]][parts[2]] = value
        else:
            rest.append(argument)
    return rest, {place: entries for place, entries in own.items() if entries}


def config_file(argv: Sequence[str]) -> str:
    """The file that `--config` names."""
    for number, argument in enumerate(argv):
        if argument.startswith("--config="):
            return argument.removeprefix("--config=")
        if argument == "--config" and number + 1 < len(argv):
            return argv[number + 1]
    raise Fault("--config: missing; name an experiment, e.g. --config=configs/quickstart.py")


def _known_paths(file: str) -> list[str]:
    path = Path(file)
    if not path.is_file():
        here = sorted(str(found) for found in path.parent.glob("*.py")) if path.parent.is_dir() else []
        raise Fault(f"--config={file}: no such file.{nearest(file, here)}")
    return [name.replace(tree.SEPARATOR, ".") for name in tree.flatten(config_from(path).to_dict())]


def config_from(path: Path) -> config_dict.ConfigDict:
    """Runs a config file's `get_config()`. The file is code and trusted as such; whatever it raises names its line."""
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))  # so that a variant can import the experiment beside it
    try:
        config = runpy.run_path(str(path))["get_config"]()
    except Exception as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        place = f"{path}:{lines[-1]}" if lines else str(path)
        reason = str(error).strip("\"'").replace("\\'", "'").replace("\\n", ". ").replace("\n", ". ")
        raise Fault(f"{place}: {type(error).__name__}: {reason}") from error
    if not isinstance(config, config_dict.ConfigDict):
        raise Fault(f"{path}: get_config() gave a {type(config).__name__}; it should give a ConfigDict")
    return config


def _is_known(name: str, known: Sequence[str]) -> bool:
    return name in known or any(path.startswith(f"{name}.") for path in known)


def _nearest_path(name: str, known: Sequence[str]) -> str:
    wanted = name.removeprefix("config.")
    by_leaf = [path for path in known if path.rsplit(".", 1)[-1] == wanted.rsplit(".", 1)[-1]]
    if by_leaf:
        return f" Did you mean --config.{by_leaf[0]}?"
    close = difflib.get_close_matches(wanted, known, n=1, cutoff=0.5)
    return f" Did you mean --config.{close[0]}?" if close else f" Known: {', '.join(sorted(known))}"


# --- saved configs ----------------------------------------------------------------------------------------------------

# Settings that may differ between a run and its resumption: none of them changes what is computed.
FREE = (
    "run_dir",
    "allow_change",
    "workers",
    "data_dir",
    "cache_dir",
    "checkpoint/*",
    "log/*",
    "evaluation/*",
    "parallel/*",
    "optimizer/offload",
    "eval_files",
)


def to_json(run: schema.Run) -> str:
    """The run as JSON, in the order of the schema."""
    return json.dumps(dataclasses.asdict(run), indent=2) + "\n"


def from_json(text: str, *, path: str) -> schema.Run:
    """The inverse of `to_json`. `path` is named in errors."""
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise Fault(f"{path}: not JSON ({error}); the file is damaged") from error
    return freeze(values)


def differences(saved: schema.Run, wanted: schema.Run) -> list[str]:
    """Settings that shape the result and differ, as `steps: 100 -> 200`."""
    before, after = (tree.flatten(dataclasses.asdict(run)) for run in (saved, wanted))
    return [
        f"{path.replace(tree.SEPARATOR, '.')}: {before.get(path)!r} -> {after.get(path)!r}"
        for path in {**before, **after}
        if before.get(path) != after.get(path) and not tree.matches(path, FREE)
    ]
