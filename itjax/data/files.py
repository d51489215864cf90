"""Which files are meant, and their bytes at hand: patterns to paths, far and packed files to private copies.

    data/*.jsonl.gz, gs://bucket/chat     ->  names of sources, each with its shards
    gs://bucket/chat/a.jsonl.zst          ->  ~/.cache/itjax/files/a-5f0c-91d2/content, made once

A copy is keyed by what tells that a file changed (size, times, tag of the store), so it is never older than its original.
"""

import contextlib
import fcntl
import functools
import gzip
import hashlib
import os
import re
import shutil
import stat
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from glob import escape, glob
from pathlib import Path, PurePosixPath
from typing import IO, Any

import fsspec
import zstandard

from itjax.base.files import building, create_private, private_folder

BLOCK = 1 << 20
LONGEST_ROW = 64 << 20  # bytes
MOST_UNPACKED = 200  # times the size of a packed file, once that is more than a longest row
ZSTD_PIECE = 2048  # packed bytes at a time: even the densest unpack to no more than a longest row
OPEN_AT_ONCE = 16
ROWS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".array_record", ".arrayrecord")
PACKED = {".gz": b"\x1f\x8b", ".zst": b"\x28\xb5\x2f\xfd"}  # ending -> first bytes
ENDINGS = (*ROWS, *(f"{ending}{packed}" for ending in ROWS[:5] for packed in PACKED))
OTHER_PACKS = {b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"PK\x03\x04": "zip"}
LOGIN = re.compile(r"://[^/@]+@")
SIGNATURE = re.compile(r"(?i)([?&][^=&]*(?:token|sig|key|secret|password|credential)[^=&]*=)[^&]*")
SHARD = re.compile(r"-\d{5}-of-\d{5}$")
DRIVERS = {"gs": "gcsfs", "gcs": "gcsfs", "s3": "s3fs", "s3a": "s3fs", "http": "aiohttp", "https": "aiohttp"}
DRIVERS |= {"az": "adlfs", "abfs": "adlfs", "hf": "huggingface_hub"}
CACHE_ADVICE = "set cache_dir or XDG_CACHE_HOME to a folder with room that you may write to"


# ---------------------------------------------------------------------------------------------- which files


def find(patterns: str, *, data_dir: str = "", place: str = "files") -> dict[str, list[str]]:
    """Names of sources and the paths of each: one file, or the shards `NAME-00000-of-00002` that belong together.

    `place` is where the patterns stand in a config, for errors to name it.
    """
    paths: dict[str, None] = {}
    for pattern in filter(None, below(data_dir, patterns).split(",")):
        found = list(_far(pattern) if is_far(pattern) else _near(pattern))
        if not found:
            raise ValueError(
                f"{place}: nothing matches {shown(pattern)!r}; check the path (endings read: {', '.join(ENDINGS)})"
            )
        paths.update(dict.fromkeys(found))
    if not paths:
        raise ValueError(f"{place}: {patterns!r} names no file; give globs or directories separated by commas")
    groups: dict[str, list[str]] = {}
    for path in paths:
        groups.setdefault(_shards(path) or shown(path), []).append(path)
    return dict(zip(_names(list(groups)), groups.values(), strict=True))


def _shards(path: str) -> str:
    """The shards that a file is one of, as if they were one file without an ending; empty for a file of its own."""
    whole = _without_ending(shown(path))
    return SHARD.sub("", whole) if SHARD.search(whole) else ""


def _without_ending(path: str) -> str:
    folder, _, name = path.rpartition("/")
    return f"{folder}/{stem(name)}"


def below(data_dir: str, patterns: str) -> str:
    """Comma-separated patterns, those that are relative below `data_dir`."""
    stripped = filter(None, (pattern.strip() for pattern in patterns.split(",")))
    return ",".join(
        pattern if _is_whole(pattern, data_dir) else f"{data_dir.rstrip('/')}/{pattern}" for pattern in stripped
    )


def _is_whole(pattern: str, data_dir: str) -> bool:
    return not data_dir or is_far(pattern) or pattern.startswith(("/", "~"))


def is_far(path: str) -> bool:
    """Whether the path is an address (`gs://...`) that a driver reads."""
    return "://" in path


def shown(path: str) -> str:
    """The path without what must not be seen in messages, keys and names: a password, the signature of a link."""
    return SIGNATURE.sub(r"\1...", LOGIN.sub("://...@", path)) if is_far(path) else path


def stem(path: str) -> str:
    """The file's name without what says how it is written: `data/chat.jsonl.gz` -> `chat`."""
    name = path.rpartition("/")[2]
    ending = next((e for e in sorted(ENDINGS, key=len, reverse=True) if name.endswith(e)), PurePosixPath(name).suffix)
    return name.removesuffix(ending) or name


