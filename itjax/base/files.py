"""Files that are there whole or not at all, and folders that nobody else reads."""

import contextlib
import os
import shutil
import socket
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import IO

BUILDING = ".building"  # begins the names of folders that are being built


def write_whole(path: Path, content: str | bytes) -> None:
    """The file with all of the content, or the file as it was: a kill in between leaves no half."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = _part(path)
    _fill(part.open("wb"), content)
    part.replace(path)


def write_private(folder: Path, name: str, content: str | bytes) -> None:
    """The same of `folder/name`, which may be `folder/below/name`, in new folders that nobody else reads."""
    for above in reversed(Path(name).parents):
        private_folder(folder / above)
    path = folder / name
    part = _part(path)
    part.unlink(missing_ok=True)
    _fill(create_private(part), content)
    part.replace(path)


def private_folder(folder: Path) -> Path:
    """The folder, made for this user alone if it is new."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder


@contextlib.contextmanager
def building(shelf: Path) -> Iterator[Path]:
    """A new private folder on the shelf to build something in; gone afterwards, unless it was renamed.

    What builds that were killed on this machine left on the shelf is removed first.
    """
    host = f"{BUILDING}-{socket.gethostname()}-"
    for left in shelf.glob(f"{BUILDING}-*"):
        process = left.name.removeprefix(host).split("-")[0]
        if left.name.startswith(host) and process.isdigit() and not _is_running(int(process)):
            shutil.rmtree(left, ignore_errors=True)
    folder = shelf / f"{host}{os.getpid()}-{uuid.uuid4().hex}"
    folder.mkdir(mode=0o700)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def create_private(path: Path) -> IO[bytes]:
    """A new file that nobody else can read."""
    return open(path, "xb", opener=lambda name, flags: os.open(name, flags, 0o600))


def _part(path: Path) -> Path:
    return path.with_name(f"{path.name}.{os.getpid()}.part")


def _fill(file: IO[bytes], content: str | bytes) -> None:
    with file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
