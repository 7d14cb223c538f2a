"""Directories appear whole or not at all."""
import os
import resource

import pytest

from jaxlm.convert import files


def test_it_appears_when_all_is_written(tmp_path):
  with files.new_directory(tmp_path / "a" / "b", 10) as directory:
    (directory / "x").write_text("1")
    assert not (tmp_path / "a" / "b").exists()
  assert [p.name for p in (tmp_path / "a").iterdir()] == ["b"]
  assert (tmp_path / "a" / "b" / "x").read_text() == "1"


def test_an_empty_directory_is_filled(tmp_path):
  with files.new_directory(tmp_path, 10) as directory:
    (directory / "x").write_text("1")
  assert [p.name for p in tmp_path.iterdir()] == ["x"]


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt(),
                                   OSError("disk on fire")])
def test_nothing_is_left_of_a_failure(error, tmp_path):
  with pytest.raises((ValueError, KeyboardInterrupt)):
    with files.new_directory(tmp_path / "a", 10) as directory:
      (directory / "x").write_text("1")
      raise error
  assert not list(tmp_path.iterdir())


def test_what_is_there_is_not_touched(tmp_path):
  (tmp_path / "x").write_text("1")
  for path in (tmp_path, tmp_path / "x"):
    with pytest.raises(ValueError, match="exists already: choose another"):
      with files.new_directory(path, 10):
        pass
  assert (tmp_path / "x").read_text() == "1"


def test_a_full_disk_is_refused_before_anything_is_written(tmp_path):
  with pytest.raises(ValueError, match=r"needs 1000000000.0 GB, but its disk"):
    with files.new_directory(tmp_path / "a", 10 ** 18):
      pass
  assert not list(tmp_path.iterdir())


def test_a_disk_that_fills_up_is_one_message(tmp_path):
  before = resource.getrlimit(resource.RLIMIT_FSIZE)
  with pytest.raises(ValueError, match="a cannot be written: .*Nothing was"):
    with files.new_directory(tmp_path / "a", 10) as directory:
      resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
      try:
        (directory / "x").write_bytes(b"x" * 2000)
      finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
  assert not list(tmp_path.iterdir())


def test_a_place_that_cannot_be_written_is_one_message(tmp_path):
  (tmp_path / "file").write_text("1")
  with pytest.raises(ValueError, match="cannot be written"):
    with files.new_directory(tmp_path / "file" / "a", 10):
      pass
  with pytest.raises(ValueError, match="cannot be written"):
    with files.new_directory(os.path.join("/proc", "a"), 0):
      pass


@pytest.mark.parametrize("content,message", [
    (b"{", "cannot be read as JSON"), (b"\xff", "cannot be read as JSON"),
    (b"[" * 100_000, "cannot be read as JSON"), (b"[1]", "holds a list")])
def test_damaged_json_is_named(content, message, tmp_path):
  (tmp_path / "x.json").write_bytes(content)
  with pytest.raises(ValueError, match=f"x.json {message}"):
    files.read_json(tmp_path / "x.json")
  with pytest.raises(ValueError, match="y.json does not exist"):
    files.read_json(tmp_path / "y.json")