def _near(pattern: str) -> Iterator[str]:
    exact = Path(pattern).expanduser()
    for path in [exact] if exact.exists() else map(Path, sorted(glob(str(exact), recursive=True))):
        if path.is_dir():
            inside = (file.relative_to(path) for file in path.rglob("*") if file.is_file())
            yield from (str(path / file) for file in sorted(inside) if _is_of_rows(file.parts))
        elif path.is_file():
            yield str(path)
        else:
            raise ValueError(f"{path}: not a regular file; give files that can be read more than once")


def _far(pattern: str) -> Iterator[str]:
    system, path = _system(pattern)
    with _told(pattern):
        if any(character in path for character in ("*[" if pattern.startswith("http") else "*?[")):
            found = [place for place in sorted(system.glob(path)) if system.isfile(place)]
        elif system.isdir(path):
            found = [file for file in sorted(system.find(path)) if _is_of_rows(_below(file, path))]
        else:
            found = [path] if system.exists(path) else []
    for file in found:
        yield str(file) if _is_local(system) else system.unstrip_protocol(file)


def _is_of_rows(parts: tuple[str, ...]) -> bool:
    """Whether a folder's file is meant when the folder is: by its ending, and nothing hidden."""
    return parts[-1].endswith(ENDINGS) and not any(part.startswith(".") for part in parts)


def _below(file: str, folder: str) -> tuple[str, ...]:
    return PurePosixPath(file.strip("/")).relative_to(folder.strip("/")).parts


