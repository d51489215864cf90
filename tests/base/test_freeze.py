"""A config file and its overrides become one checked Run; whatever is wrong is one message that helps."""

import pytest
from absl import flags

from itjax.base import freeze
from itjax.base.schema import Mixture, Run, Source, Stage

FILE = """
from itjax.base.freeze import thaw
from itjax.base.schema import Run, Source

def get_config():
    return thaw(Run(steps=3, sources={"a": Source(task="triage", examples=5)}))
"""


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "experiment.py"
    path.write_text(FILE)
    return str(path)


def load(*arguments: str) -> Run:
    return freeze.load(["command", *arguments], flags.FlagValues())


def test_overrides_reach_nested_and_unset_settings(config):
    run = load(
        f"--config={config}",
        "--config.optimizer.learning_rate=1",
        "--config.architecture.layers=2",
        "--config.sources.a.weight=2.5",
        "--config.optimizer.no_decay='a','b'",
    )
    assert run.optimizer.learning_rate == 1.0
    assert run.architecture.layers == 2
    assert run.sources["a"] == Source(task="triage", examples=5, weight=2.5)
    assert run.optimizer.no_decay == ("a", "b")


def test_options_of_the_compiler_have_names_that_only_it_knows(config):
    run = load(
        f"--config={config}", "--config.parallel.flags.xla_a=true", "--config.parallel.flags.xla_b=", "--config.steps=7"
    )
    assert run.parallel.flags == {"xla_a": "true", "xla_b": ""}
    assert run.steps == 7


WRONG = {
    "--config.setps=5": "--config.setps: no such setting in .*Did you mean --config.steps",
    "--config.learning_rate=5": "Did you mean --config.optimizer.learning_rate",
    "--config.sources.a.wait=5": "Did you mean --config.sources.a.weight",
    "--config.optimizer.learning_rate=nan": "config.optimizer.learning_rate: nan is not a finite number",
    "--config.optimizer.learning_rate=-1": "config.optimizer.learning_rate: -1.0 is out of range; it must be above 0",
    "--config.optimizer.b2=1": "config.optimizer.b2: 1.0 is out of range; it must be below 1",
    "--config.rows=1.5": "config.rows=1.5: invalid literal for int",
    "--config.rows=many": "config.rows=many: invalid literal for int",
    "--config.rows=0": "config.rows: 0 is out of range; it must be at least 1",
    "--config.loss.reduction=tokens": "config.loss.reduction: 'tokens' is not a choice. Did you mean 'token'",
    "--config.remat=some": "config.remat: 'some' is not a choice. .*Choices: none, dots, narrow, attention, full, offload",
    "--config.epochs=2": "steps=3 and epochs=2.0 are both set",
    "--config.steps=0": "neither steps nor epochs is set",
    "--config.accumulate=3": "8 rows do not divide into 3 micro-batches; try --config.rows=9",
    "--config.sources.a.files=x.jsonl": "config.sources.a: set one of files, task and sources",
    "--config.sources.a.examples=0": "config.sources.a.examples: 0 rows",
    "--config.parallel.fsdp=-1": "data and fsdp are both -1",
    "--config.parallel.tensor=0": "config.parallel.tensor: 0 devices",
    "--config.optimizer=3": "config.optimizer=3",
    "--steps=5": "Unknown command line flag 'steps'",
    "steps=5": "'steps=5': not a flag",
}


@pytest.mark.parametrize("argument", WRONG)
def test_a_wrong_setting_is_named_with_the_way_out(config, argument):
    with pytest.raises(freeze.Fault, match=WRONG[argument]):
        load(f"--config={config}", argument)


def test_a_missing_file_names_the_nearest(config):
    with pytest.raises(freeze.Fault, match=r"experimnt.py: no such file. Did you mean '.*experiment.py'"):
        load(f"--config={config.replace('experiment', 'experimnt')}")


def test_no_config_at_all_says_what_to_write():
    with pytest.raises(freeze.Fault, match="--config: missing; name an experiment"):
        load("--rows=3")


@pytest.mark.parametrize(
    "line, message",
    [
        ("config.setps = 4", r"wrong.py:4: AttributeError: .*Did you mean \"steps\""),
        ("config.steps = 'four'", "wrong.py:4: TypeError"),
        ("1 / 0", "wrong.py:4: ZeroDivisionError"),
    ],
)
def test_a_fault_inside_a_config_file_names_its_line(tmp_path, line, message):
    path = tmp_path / "wrong.py"
    path.write_text(
        f"from itjax.base import freeze, schema\ndef get_config():\n  config = freeze.thaw(schema.Run())\n  {line}\n"
    )
    with pytest.raises(freeze.Fault, match=message):
        load(f"--config={path}")


def test_a_config_survives_json(config):
    run = load(f"--config={config}")
    assert freeze.from_json(freeze.to_json(run), path="config.json") == run


