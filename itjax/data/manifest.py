"""What became of the data: for each source rows read, kept, dropped and why, its planned and realised share, its hashes.

The shares planned are those the config asks for; those realised are counted over every example the run will serve.
"""

import json
from pathlib import Path
from typing import Any

from itjax.base.files import write_whole
from itjax.data.cache import EncodedSource
from itjax.data.loader import Loader
from itjax.data.prepare import Data

UNITS = ("examples", "tokens", "trained_tokens")
FILE = "data_manifest.json"


def manifest(data: Data, loader: Loader) -> dict[str, Any]:
    """The whole account, ready for JSON; a source of which every row was dropped is there with no share.

    Held-out sources are listed apart: nothing of them is trained on.
    """
    plan = loader.report()
    served = plan.pop("sources")
    return {
        "plan": {"hash": loader.plan_hash, **plan},
        "tokenizer": {"size": data.tokenizer.size, "fingerprint": data.tokenizer.fingerprint()},
        "format": data.format.name,
        "sources": {source.name: _rows(source) | _shares(served[source.name]) for source in data.train}
        | {source.name: _rows(source) | _NOTHING for source in data.empty},
        "held_out": [
            {"source": part.name, "template_split": part.template_split} | _rows(part.encoded) for part in data.held
        ],
    }


def write(run_dir: str | Path, data: Data, loader: Loader) -> Path:
    """run_dir/data_manifest.json, whole or as it was."""
    path = Path(run_dir) / FILE
    write_whole(path, json.dumps(manifest(data, loader), indent=1) + "\n")
    return path


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


def _shares(served: dict[str, Any]) -> dict[str, Any]:
    return {
        "epochs": served["epochs"],
        **{unit: served[unit] for unit in UNITS},
        "planned_share": {unit: served[f"planned_share_{unit}"] for unit in UNITS},
        "realised_share": {unit: served[f"share_{unit}"] for unit in UNITS},
    }


_NO_SHARE = dict.fromkeys(UNITS, 0.0)
_NOTHING = {"epochs": 0.0, **dict.fromkeys(UNITS, 0), "planned_share": _NO_SHARE, "realised_share": _NO_SHARE}
