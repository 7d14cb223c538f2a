import pathlib

import hypothesis
from hypothesis import strategies as st
import numpy as np
import pytest
import tiktoken
import tokenizers as hf_tokenizers

from jaxlm import data

SPECIAL_TEXT = "<|end_of_document|><|fim_prefix|><|endoftext|></s>"
TEXT = st.one_of(st.text(max_size=40), st.just(SPECIAL_TEXT))


def corpus():
  paths = sorted(pathlib.Path(data.__file__).parent.glob("*.py"))
  return [data.Document(path.name, path.read_text("utf-8")) for path in paths]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
  monkeypatch.setenv("JAXLM_CACHE", str(tmp_path / "cache"))
  return tmp_path / "cache/tokenizers"


def gpt2_like():
  """A tiktoken encoding with a hole in its ids, made here, without network."""
  ranks = {bytes([i]): i for i in range(256)}
  ranks |= {b"th": 256, b"the": 257, b" the": 258, "é".encode(): 259}
  special = {"<|endoftext|>": 261, "<|fim_prefix|>": 262}
  special |= {"<|fim_middle|>": 263, "<|fim_suffix|>": 265}
  return tiktoken.Encoding(
      "tiny", pat_str=r" ?\w+|\s|.", mergeable_ranks=ranks,
      special_tokens=special,
  )


