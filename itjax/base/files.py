"""Files that are there whole or not at all, and folders that nobody else reads."""

import os
from pathlib import Path
from typing import IO


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