def _names(groups: list[str]) -> list[str]:
    """The shortest ends of the paths that tell them apart: `alpaca`, or `en-alpaca` and `de-alpaca`.

    Files of a folder that differ in their endings alone keep them: `alpaca.csv` and `alpaca.jsonl`.
    """
    stems = [_without_ending(group) for group in groups]
    ends = [short if stems.count(short) == 1 else group for short, group in zip(stems, groups, strict=True)]
    parts = [[part.strip(":") for part in end.split("/") if part.strip(":")] for end in ends]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["-".join(part[-depth:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{'-'.join(part)}-{number}" for number, part in enumerate(parts, start=1)]


# ---------------------------------------------------------------------------------------------- near and far


def _system(address: str) -> tuple[Any, str]:
    """The driver of an address, and the path as the driver has it."""
    protocol = address.partition("://")[0]
    with _told(address):
        try:
            return fsspec.core.url_to_fs(address)
        except ImportError as error:
            package = DRIVERS.get(protocol, f"the fsspec driver of {protocol}://")
            raise ValueError(f"{shown(address)}: {protocol}:// needs {package}; pip install {package}") from error


@contextlib.contextmanager
def _told(address: str) -> Iterator[None]:
    """What goes wrong far away, as one message that names the address."""
    try:
        yield
    except Exception as error:  # drivers raise what they like
        reason = (str(error) or type(error).__name__).replace(address, shown(address))
        if isinstance(error, ValueError):
            raise ValueError(reason if reason.startswith(shown(address)) else f"{shown(address)}: {reason}") from None
        advice = "check the address and your credentials"
        raise ValueError(f"{shown(address)}: cannot be read ({reason}); {advice}") from None


def _is_local(system: Any) -> bool:
    return isinstance(system, fsspec.implementations.local.LocalFileSystem)


def look_up(path: str) -> str:
    """What is known of a file without reading it: changes when the file does."""
    if is_far(path):
        system, place = _system(path)
        with _told(path):
            told = {str(key): str(value) for key, value in system.info(place).items()}
        return repr(sorted((key, value) for key, value in told.items() if key not in ("name", "url")))
    return repr((*state(path), os.stat(path).st_ctime_ns))


def state(path: str) -> tuple[int, int, int]:
    """Size, time of the last change and number of a file on this machine."""
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        raise ValueError(f"{path}: no such file") from None
    if not stat.S_ISREG(found.st_mode):
        raise ValueError(f"{path}: not a regular file; give files that can be read more than once")
    return found.st_size, found.st_mtime_ns, found.st_ino


@dataclass(frozen=True)
class Bytes:
    """A file on this machine, refused once it is no longer the file that was opened."""

    path: str  # where the bytes are
    origin: str  # the file that they are of: itself, or what it is a copy of
    seen: tuple[int, int, int] | None  # state of the origin; None where it is far away

    @property
    def size(self) -> int:
        return os.stat(self.path).st_size

    def read(self, start: int, size: int) -> bytes:
        """Bytes at a place, from one of a few files kept open."""
        self.check()
        try:
            descriptor = _descriptor(self.path, self.seen)
        except OSError as error:
            raise ValueError(f"{self.origin}: cannot be read ({error.strerror}); start again") from None
        raw = os.pread(descriptor.number, size, start)
        while len(raw) < size:
            more = os.pread(descriptor.number, size - len(raw), start + len(raw))
            if not more:
                raise ValueError(f"{self.origin}: the file became shorter while it was in use; start again")
            raw += more
        return raw

    def check(self) -> None:
        if self.seen is not None and state(self.origin) != self.seen:
            raise ValueError(f"{self.origin}: the file changed while it was in use; start again")


class _Descriptor:
    """An open file; closed when the last who reads it lets go."""

    def __init__(self, path: str) -> None:
        self.number = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if hasattr(self, "number"):
            os.close(self.number)


@functools.lru_cache(maxsize=OPEN_AT_ONCE)
def _descriptor(path: str, seen: tuple[int, int, int] | None) -> _Descriptor:
    return _Descriptor(path)


# ---------------------------------------------------------------------------------------------- private copies


def default_dir() -> Path:
    """Where copies and indices are kept: a folder of the user's cache that nobody else can read."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "itjax"


def keep(cache_dir: Path, path: str, facts: str, *, how: str, build: Callable[[Path], None]) -> Path:
    """The folder kept for a file in its present state, built by `build` if it is not there; older states are deleted.

    Whoever starts at the same time waits and finds it built.
    """
    shelf = _private(_private(cache_dir) / "files")
    label = re.sub(r"[^\w.-]", "_", stem(path))[:60]
    family = f"{label}-{_short(shown(path), how)}"
    place = shelf / f"{family}-{_short(facts)}"
    if place.exists():
        return place
    with _alone(shelf / f".{family}.lock"):
        if not place.exists():
            for older in shelf.glob(f"{escape(family)}-*"):
                shutil.rmtree(older, ignore_errors=True)
            _build(shelf, place, build)
    return place


def _private(folder: Path) -> Path:
    try:
        return private_folder(folder)
    except OSError as error:
        raise ValueError(f"{folder}: cannot be made ({error.strerror}); {CACHE_ADVICE}") from None


def _short(*texts: str) -> str:
    return hashlib.blake2b("\n".join(texts).encode("utf-8", "surrogateescape"), digest_size=8).hexdigest()


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Nobody else on this machine is in here; a lock ends with its process."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise ValueError(f"{path.parent}: cannot be written ({error.strerror}); {CACHE_ADVICE}") from None
    try:
        with contextlib.suppress(OSError):  # file systems without locks: two may build, one rename wins
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _build(shelf: Path, place: Path, build: Callable[[Path], None]) -> None:
    try:
        with building(shelf) as folder:
            build(folder)
            try:
                folder.rename(place)
            except OSError:
                if not place.exists():
                    raise
    except OSError as error:
        raise ValueError(f"{shelf}: {place.name} cannot be made ({error}); {CACHE_ADVICE}") from None


# ---------------------------------------------------------------------------------------------- packed files


def packing(path: str) -> str:
    """How a file on this machine is packed, by its first bytes: "", ".gz" or ".zst"."""
    with open(path, "rb") as file:
        head = file.read(8)
    other = next((name for start, name in OTHER_PACKS.items() if head.startswith(start)), None)
    if other:
        raise ValueError(f"{path}: this is {other}; unpack it, or pack it as gzip or zstd")
    return next((ending for ending, start in PACKED.items() if head.startswith(start)), "")


def check_ending(path: str, packed: str) -> None:
    """A name that promises a packed file must keep it: what else is in it was not meant to be there."""
    for ending, name in ((".gz", "gzip"), (".zst", "zstd")):
        if path.endswith(ending) and packed != ending:
            raise ValueError(f"{path}: not a whole {name} file (it does not begin as one); pack it again or rename it")


def fetch(path: str, target: Path) -> None:
    """Copies a far file."""
    system, place = _system(path)
    with _told(path), system.open(place, "rb") as far, create_private(target) as near:
        shutil.copyfileobj(far, near, BLOCK)


def unpack(source: str, target: Path, *, packed: str, name: str, longest: int) -> None:
    """Writes what a packed file holds, as long as that is within bounds."""
    most = max(MOST_UNPACKED * os.stat(source).st_size, longest)
    written = 0
    with open(source, "rb") as file, create_private(target) as unpacked:
        for block in _gunzip(file, name) if packed == ".gz" else _unzstd(file, name):
            written += len(block)
            if written > most:
                raise ValueError(f"{name}: unpacks to over {MOST_UNPACKED} times its size; unpack it yourself")
            unpacked.write(block)


def _gunzip(file: IO[bytes], name: str) -> Iterator[bytes]:
    try:
        with gzip.open(file) as packed:
            while block := packed.read(BLOCK):
                yield block
    except (EOFError, OSError, zlib.error) as error:
        raise ValueError(f"{name}: not a whole gzip file ({error}); pack it again") from None


def _unzstd(file: IO[bytes], name: str) -> Iterator[bytes]:
    unpacker, frame = zstandard.ZstdDecompressor(), None
    try:
        while piece := file.read(ZSTD_PIECE):
            while piece:
                frame = frame or unpacker.decompressobj()
                yield frame.decompress(piece)
                piece = frame.unused_data if frame.eof else b""
                frame = None if frame.eof else frame
    except zstandard.ZstdError as error:
        raise ValueError(f"{name}: not a whole zstd file ({error}); pack it again") from None
    if frame is not None:
        raise ValueError(f"{name}: not a whole zstd file (it ends early); pack it again")