def sentencepiece_like(tmp_path):
  """A Llama-2 style tokenizer.json: ▁ for a space, bytes as <0xNN>."""
  pieces = ["<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
  pieces += ["▁", "a", "b", "é", "▁a", "ab"]
  vocab = {piece: i for i, piece in enumerate(pieces)}
  tokenizer = hf_tokenizers.Tokenizer(
      hf_tokenizers.models.BPE(
          vocab, [("▁", "a"), ("a", "b")], byte_fallback=True
      )
  )
  tokenizer.normalizer = hf_tokenizers.normalizers.Replace(" ", "▁")
  decoders = hf_tokenizers.decoders
  tokenizer.decoder = decoders.Sequence(
      [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
  )
  tokenizer.add_special_tokens(["<s>", "</s>"])
  tokenizer.enable_truncation(3)
  tokenizer.save(str(tmp_path / "tokenizer.json"))
  return data.load_tokenizer(f"json:{tmp_path}/tokenizer.json")


@pytest.fixture(params=["bytes", "bpe", "sentencepiece", "tiktoken"])
def tokenizer(request, tmp_path):
  return {
      "bytes": lambda: data.load_tokenizer("bytes"),
      "bpe": lambda: data.load_tokenizer("bpe:397", corpus()),
      "sentencepiece": lambda: sentencepiece_like(tmp_path),
      "tiktoken": lambda: data.TiktokenTokenizer(gpt2_like()),
  }[request.param]()


def test_text_survives_and_its_bytes_are_counted(tokenizer):
  sizes = tokenizer.token_bytes()
  assert sizes.shape == (tokenizer.vocab_size,) and sizes.dtype == np.int32
  special = {tokenizer.end_of_document, *(tokenizer.fim or ())}
  assert sizes[list(special)].tolist() == [0] * len(special)

  @hypothesis.given(TEXT)
  @hypothesis.example("the théatre ab a  the\n\x00 日本 🙂")
  def check(text):
    # SentencePiece writes a space as ▁, and so cannot tell the two apart.
    hypothesis.assume(tokenizer.vocab_size != 264 or "▁" not in text)
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32 and ids.ndim == 1
    assert tokenizer.decode(ids) == text
    assert sizes[ids].sum() == len(text.encode("utf-8"))
    assert special.isdisjoint(ids.tolist())

  check()


def test_ids_past_the_vocabulary_are_refused(tokenizer):
  for bad in ([tokenizer.vocab_size], [3, -1]):
    with pytest.raises(ValueError, match="outside the vocabulary"):
      tokenizer.decode(bad)
  assert tokenizer.decode([]) == ""


def test_ids_that_checkpoints_depend_on(tmp_path):
  byte = data.ByteTokenizer()
  assert byte.vocab_size == 260 and byte.end_of_document == 256
  assert byte.encode("é").tolist() == [0xC3, 0xA9]
  assert byte.decode([65, 0xC3, 256]) == "A\ufffd<|end_of_document|>"
  tiny = data.TiktokenTokenizer(gpt2_like())
  assert (tiny.vocab_size, tiny.end_of_document) == (266, 261)
  assert tiny.fim == data.FimTokens(prefix=262, middle=263, suffix=265)
  assert tiny.encode(" the é").tolist() == [258, 32, 259]
  assert tiny.token_bytes()[[258, 259, 260, 264]].tolist() == [4, 2, 0, 0]
  with pytest.raises(ValueError, match="264; its vocabulary has holes"):
    tiny.decode([264])
  piece = sentencepiece_like(tmp_path)
  assert (piece.vocab_size, piece.end_of_document) == (264, 1)
  assert piece.fim is None
  # " ab": the merge of "▁a" comes first; the file's truncation is off.
  ids = piece.encode(" abbé日").tolist()
  assert piece.token_bytes()[ids].tolist() == [2, 1, 1, 2, 1, 1, 1]


def test_bpe_is_trained_once_and_the_same_every_time(cache, monkeypatch):
  first = data.load_tokenizer("bpe:397", corpus())
  assert first.vocab_size == 397 and first.fim is not None
  (path,) = cache.iterdir()
  saved = path.read_bytes()
  path.unlink()
  again = data.load_tokenizer("bpe:397", corpus())
  assert path.read_bytes() == saved
  text = corpus()[0].text
  np.testing.assert_array_equal(first.encode(text), again.encode(text))
  assert len(first.encode(text)) < 0.7 * len(text)

  def untouched(*_, **__):
    raise AssertionError("trained although it was cached")

  monkeypatch.setattr(hf_tokenizers.trainers, "BpeTrainer", untouched)
  data.load_tokenizer("bpe:397", corpus())
  for other in (corpus()[1:], [data.Document("a", "b")]):
    with pytest.raises(AssertionError, match="although it was cached"):
      data.load_tokenizer("bpe:397", other)


def test_a_small_text_yields_a_small_vocabulary():
  tokenizer = data.load_tokenizer("bpe:999", [data.Document("a", "aaaa")])
  assert 260 <= tokenizer.vocab_size < 270


def test_bad_specs_and_files(tmp_path, cache):
  for spec in ("byte", "bpe", "bpe:x", "bpe:-3", "json:", "tiktoken:", ""):
    with pytest.raises(ValueError, match="use 'bytes', 'bpe:VOCAB'"):
      data.load_tokenizer(spec)
  with pytest.raises(ValueError, match="needs documents to train on"):
    data.load_tokenizer("bpe:300")
  with pytest.raises(ValueError, match="bpe vocabulary 259 is too small: 260"):
    data.load_tokenizer("bpe:259", corpus())
  with pytest.raises(ValueError, match="(?s)nonsense.*use one of .*o200k_base"):
    data.load_tokenizer("tiktoken:nonsense")
  path = tmp_path / "t.json"
  for content in (None, "{", '{"version": "1.0"}'):
    if content:
      path.write_text(content)
    with pytest.raises(ValueError, match="t.json: not a readable tokenizer"):
      data.load_tokenizer(f"json:{path}")


def test_json_without_an_end_or_without_whole_text(tmp_path):
  path = tmp_path / "t.json"
  words = hf_tokenizers.Tokenizer(
      hf_tokenizers.models.WordPiece(
          {"[UNK]": 0, "[SEP]": 1}, unk_token="[UNK]"
      )
  )
  words.decoder = hf_tokenizers.decoders.WordPiece()
  words.add_special_tokens(["[SEP]"])
  words.save(str(path))
  with pytest.raises(ValueError, match=r"end_of_document, one of \['\[SEP\]'"):
    data.load_tokenizer(f"json:{path}")
  loaded = data.HuggingFaceTokenizer.from_file(path, end_of_document="[SEP]")
  assert loaded.end_of_document == 1
  with pytest.raises(ValueError, match="bits per byte are undefined"):
    loaded.token_bytes()


def test_a_cache_that_cannot_be_written(tmp_path, monkeypatch):
  blocked = tmp_path / "file"
  blocked.write_text("not a folder")
  monkeypatch.setenv("JAXLM_CACHE", str(blocked))
  with pytest.raises(ValueError, match="set JAXLM_CACHE"):
    data.load_tokenizer("bpe:300", corpus())
