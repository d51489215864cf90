"""What the manifest promises: every row that was read is kept or has a reason, and shares are counted, not assumed."""

import dataclasses
import json

import pytest

from itjax.base.schema import UNITS, Evaluation, Mixture, Run, Source, Stage
from itjax.data import manifest, prepare, recipe, rows
from itjax.data.loader import make_loader


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """`short`: 30 rows, 2 of them too long; `sums`: 3 of 4 examples are to be from it; of `long` nothing is left."""
    folder = tmp_path_factory.mktemp("manifest")
    texts = ["word " * (400 if number in (3, 4) else 3) for number in range(30)]
    lines = [json.dumps({"prompt": f"Say {number}", "completion": text}) for number, text in enumerate(texts)]
    (folder / "short.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "long.jsonl").write_text(lines[3] + "\n")
    run = Run(
        sources={
            "short": Source(files=str(folder / "short.jsonl"), weight=1.0),
            "long": Source(files=str(folder / "long.jsonl")),
            "sums": Source(task="arithmetic", examples=50, weight=3.0),
        },
        vocab_size=300,
        length=256,
        cache_dir=str(folder),
        evaluation=Evaluation(examples=0),
    )
    return run, prepare.prepare(run, progress=lambda what, done, total: None), folder


def loader_of(run, data, mixture=None, *, steps=40, limits=()):
    """The loader of these sources, `long` included although nothing is left of it, in rows of 256."""
    sources = {
        name: dataclasses.replace(source, max_epochs=dict(limits).get(name)) for name, source in run.sources.items()
    }
    root = recipe.tree(sources, mixture or Mixture(), opened={name: [name] for name in sources}, others=())
    return make_loader(
        data.train, weights=recipe.resolve(root, {source.name: rows.size(source) for source in data.train}),
        length=256, rows=2, steps=steps, epochs=None if steps else 50, window=10, seed=0, packing=True,
        reduction="token", local_rows=range(2), workers=0,
    )  # fmt: skip


@pytest.fixture(scope="module")
def found(prepared):
    run, data, folder = prepared
    loader = loader_of(run, data)
    path = manifest.write(folder / "run", manifest.manifest(data, loader))
    return json.loads(path.read_text()), loader


def test_every_row_is_kept_or_has_a_reason(found):
    short = found[0]["sources"]["short"]
    assert (short["rows_read"], short["kept"], short["dropped"]) == (30, 28, {"too long": 2})
    for source in found[0]["sources"].values():
        assert source["rows_read"] == source["kept"] + sum(source["dropped"].values())


def test_rows_that_cannot_be_read_are_dropped_from_their_source_with_the_reason(tmp_path):
    good = [json.dumps({"prompt": f"Say {number}", "completion": "a word"}) for number in range(19)]
    (tmp_path / "mixed.jsonl").write_text("\n".join([*good, "{", "[1]"]) + "\n")
    (tmp_path / "clean.jsonl").write_text("\n".join(good) + "\n")
    run = Run(
        data_dir=str(tmp_path), files="mixed.jsonl,clean.jsonl", cache_dir=str(tmp_path), vocab_size=300, length=256,
        steps=2, bad_rows="skip", max_bad_rows=0.2, evaluation=Evaluation(examples=3),
    )  # fmt: skip
    data = prepare.prepare(run, progress=lambda what, done, total: None)
    told = manifest.manifest(data, prepare.loader(run, data, local_rows=range(run.rows), workers=0))["sources"]
    assert told["mixed"]["dropped"] == {"not JSON": 1, "the row is not an object": 1}
    assert [told["mixed"][name] for name in ("rows_read", "kept", "held_out")] == [18, 16, 3]
    assert [told["clean"][name] for name in ("rows_read", "kept", "held_out")] == [16, 16, 3]
    assert not told["clean"]["dropped"]


def test_realised_shares_are_those_of_the_batches(found):
    """Counted here from the batches themselves."""
    told, loader = found
    counts = {"short": 0, "sums": 0}
    for step in range(loader.num_steps):
        for source, _, _ in loader.examples(step):
            counts[source] += 1
    for name, count in counts.items():
        assert told["sources"][name]["examples"] == count
        assert told["sources"][name]["realised_share"]["examples"] == pytest.approx(count / sum(counts.values()))
    tokens = sum(int((loader.batch(step).segments_BT > 0).sum()) for step in range(loader.num_steps))
    assert sum(source["tokens"] for source in told["sources"].values()) == tokens == told["plan"]["tokens"]


def test_planned_shares_are_those_asked_for(found):
    shares = {name: source["planned_share"]["examples"] for name, source in found[0]["sources"].items()}
    assert shares == {"short": 0.25, "long": 0, "sums": 0.75}
    for name, share in shares.items():
        assert found[0]["sources"][name]["realised_share"]["examples"] == pytest.approx(share, abs=0.05)


def test_a_source_that_lost_all_rows_is_told(found):
    lost = found[0]["sources"]["long"]
    assert (lost["rows_read"], lost["kept"], lost["dropped"]) == (1, 0, {"too long": 1})
    assert (lost["examples"], lost["realised_share"]["tokens"]) == (0, 0)


def test_hashes_name_the_plan_and_the_data(found):
    told, loader = found
    assert told["plan"]["hash"] == loader.plan_hash
    assert len({source["fingerprint"] for source in told["sources"].values()}) == 3


def test_the_unit_and_the_rule_are_told(found):
    plan = found[0]["plan"]
    assert (plan["unit"], plan["rule"], plan["ended_by"]) == ("examples", "weights given", "")
    assert found[0]["stages"] == []


STAGES = {
    "sums only": Stage(0, {"short": 0.0}),
    "late": Stage(10, {"short": 1.0, "sums": 1.0}),
    "never": Stage(100, {"short": 0.1}),
}


def test_stages_are_told_with_their_steps_as_metrics_count_them(prepared):
    run, data, _ = prepared
    loader = loader_of(run, data, Mixture(unit="tokens", stages=STAGES))
    told = manifest.manifest(data, loader)
    first, late = told["stages"]
    assert (first["stage"], first["first_step"], first["last_step"]) == ("sums only", 1, 10)
    assert (late["stage"], late["first_step"], late["last_step"]) == ("late", 11, 40)
    assert first["sources"]["sums"]["realised_share"] == dict.fromkeys(UNITS, 1.0)
    assert late["sources"]["short"]["planned_share"]["tokens"] == 0.5
    assert late["sources"]["short"]["realised_share"]["tokens"] == pytest.approx(0.5, abs=0.01)
    for unit in UNITS:
        for name in ("short", "sums"):
            assert first["sources"][name][unit] + late["sources"][name][unit] == told["sources"][name][unit]
    assert "stage never would begin at step 101, after the last step 40" in told["warnings"]


def test_planned_shares_of_a_staged_run_are_those_of_its_stages_together(prepared):
    run, data, _ = prepared
    told = manifest.manifest(data, loader_of(run, data, Mixture(stages=STAGES)))
    first, late = told["stages"]
    expected = late["examples"] * 0.5 / (first["examples"] + late["examples"])
    assert told["sources"]["short"]["planned_share"]["examples"] == pytest.approx(expected)


def test_warnings_name_what_may_not_be_meant(prepared):
    run, data, _ = prepared
    stop = Mixture(exhausted="stop")
    told = manifest.manifest(data, loader_of(run, data, stop, steps=None, limits={"sums": 6.0}))
    assert told["plan"]["ended_by"] == "sums has had its max_epochs=6 (300 examples)"
    assert told["sources"]["sums"]["max_epochs"] == 6
    assert {
        "the data ends before the epochs asked for: sums has had its max_epochs=6 (300 examples)",
        "sums is seen 6.0 times",
        "long is not drawn at all",
    } < set(told["warnings"])
    again = manifest.manifest(data, loader_of(run, data, steps=400))["warnings"]
    assert any("times; max_epochs of the source limits that" in warning for warning in again)


def test_a_share_of_the_tokens_far_from_that_of_the_examples_is_told(found):
    source = found[0]["sources"]["short"]
    shares = {"examples": 0.5, "tokens": 0.89, "trained_tokens": 0.9}
    told = {"plan": found[0]["plan"], "sources": {"mails": source | {"realised_share": shares, "epochs": 1.0}}}
    assert list(manifest.warnings(told)) == [
        "mails is 50.0% of the examples and 89.0% of the tokens; weights are shares of the examples (mixture.unit)"
    ]
