import json
import re
import sys

import pyarrow
import pyarrow.parquet
import pytest

from jaxlm import data


def write(path, content):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_bytes(content if isinstance(content, bytes) else content.encode())
  return path


def test_python_stdlib_is_large_clean_and_in_a_fixed_order():
  documents = data.python_stdlib()
  names = [document.name for document in documents]
  assert names == sorted(set(names), key=lambda name: name.split("/"))
  assert {"argparse.py", "json/decoder.py"} <= set(names)
  assert not any("site-packages" in n or "__pycache__" in n for n in names)
  assert all(document.text for document in documents)
  # An interpreter without the test directory still has about 10 MB.
  assert sum(document.num_bytes for document in documents) > 5_000_000
  assert data.load_source("python-stdlib") == documents


def test_local_files_of_every_kind(tmp_path):
  write(tmp_path / "b.txt", "plain ü\r\n")
  write(tmp_path / "sub/a.py", "print()\n")
  write(tmp_path / "empty.md", "")
  rows = ['{"text": "one"}', "", '{"text": null}', '{"text": "four"}']
  write(tmp_path / "rows.jsonl", "\n".join(rows))
  table = pyarrow.table({"text": ["p0", None, "p2"], "id": [0, 1, 2]})
  pyarrow.parquet.write_table(table, tmp_path / "t.parquet")
  found = data.load_source(f"files:{tmp_path}/**/*")
  assert [(d.name, d.text) for d in found] == [
      ("b.txt", "plain ü\r\n"),
      ("rows.jsonl:1", "one"),
      ("rows.jsonl:4", "four"),
      ("sub/a.py", "print()\n"),
      ("t.parquet:0", "p0"),
      ("t.parquet:2", "p2"),
  ]


def test_names_do_not_depend_on_where_the_folder_is(tmp_path, monkeypatch):
  for place in ("here", "there/deep"):
    write(tmp_path / place / "corpus/x/one.md", "1")
  monkeypatch.chdir(tmp_path)
  patterns = (
      f"{tmp_path}/here/corpus/**/*.md",
      "there/deep/corpus/**/*.md",
  )
  names = {d.name for p in patterns for d in data.local_files(p)}
  assert names == {"x/one.md"}


def test_another_text_field(tmp_path):
  path = write(tmp_path / "a.jsonl", json.dumps({"content": "c", "text": "t"}))
  (document,) = data.load_source(f"files:{path}", text_field="content")
  assert document.text == "c"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "x"}\n{"text": ', "a.jsonl:2: not a JSON"),
        ("a.jsonl", '{"body": "x"}', r"a.jsonl:1: no field 'text'.*\['body'\]"),
        ("a.jsonl", '["text"]', "a.jsonl:1: no field 'text', found list"),
        ("a.jsonl", '{"text": 3}', "a.jsonl:1: .* is a int, not a string"),
        ("a.jsonl", '{"text": "\\ud800"}', "a.jsonl:1: .* lone surrogate"),
        ("a.jsonl", b'{"text": "\xff"}', "a.jsonl.* not UTF-8: convert"),
        ("a.txt", b"abc\xff", "a.txt: byte 3 is not UTF-8: convert"),
        ("a.txt", b"", "no text found: add text"),
        ("a.parquet", b"PAR1 cut short", "a.parquet: not a readable parquet"),
    ],
)
def test_bad_files_are_named(tmp_path, name, content, message):
  write(tmp_path / name, content)
  with pytest.raises(ValueError, match=f"(?s){message}"):
    data.local_files(f"{tmp_path}/*")


def test_parquet_without_the_column_or_without_pyarrow(tmp_path, monkeypatch):
  path = tmp_path / "t.parquet"
  pyarrow.parquet.write_table(pyarrow.table({"body": ["x"]}), path)
  with pytest.raises(ValueError, match=r"row 0: no field 'text'.*\['body'\]"):
    data.local_files(str(path))
  monkeypatch.setitem(sys.modules, "pyarrow", None)
  with pytest.raises(ValueError, match="t.parquet.*pip install pyarrow"):
    data.local_files(str(path))


def test_no_match_and_unknown_specs(monkeypatch):
  with pytest.raises(ValueError, match="matches no file"):
    data.load_source("files:/nowhere/*.txt")
  for spec in ("stdlib", "files:", "hf:", "python-stdlib:x", ""):
    with pytest.raises(ValueError, match=re.escape(f"source={spec!r}")):
      data.load_source(spec)
  monkeypatch.setitem(sys.modules, "datasets", None)
  with pytest.raises(ValueError, match="hf:a/b:test:c.*pip install datasets"):
    data.load_source("hf:a/b:test:c")
