import json

import numpy as np
import pytest

from jaxlm import data


def texts(rows, tokenizer):
  """The documents that rows were packed from."""
  batch = rows.take(range(len(rows)))
  stream = [*batch["tokens"][:, :1][0], *batch["targets"].reshape(-1)]
  ends = np.flatnonzero(np.asarray(stream) == rows.end_of_document)
  found, start = [], 0
  for end in ends[: len(rows.starts)]:
    found.append(tokenizer.decode(stream[start:end]))
    start = end + 1
  return found


@pytest.fixture
def folder(tmp_path, monkeypatch):
  monkeypatch.setenv("JAXLM_CACHE", str(tmp_path / "cache"))
  for i in range(40):
    path = tmp_path / f"corpus/f{i:02}.txt"
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"file {i} says é{i * i}\n" * (1 + i % 5))
  return f"files:{tmp_path}/corpus/*.txt"


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe:311"])
def test_a_bundle_holds_the_source_split_by_file(folder, tokenizer):
  bundle = data.build_dataset(
      folder, tokenizer, 13, heldout_fraction=0.3, seed=5
  )
  documents = data.load_source(folder)
  train, heldout = data.split_by_file(documents, 0.3, 5)
  for part, rows, name in (
      (train, bundle.train, "train"),
      (heldout, bundle.heldout, "heldout"),
  ):
    assert texts(rows, bundle.tokenizer) == [d.text for d in part]
    described = bundle.description[name]
    assert described["files"] == len(part)
    assert described["bytes"] == sum(d.num_bytes for d in part)
    assert described["tokens"] == len(rows.stream)
    assert described["rows"] == len(rows)
    sizes = bundle.tokenizer.token_bytes()
    assert sizes[rows.stream].sum() == described["bytes"]
  assert json.loads(json.dumps(bundle.description)) == bundle.description


def test_the_content_hash_follows_the_text(folder, tmp_path):
  def described():
    return data.build_dataset(folder, seq_len=13, heldout_fraction=0.3)

  first, again = described(), described()
  assert first.description == again.description
  assert first.train.fingerprint == again.train.fingerprint
  (tmp_path / "corpus/f07.txt").write_text("changed")
  changed = described().description
  assert changed["content_hash"] != first.description["content_hash"]


def test_fim_touches_the_training_part_alone(folder):
  plain, mixed = (
      data.build_dataset(
          folder, seq_len=13, heldout_fraction=0.3, fim_rate=rate
      )
      for rate in (0.0, 0.5)
  )
  assert plain.heldout.fingerprint == mixed.heldout.fingerprint
  fim = mixed.tokenizer.fim
  counts = [np.sum(mixed.train.stream == token) for token in fim]
  assert 0 < counts[0] < len(mixed.train.starts)
  assert len(set(counts)) == 1
  assert not np.isin(plain.train.stream, fim).any()
  extra = len(mixed.train.stream) - len(plain.train.stream)
  assert extra == 3 * counts[0]


def test_a_first_token_is_in_both_parts(folder):
  plain, first = (
      data.build_dataset(
          folder, seq_len=13, heldout_fraction=0.3, first_token=given
      )
      for given in (False, True)
  )
  for part in ("train", "heldout"):
    a, b = getattr(plain, part), getattr(first, part)
    assert a.fingerprint != b.fingerprint
    np.testing.assert_array_equal(a.stream, b.stream)
    assert np.all(b.take(range(len(b)))["tokens"][:, 0] == b.end_of_document)
  changed = plain.description | {"first_token": True}
  assert first.description == changed != plain.description


def test_budgets_keep_files_on_their_side(folder):
  whole, small = (
      data.build_dataset(
          folder, seq_len=13, heldout_fraction=0.3, max_bytes=budget
      )
      for budget in (None, 500)
  )
  for part in ("train", "heldout"):
    few = texts(getattr(small, part), small.tokenizer)
    assert set(few) < set(texts(getattr(whole, part), whole.tokenizer))
  parts = [small.description[part] for part in ("train", "heldout")]
  assert 400 < sum(part["bytes"] for part in parts) <= 500
  ten = data.build_dataset(
      folder, seq_len=13, heldout_fraction=0.3, max_documents=10
  ).description
  assert (ten["train"]["files"], ten["heldout"]["files"]) == (7, 3)


def test_the_standard_library_in_small():
  bundle = data.build_dataset(max_bytes=300_000, seq_len=101)
  assert 270_000 < bundle.description["train"]["bytes"] <= 285_000
  assert 10_000 < bundle.description["heldout"]["bytes"] <= 15_000
  batch = next(data.batches(bundle.train, 3, seed=0))
  assert batch["tokens"].shape == (3, 101)
  text = bundle.tokenizer.decode(batch["tokens"][1])
  whole = [document.text for document in data.python_stdlib()]
  assert any(text in document for document in whole)


def test_bad_arguments(folder):
  good = {"source": folder, "heldout_fraction": 0.3}
  for arguments, message in (
      (dict(max_bytes=0), "max_bytes=0"),
      (dict(max_documents=-1), "max_documents=-1"),
      (dict(fim_rate=2.0), "fim_rate=2.0"),
      (dict(seq_len=0), "seq_len=0"),
      (dict(heldout_fraction=1.0), "heldout_fraction=1.0"),
      (dict(tokenizer="word"), "tokenizer='word'"),
      (dict(source="web"), "source='web'"),
  ):
    with pytest.raises(ValueError, match=message):
      data.build_dataset(**{**good, **arguments})
