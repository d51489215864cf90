"""What the manifest promises: every row that was read is kept or has a reason, and shares are counted, not assumed."""

import json

import pytest

from itjax.base.schema import Evaluation, Run, Source
from itjax.data import manifest, prepare
from itjax.data.loader import make_loader


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """`short`: 30 rows, 2 of them too long; `sums`: 3 of 4 examples are to be from it."""
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
    data = prepare.prepare(run, progress=lambda what, done, total: None)
    loader = make_loader(
        data.train, weights=data.weights, length=256, rows=2, steps=40, epochs=None, window=10, seed=0, packing=True,
        reduction="token", local_rows=range(2), workers=0,
    )  # fmt: skip
    path = manifest.write(folder / "run", data, loader)
    return json.loads(path.read_text()), loader


def test_every_row_is_kept_or_has_a_reason(found):
    short = found[0]["sources"]["short"]
    assert (short["rows_read"], short["kept"], short["dropped"]) == (30, 28, {"too long": 2})
    for source in found[0]["sources"].values():
        assert source["rows_read"] == source["kept"] + sum(source["dropped"].values())


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
