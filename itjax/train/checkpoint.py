"""State, data position, config and the account of the data in one commit: a step is on disk whole, or it is not there."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp

from itjax.base.freeze import Fault
from itjax.base.records import DataPosition
from itjax.base.schema import Checkpoint
from itjax.train.state import TrainState

BASE = "base"  # beside the settings: the fingerprint of the folder that frozen parameters come from
STATE, DATA, CONFIG, MANIFEST = "state", "data", "config", "data_manifest"


class Checkpoints:
    """The checkpoints of one run, below `run_dir/checkpoints`. Saving returns at once and writes behind the next steps."""

    def __init__(self, folder: Path, settings: Checkpoint):
        options = ocp.CheckpointManagerOptions(
            max_to_keep=settings.keep,
            enable_async_checkpointing=settings.asynchronous,
            cleanup_tmp_directories=True,  # what a killed save left behind
        )
        handlers = {
            STATE: ocp.StandardCheckpointHandler(),
            DATA: ocp.JsonCheckpointHandler(),
            CONFIG: ocp.JsonCheckpointHandler(),
            MANIFEST: ocp.JsonCheckpointHandler(),
        }
        registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
        registry.add(STATE, ocp.args.StandardSave, handlers[STATE])
        registry.add(STATE, ocp.args.StandardRestore, handlers[STATE])
        for item in (DATA, CONFIG, MANIFEST):
            registry.add(item, ocp.args.JsonSave, handlers[item])
            registry.add(item, ocp.args.JsonRestore, handlers[item])
        self.folder = folder
        self._manager = ocp.CheckpointManager(folder.absolute(), options=options, handler_registry=registry)

    def latest(self) -> int | None:
        """The newest committed step, or None."""
        return self._manager.latest_step()

    def save(
        self, state: TrainState, position: DataPosition, config: Mapping[str, Any], data_manifest: Mapping[str, Any]
    ) -> None:
        """Saves the state under its step number, and what it was trained on: see `itjax.data.manifest`.

        Raises what an earlier save that ran behind the steps came to.
        """
        step = position.step
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state),
                data=ocp.args.JsonSave(dataclasses.asdict(position)),
                config=ocp.args.JsonSave(config),
                data_manifest=ocp.args.JsonSave(data_manifest),
            ),
            force=True,  # without it a step that is not newer than the latest is declined in silence
        )

    def restore(self, step: int, like: TrainState) -> tuple[TrainState, DataPosition]:
        """The state of a committed step, with the shapes, dtypes and shardings of the abstract state `like`."""
        args = ocp.args.Composite(state=ocp.args.StandardRestore(like), data=ocp.args.JsonRestore())
        restored = self._manager.restore(step, args=args)
        return restored[STATE], DataPosition(**restored[DATA])

    def wait(self) -> None:
        """Returns when everything that was saved is committed."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, and lets go of the folder."""
        self._manager.close()


def steps(folder: Path) -> list[int]:
    """The committed steps of a run, the oldest first; the folder is only looked at, so the run may go on meanwhile."""
    return sorted(ocp.utils.checkpoint_steps(folder)) if folder.is_dir() else []


def config(folder: Path, step: int) -> dict[str, Any]:
    """The settings that a committed step was saved with."""
    with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as reader:
        return reader.restore(folder.absolute() / str(step) / CONFIG)


def check_base(folder: Path, step: int, now: str, *, way_out: str) -> None:
    """Raises Fault where a committed step was trained on another base than there is now, by the folders' fingerprints.

    An empty fingerprint is a base that is drawn from the seed.
    """
    then = config(folder, step).get(BASE, "")
    if then != now:
        raise Fault(
            f"{folder / str(step)}: was trained on the base {then or 'drawn from the seed'}, and it is "
            f"{now or 'drawn from the seed'} now, so its adapters would not fit; bring the folder back as it was, or {way_out}"
        )


def restore_part(folder: Path, step: int, like: Mapping[str, Any]) -> dict[str, Any]:
    """Parts of the state of a committed step: `{"params": ...}` of shapes with shardings; nothing else is read."""
    args = ocp.args.PyTreeRestore(
        item=like, restore_args=ocp.checkpoint_utils.construct_restore_args(like), partial_restore=True
    )
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        return reader.restore(folder.absolute() / str(step) / STATE, args=args)