def test_differences_name_what_shapes_the_result_and_nothing_else(config):
    run = load(f"--config={config}")
    same = load(f"--config={config}", "--config.log.every=7", "--config.parallel.fsdp=4", "--config.run_dir=elsewhere")
    other = load(f"--config={config}", "--config.optimizer.b1=0.5", "--config.sources.a.examples=6")
    assert freeze.differences(run, same) == []
    assert freeze.differences(run, other) == ["sources.a.examples: 5 -> 6", "optimizer.b1: 0.9 -> 0.5"]


def mixed(mixture=None, *, files="", a=None, b=None):
    """A run of two sources; `a` and `b` are their settings beside the task."""
    sources = {name: Source(task="triage", examples=5, **(more or {})) for name, more in (("a", a), ("b", b))}
    return Run(steps=3, files=files, sources=sources, mixture=mixture or Mixture())


def late(**weights):
    return Mixture(stages={"late": Stage(2, weights)})


def nested(mixture, **inner):
    group = Source(sources={"c": Source(task="triage", examples=5), "d": Source(task="triage", examples=5, **inner)},
                   mixture=mixture)  # fmt: skip
    return Run(steps=3, sources={"a": Source(task="triage", examples=5), "g": group})


@pytest.mark.parametrize(
    "run, message",
    [
        (mixed(Mixture(rates="unimax")), "config.mixture.budget: not set; rates='unimax' divides it: how many examples"),
        (mixed(Mixture(budget=9)), "config.mixture.budget: 9 has no effect with rates='proportional'"),
        (mixed(Mixture(rates="equal", cap=9)), "config.mixture.cap: has no effect with rates='equal'"),
        (mixed(Mixture(rates="equal", temperature=2)), "config.mixture.temperature: has no effect"),
        (mixed(Mixture(rates="equal"), b={"scale": 2.0}), "config.sources.b.scale: has no effect with rates='equal'"),
        (mixed(a={"scale": 2.0, "weight": 1.0}), "config.sources.a.scale: has no effect beside weight=1"),
        (mixed(a={"weight": 1.5}), "config.sources: the weights given add up to 1.5, which leaves nothing for b"),
        (mixed(files="x", a={"weight": 0.5}, b={"weight": 0.5}), "add up to 1, which leaves nothing for config.files"),
        (mixed(late(b=1.0)), "config.mixture.stages.late.weights: the weights given add up to 1, .* nothing for a"),
        (mixed(late(a=0.0, b=0.0)), "config.mixture.stages.late.weights: all weights are 0"),
        (mixed(late(a=-1.0)), "config.mixture.stages.late.weights.a: -1 is not a weight"),
        (mixed(late(aa=0.5)), "config.mixture.stages.late.weights.aa: no such source. Did you mean 'a'.* Known: a, b"),
        (mixed(Mixture(stages={"x": Stage(2), "y": Stage(2)})), "config.mixture.stages.y.start: 2, as 'x' has"),
        (mixed(a={"max_epochs": 2.0}), "config.sources.a.max_epochs: 2 has no effect while sources repeat; set --config"),
        (mixed(Mixture(exhausted="drop")), "config.mixture.exhausted: 'drop', but no source has max_epochs"),
        (nested(Mixture(rates="unimax")), "config.sources.g.mixture.budget: not set"),
        (nested(Mixture(stages={"x": Stage(1, {"a": 0.5})})), "config.sources.g.mixture.stages.x.weights.a: no such source"),
        (nested(Mixture(exhausted="drop")), "config.sources.g.mixture.exhausted: a run has one policy"),
        (nested(Mixture(), weight=1.0), "config.sources.g.sources: the weights given add up to 1, .* nothing for c"),
        (nested(Mixture(), max_epochs=1.0), "config.sources.g.sources.d.max_epochs: 1 has no effect"),
    ],
)  # fmt: skip
def test_a_mixture_that_contradicts_itself_is_refused(run, message):
    with pytest.raises(freeze.Fault, match=message):
        freeze.contradictions(run)


@pytest.mark.parametrize(
    "run",
    [
        mixed(Mixture(unit="tokens", cap=9, temperature=2, exhausted="drop"), a={"max_epochs": 2.0, "scale": 3.0}),
        mixed(Mixture(rates="unimax", budget=9, stages={"x": Stage(2, {"a": 0.0}), "y": Stage(5, {"a": 0.9})})),
        mixed(late(files=0.5), files="x"),
        nested(Mixture(unit="tokens", rates="equal", stages={"x": Stage(1, {"c": 0.5})})),
    ],
)
def test_a_mixture_that_can_be_followed_is_taken_and_survives_json(run):
    freeze.contradictions(run)
    assert freeze.from_json(freeze.to_json(run), path="config.json") == run
    assert freeze.freeze(freeze.thaw(run).to_dict()) == run
