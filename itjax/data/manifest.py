"""What became of the data: for each source rows read, kept, dropped and why, its planned and realised share, its hashes.

The shares planned are those the config asks for; those realised are counted over every example the run will serve.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from itjax.base.files import write_whole
from itjax.base.schema import UNITS
from itjax.data.cache import EncodedSource
from itjax.data.loader import Loader
from itjax.data.prepare import Data

FILE = "data_manifest.json"
REPEATS = 4.0  # passes from which on repeated data is worth less than new data (arXiv 2305.16264)
DIFFERS = 0.15  # a share of the tokens so far from that of the examples is worth a word


def manifest(data: Data, loader: Loader) -> dict[str, Any]:
    """The whole account, ready for JSON; a source of which every row was dropped is there with no share.

    Stages are there where the shares change on the way. Held-out sources are listed apart: nothing of them is trained on.
    """
    plan = loader.report()
    served, stages = plan.pop("sources"), plan.pop("stages")
    told = {
        "plan": {"hash": loader.plan_hash, **plan},
        "tokenizer": {"size": data.tokenizer.size, "fingerprint": data.tokenizer.fingerprint()},
        "format": data.format.name,
        "sources": {source.name: _of_source(source, data) | _passes(served[source.name]) for source in data.train}
        | {source.name: _of_source(source, data) | _NOTHING for source in data.empty},
        "stages": [stage | {"sources": {n: _shares(s) for n, s in stage["sources"].items()}} for stage in stages],
        "held_out": [
            {"source": part.name, "template_split": part.template_split} | _rows(part.encoded) for part in data.held
        ],
        **data.gathered.account(),
    }
    told |= {"warnings": [*warnings(told), *_not_reached(loader)]}
    return told | {"hash": hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()}


def write(run_dir: str | Path, told: Mapping[str, Any]) -> Path:
    """run_dir/data_manifest.json, whole or as it was."""
    path = Path(run_dir) / FILE
    write_whole(path, json.dumps(told, indent=1) + "\n")
    return path


def warnings(told: Mapping[str, Any]) -> Iterator[str]:
    """What of a mixture may not be what was meant, a sentence each."""
    unit, other = told["plan"]["unit"], "trained_tokens" if told["plan"]["unit"] == "tokens" else "tokens"
    if told["plan"]["ended_by"]:
        yield f"the data ends before the epochs asked for: {told['plan']['ended_by']}"
    for name, source in told["sources"].items():
        shares = source["realised_share"]
        if not source["examples"]:
            yield f"{name} is not drawn at all"
        elif abs(shares[unit] - shares[other]) >= DIFFERS:
            yield (
                f"{name} is {shares[unit]:.1%} of the {_words(unit)} and {shares[other]:.1%} of the {_words(other)}; "
                f"weights are shares of the {_words(unit)} (mixture.unit)"
            )
        if source["epochs"] > REPEATS:
            phrasings = f", in {source['editions']} phrasings" if source["editions"] > 1 else ""
            limit = "" if source["max_epochs"] else "; max_epochs of the source limits that"
            yield f"{name} is seen {source['epochs']:.1f} times{phrasings}{limit}"


def _not_reached(loader: Loader) -> Iterator[str]:
    for start in loader.recipe.starts:
        if start >= loader.num_steps:
            stage = loader.recipe.stage(start)
            yield f"stage {stage} would begin at step {start + 1:,}, after the last step {loader.num_steps:,}"


def _words(unit: str) -> str:
    return unit.replace("_", " ")


def _of_source(source: EncodedSource, data: Data) -> dict[str, Any]:
    """All rows of a source that could have been trained on, those among them that were dropped before encoding.

    kept + dropped = rows_read, where rows have one phrasing; of more, each phrasing of a row counts as kept or dropped.
    """
    told, before = _rows(source), data.gathered.account_of(source.name)
    dropped = Counter(before.pop("dropped"))
    told["rows_read"] += dropped.total()
    return told | before | {"dropped": dict(dropped + Counter(told["dropped"]))}


def _rows(source: EncodedSource) -> dict[str, Any]:
    report = source.report
    return {
        "rows_read": report["rows"],
        "kept": report["kept"],
        "dropped": dict(report["dropped"]),
        "truncated": report["truncated"],
        "kept_tokens": report["tokens"],
        "kept_trained_tokens": report["trained_tokens"],
        "fingerprint": source.fingerprint,
    }


def _passes(served: Mapping[str, Any]) -> dict[str, Any]:
    return {name: served[name] for name in ("epochs", "editions", "max_epochs")} | _shares(served)


def _shares(served: Mapping[str, Any]) -> dict[str, Any]:
    return {
        **{unit: served[unit] for unit in UNITS},
        "planned_share": {unit: served[f"planned_share_{unit}"] for unit in UNITS},
        "realised_share": {unit: served[f"share_{unit}"] for unit in UNITS},
    }


_NO_SHARE = dict.fromkeys(UNITS, 0.0)
_NOTHING: dict[str, Any] = {
    "epochs": 0.0,
    "editions": 0,
    "max_epochs": None,
    **dict.fromkeys(UNITS, 0),
    "planned_share": _NO_SHARE,
    "realised_share": _NO_SHARE,
}
