"""What every process of a run must have alike, as facts that `parallel/cluster.py` compares."""

import dataclasses
import hashlib
import platform
from pathlib import Path

import jax
import jaxlib

import itjax
from itjax.base import tree
from itjax.base.schema import Run
from itjax.data.loader import Loader
from itjax.train import checkpoint

OWN = ("config.data_dir", "config.cache_dir", "config.workers")  # may differ from process to process
SETTINGS_WAIT = 120  # seconds from the first process that comes to compare its settings to the last


def settings(run: Run) -> dict[str, str]:
    """Before data is read: every setting, and the versions that it is run with."""
    flat = tree.flatten(dataclasses.asdict(run))
    chosen = {f"config.{path.replace(tree.SEPARATOR, '.')}": repr(value) for path, value in flat.items()}
    return {
        **{name: value for name, value in chosen.items() if name not in OWN},
        "itjax": f"{itjax.__version__} ({digest(Path(itjax.__file__).parent)})",
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        "python": platform.python_version(),
    }


def digest(package: Path) -> str:
    """A short name for the source of a package: two clones of one version may differ."""
    found = hashlib.blake2b(digest_size=4)
    for file in sorted(package.rglob("*.py")):
        found.update(file.read_bytes())
    return found.hexdigest()


def beginning(run: Run, loader: Loader, *, base: str) -> dict[str, str]:
    """Before the first step: the data to its last step, what training goes on from, and the published weights' name."""
    saved = checkpoint.steps(Path(run.run_dir) / "checkpoints")
    return {
        "steps": str(loader.num_steps),
        "data": loader.plan_at(loader.num_steps),
        "checkpoint": str(saved[-1] if saved else "none"),
        "model folder": base or "none",
    }
