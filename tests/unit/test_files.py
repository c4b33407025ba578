"""Writing whole or not at all: failures, and what may be replaced."""

import pytest

from moe_dit.runtime.errors import InputError
from moe_dit.runtime.files import explained, new_file, new_folder, write_json, write_text
from moe_dit.runtime.progress import leave_streams


def test_a_block_that_fails_changes_nothing(tmp_path):
    write_text(tmp_path / "file", "before")
    with pytest.raises(ZeroDivisionError), new_file(tmp_path / "file") as file:
        file.write(b"half")
        raise ZeroDivisionError
    with pytest.raises(ZeroDivisionError), new_folder(tmp_path / "folder") as folder:
        (folder / "half").touch()
        raise ZeroDivisionError
    assert (tmp_path / "file").read_text() == "before"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_folder_with_other_things_in_it_is_not_replaced(tmp_path):
    ours = ["config.json", "*.safetensors"]
    (tmp_path / "model").mkdir()
    for name in ("config.json", "a.safetensors"):
        (tmp_path / "model" / name).write_text("old")
    (tmp_path / "model" / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"holds notes\.txt"), new_folder(tmp_path / "model", ours):
        pytest.fail("the block must not begin")
    assert (tmp_path / "model" / "notes.txt").read_text() == "mine"
    (tmp_path / "model" / "notes.txt").unlink()
    with new_folder(tmp_path / "model", ours) as folder:
        (folder / "config.json").write_text("new")
    assert [(path.name, path.read_text()) for path in (tmp_path / "model").iterdir()] == [("config.json", "new")]
    (tmp_path / "a file").touch()
    with pytest.raises(InputError, match="exists and is not a folder"), new_folder(tmp_path / "a file", ours):
        pytest.fail("the block must not begin")


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot write the scores: Not a directory"), explained("the scores"):
        write_json(tmp_path / "file" / "scores.json", {})


def test_streams_that_were_closed_before_the_start_are_no_failure(monkeypatch):
    monkeypatch.setattr("sys.stdout", None)
    monkeypatch.setattr("sys.stderr", None)
    assert leave_streams()


@pytest.mark.parametrize(("name", "written"), [("stdout", False), ("stderr", True)])
def test_results_that_could_not_be_printed_are_a_failure_and_messages_are_not(monkeypatch, name, written):
    with open("/dev/full", "w") as full:
        full.write("a result")
        monkeypatch.setattr(f"sys.{name}", full)
        assert leave_streams() is written
        assert leave_streams()  # and Python, which asks again as it exits, has nothing to say
