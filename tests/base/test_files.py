"""Files are whole or absent; private ones are for their user alone, whatever the umask lets through."""

import os
import stat

import pytest

from itjax.base.files import private_folder, write_private, write_whole


@pytest.fixture(autouse=True)
def umask():
    before = os.umask(0o022)
    yield
    os.umask(before)


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


def test_a_file_is_replaced_and_nothing_is_left_beside_it(tmp_path):
    for write in (lambda text: write_whole(tmp_path / "a", text), lambda text: write_private(tmp_path, "a", text)):
        write("long ago")
        write("now")
        assert (tmp_path / "a").read_text() == "now"
    assert os.listdir(tmp_path) == ["a"]


def test_a_private_file_lies_in_private_folders(tmp_path):
    write_private(tmp_path / "cache", "below/more/a", b"")
    made = ["cache", "cache/below", "cache/below/more", "cache/below/more/a"]
    assert [mode(tmp_path / name) for name in made] == [0o700, 0o700, 0o700, 0o600]


def test_what_was_readable_is_private_when_it_is_replaced(tmp_path):
    (tmp_path / "a").write_text("")
    assert mode(tmp_path / "a") == 0o644
    write_private(tmp_path, "a", "")
    assert mode(tmp_path / "a") == 0o600


def test_a_folder_that_is_there_stays_as_its_owner_made_it(tmp_path):
    (tmp_path / "shared").mkdir(mode=0o755)
    assert mode(private_folder(tmp_path / "shared")) == 0o755
