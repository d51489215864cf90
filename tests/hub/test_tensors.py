"""The safetensors format: the library of that name is the oracle; what is damaged or hostile is named and not read."""

import json
import pickle
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from itjax.hub import tensors
from itjax.hub.tensors import Box, Reader

oracle = pytest.importorskip("safetensors.numpy")

A = np.arange(24, dtype=np.float32).reshape(4, 6)


def file_of(folder: Path, name: str = "model.safetensors", **values: np.ndarray) -> Path:
    oracle.save_file(values, folder / name)
    return folder / name


def raw(folder: Path, header: object, data: bytes = b"", *, name: str = "model.safetensors") -> Path:
    """A file with any header at all."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path = folder / name
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def entry(start: int, stop: int, shape: list, dtype: str = "F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, ml_dtypes.bfloat16])
def test_a_tensor_is_read_as_the_library_wrote_it(tmp_path, dtype):
    found = tensors.header(file_of(tmp_path, a=A.astype(dtype)))
    with Reader() as reader:
        read = reader.read(found["a"], Box(0, (4, 6), (6, 1)))
    np.testing.assert_array_equal(read, A.astype(dtype))
    assert (read.dtype, reader.num_bytes) == (dtype, 24 * read.itemsize)


@pytest.mark.parametrize(
    "box, expected, num_read",
    [
        (Box(0, (4, 6), (6, 1)), A, 24),
        (Box(6, (2, 6), (6, 1)), A[1:3], 12),  # rows lie together
        (Box(2, (4, 3), (6, 1)), A[:, 2:5], 12),  # columns: only those are read
        (Box(8, (2, 3), (6, 1)), A[1:3, 2:5], 6),
        (Box(1, (4, 3), (6, 2)), A[:, 1::2], 23),  # every second one: what lies between is read too, and left out
        (Box(0, (2, 2, 6), (12, 6, 1)), A.reshape(2, 2, 6), 24),
        (Box(23, (1, 1), (6, 1)), A[3:, 5:], 1),
        (Box(5, (4, 1), (6, 1)), A[:, 5:], 4),
    ],
)
def test_a_box_takes_its_own_bytes_from_the_file(tmp_path, box, expected, num_read):
    found = tensors.header(file_of(tmp_path, a=A))
    with Reader() as reader:
        np.testing.assert_array_equal(reader.read(found["a"], box), expected)
    assert reader.num_bytes == 4 * num_read


def test_the_library_reads_what_is_written(tmp_path):
    values = {"b": A, "a": A[:2].copy()}
    path = tmp_path / "model.safetensors"
    tensors.write(path, {name: value.shape for name, value in values.items()}, "F32", iter(values.values()))
    read = oracle.load_file(path)
    assert read.keys() == values.keys()
    for name, value in values.items():
        np.testing.assert_array_equal(read[name], value)
    from safetensors import safe_open

    with safe_open(path, "np") as opened:
        assert opened.metadata() == {"format": "pt"}


# --- damage -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "header, data, words",
    [
        ({"a": entry(0, 8, [2])}, b"\0" * 4, "has .* bytes and not"),
        ({"a": entry(0, 8, [2])}, b"\0" * 12, "has .* bytes and not"),
        ({"a": entry(0, 8, [3])}, b"\0" * 8, "a: 8 bytes do not make a F32 of shape"),
        ({"a": entry(0, 8, [2]), "b": entry(4, 12, [2])}, b"\0" * 12, "b: begins at byte 4 of the data and not at 8"),
        ({"a": entry(4, 12, [2])}, b"\0" * 12, "a: begins at byte 4"),
        ({"a": entry(0, 8, [-2])}, b"\0" * 8, "a: dtype 'F32', shape"),
        ({"a": entry(0, 8, [2.0])}, b"\0" * 8, "a: dtype 'F32', shape"),
        ({"a": entry(0, 4, [True])}, b"\0" * 4, "a: dtype 'F32', shape"),
        ({"a": {"dtype": "F32"}}, b"", "a: the header lacks"),
        ({"a": entry(0, 1 << 70, [1 << 68])}, b"", "has .* bytes and not"),
        ({"a": entry(0, -8, [2], "X9")}, b"", "a: dtype 'X9'"),
        (b'{"a": 1, "a": 2}', b"", "'a' stands there twice"),
        (b"[1]", b"", "does not begin with a header"),
        (b"{" * 100_000, b"", "not JSON"),
        (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", b"", "not JSON|lacks"),
        (b'{"\xff": 1}', b"", "not JSON"),
    ],
)
def test_a_damaged_or_hostile_header_is_refused_with_file_and_tensor(tmp_path, header, data, words):
    path = raw(tmp_path, header, data)
    with pytest.raises(ValueError, match=f"(?s){path}.*({words})"):
        tensors.header(path)


@pytest.mark.parametrize("content", [b"", b"\x05", b"\xff" * 8, (200).to_bytes(8, "little") + b"{}", b"PK\x03\x04" * 8])
def test_a_file_too_short_for_its_header_is_refused(tmp_path, content):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="cannot hold the header"):
        tensors.header(path)


def test_a_pointer_that_git_left_in_place_of_a_shard_is_known(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 4976698672\n")
    with pytest.raises(ValueError, match=f"{path}: this is git's pointer .* `git lfs pull`"):
        tensors.header(path)


def test_a_file_cut_while_it_is_read_is_named_with_the_tensor(tmp_path):
    path = file_of(tmp_path, a=A)
    found = tensors.header(path)
    path.write_bytes(path.read_bytes()[:-8])
    with Reader() as reader, pytest.raises(ValueError, match=f"{path}: a: the file ends within this tensor"):
        reader.read(found["a"], Box(0, (4, 6), (6, 1)))


# --- folders ----------------------------------------------------------------------------------------------------------


def index(folder: Path, weight_map: object) -> None:
    (folder / tensors.INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_a_folder_is_one_file_or_several_or_what_an_index_lists(tmp_path):
    for name in ("one", "several", "listed"):
        (tmp_path / name).mkdir()
    file_of(tmp_path / "one", a=A, b=A)
    for folder in (tmp_path / "several", tmp_path / "listed"):
        file_of(folder, "x-1.safetensors", a=A)
        file_of(folder, "x-2.safetensors", b=A)
    file_of(tmp_path / "listed", "consolidated.safetensors", c=A)
    index(tmp_path / "listed", {"a": "x-1.safetensors", "b": "x-2.safetensors"})
    for name in ("one", "several", "listed"):
        assert tensors.of_folder(tmp_path / name).keys() == {"a", "b"}


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/x.safetensors", "a/b.safetensors", "model.bin", 3, None])
def test_an_index_cannot_point_outside_of_its_folder(tmp_path, name):
    (tmp_path / "folder").mkdir()
    file_of(tmp_path, "x.safetensors", a=A)
    index(tmp_path / "folder", {"a": name})
    with pytest.raises(ValueError, match=r"index\.json: a: .* is not the name of a safetensors file in this folder"):
        tensors.of_folder(tmp_path / "folder")


def test_what_an_index_promises_is_there(tmp_path):
    file_of(tmp_path, "x-1.safetensors", a=A)
    index(tmp_path, {"a": "x-1.safetensors", "b": "x-1.safetensors"})
    with pytest.raises(ValueError, match=r"x-1\.safetensors: b: .* says that this tensor is here"):
        tensors.of_folder(tmp_path)
    index(tmp_path, {"a": "x-1.safetensors", "b": "x-2.safetensors"})
    with pytest.raises(ValueError, match=r"b: there is no file x-2\.safetensors"):
        tensors.of_folder(tmp_path)
    index(tmp_path, [])
    with pytest.raises(ValueError, match="weight_map: there is none"):
        tensors.of_folder(tmp_path)


def test_a_tensor_in_two_shards_is_refused(tmp_path):
    file_of(tmp_path, "x-1.safetensors", a=A)
    file_of(tmp_path, "x-2.safetensors", a=A)
    with pytest.raises(ValueError, match=r"x-2\.safetensors: a: this tensor is in x-1\.safetensors too"):
        tensors.of_folder(tmp_path)


def test_a_single_file_beside_an_index_is_not_guessed_about(tmp_path):
    file_of(tmp_path, a=A)
    index(tmp_path, {"a": "model.safetensors"})
    with pytest.raises(ValueError, match="remove the one that is not meant"):
        tensors.of_folder(tmp_path)


class Payload:
    """What a hostile pickle does when it is opened."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


@pytest.mark.parametrize(
    "name",
    ["pytorch_model.bin", "consolidated.00.pth", "model.gguf", "model.safetensors", "model.safetensors.index.json"],
)
def test_nothing_is_ever_unpickled(tmp_path, name):
    marker = tmp_path / "marker"
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / name).write_bytes(pickle.dumps(Payload(marker)))
    with pytest.raises(ValueError, match=name.replace(".", r"\.")):
        tensors.of_folder(folder)
    assert not marker.exists()
    pickle.loads((folder / name).read_bytes())  # it would have appeared
    assert marker.exists()


def test_a_folder_of_pickles_is_refused_with_the_way_out(tmp_path):
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(ValueError, match=r"only safetensors is read.*save_pretrained"):
        tensors.of_folder(tmp_path)
    (tmp_path / "pytorch_model.bin").unlink()
    with pytest.raises(ValueError, match="there are no weights"):
        tensors.of_folder(tmp_path)
