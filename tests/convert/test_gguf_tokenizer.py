"""Tokenizers from GGUF metadata, against those that transformers builds."""
import inspect
import json

import pytest
import tokenizers
import transformers
from transformers.integrations.gguf.gguf_tokenizer_mapping import (
    convert_gguf_tokenizer)

from jaxlm.convert.gguf_tokenizer import build, tokenizer_files
from jaxlm.data.documents import Document
from jaxlm.data.tokenizers import HuggingFaceTokenizer, train_bpe

TEXTS = [
    "Hello, world! It's 12345 o'clock -- isn't it? WE'LL see.",
    "def f(x):\n    return x ** 2  # 3.14\n\n\tprint(f(10))\r\n",
    "naïve café 日本語 Ελληνικά 🙂 e\u0301 \u00a0 end",
    "a  b   c\n\n\n  d", "", " ", "1 22 333 4444 55555",
]


@pytest.fixture(scope="module")
def byte_level():
  """Metadata of a byte-level BPE that was trained here."""
  text = inspect.getsource(json.decoder) + inspect.getsource(json.encoder)
  tokenizer = train_bpe([Document("text", text)], 700)._tokenizer
  model = json.loads(tokenizer.to_str())["model"]
  vocab = sorted(model["vocab"], key=model["vocab"].get)
  special = {t.content for t in tokenizer.get_added_tokens_decoder().values()}
  return {
      "general.architecture": "qwen2", "tokenizer.ggml.model": "gpt2",
      "tokenizer.ggml.tokens": vocab + ["<think>", "<|eos|>"],
      "tokenizer.ggml.token_type": [
          3 if token in special else 1 for token in vocab] + [4, 3],
      "tokenizer.ggml.merges": [" ".join(merge) for merge in model["merges"]],
      "tokenizer.ggml.bos_token_id": len(vocab) + 1,
      "tokenizer.ggml.eos_token_id": len(vocab) + 1,
      "tokenizer.chat_template": "{{ messages }}"}


def theirs(metadata):
  values = {name.removeprefix("tokenizer.ggml."): value
            for name, value in metadata.items()}
  names = {"model": "tokenizer_type", "pre": "pre_tokenizer_type"}
  return convert_gguf_tokenizer(
      metadata["general.architecture"],
      {names.get(name, name): value for name, value in values.items()})[0]


def ids(tokenizer, text):
  return tokenizer.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("pre", ["default", "gpt-2", "smollm", "llama-bpe",
                                 "qwen2", "gpt-4o"])
def test_byte_level_tokens_are_those_of_transformers(pre, byte_level):
  metadata = {**byte_level, "tokenizer.ggml.pre": pre}
  ours, reference = build(metadata), theirs(metadata)
  pieces = set()
  for text in [*TEXTS, inspect.getsource(json)]:
    if pre == "smollm":  # theirs does not cut digits apart
      text = "".join("x" if c.isdigit() else c for c in text)
    if pre == "qwen2":  # nor compose letters
      text = text.replace("e\u0301", "\u00e9")
    assert ids(ours, text) == ids(reference, text)
    assert ours.decode(ids(ours, text)) == text
    pieces |= set(ids(ours, text))
  assert len(pieces) > 100
  think = len(metadata["tokenizer.ggml.tokens"]) - 2
  assert ids(ours, "a<think><|eos|>")[-2:] == [think, think + 1]


def test_cutting_depends_on_the_kind(byte_level):
  """Digits one by one or by threes; letters composed for Qwen alone."""
  def pieces(pre, text):
    tokenizer = build({**byte_level, "tokenizer.ggml.pre": pre})
    return [piece for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str(
        tokenizer.normalizer.normalize_str(text)
        if tokenizer.normalizer else text)]
  assert pieces("smollm", "a 1234") == ["a", "Ġ", "1", "2", "3", "4"]
  assert pieces("qwen2", "1234") == ["1", "2", "3", "4"]
  assert pieces("gpt-4o", "1234") == ["123", "4"]
  assert pieces("llama-bpe", "It's") == ["It", "'s"]
  assert pieces("gpt-4o", "It's") == ["It's"]
  assert pieces("default", "12345") == ["12345"]
  assert pieces("qwen2", "e\u0301") == ["Ã©"]


def test_the_beginning_is_marked_where_the_file_or_its_kind_says(byte_level):
  bos = byte_level["tokenizer.ggml.bos_token_id"]
  def begins(**more):
    metadata = {**byte_level, **{f"tokenizer.ggml.{name}": value
                                 for name, value in more.items()}}
    return build(metadata).encode("a").ids[0] == bos
  assert not begins(pre="qwen2") and begins(pre="llama-bpe")
  assert begins(pre="qwen2", add_bos_token=True)
  assert not begins(pre="llama-bpe", add_bos_token=False)


def test_the_files_are_what_transformers_loads(byte_level, tmp_path):
  metadata = {**byte_level, "tokenizer.ggml.pre": "qwen2"}
  for name, content in tokenizer_files(metadata).items():
    (tmp_path / name).write_bytes(content)
  loaded = transformers.AutoTokenizer.from_pretrained(tmp_path)
  assert loaded.eos_token == "<|eos|>"
  assert loaded.apply_chat_template([{"a": 1}], tokenize=False) == (
      "[{'a': 1}]")
  ours = HuggingFaceTokenizer.from_file(tmp_path / "tokenizer.json",
                                        end_of_document="<|eos|>")
  for text in TEXTS:
    text = text.replace("e\u0301", "\u00e9")
    assert loaded(text, add_special_tokens=False).input_ids == list(
        ours.encode(text))
    assert ours.token_bytes()[ours.encode(text)].sum() == len(text.encode())


@pytest.fixture(scope="module")
def sentencepiece():
  """Metadata of a SentencePiece-like BPE that was trained here."""
  trained = tokenizers.SentencePieceBPETokenizer(fuse_unk=True)
  text = inspect.getsource(json.decoder).split("\n") + TEXTS[:2] * 9
  trained.train_from_iterator(
      text, 600, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
  model = json.loads(trained.to_str())["model"]
  vocab = sorted(model["vocab"], key=model["vocab"].get)
  learned = ["".join(merge) for merge in model["merges"]]
  letters = [t for t in vocab[3:] if t not in set(learned)]
  bytes_ = [f"<0x{i:02X}>" for i in range(256)]
  tokens = vocab[:3] + bytes_ + learned + letters
  return {
      "general.architecture": "llama", "tokenizer.ggml.model": "llama",
      "tokenizer.ggml.tokens": tokens,
      "tokenizer.ggml.scores": [0.0] * 259 + [
          -float(i) for i in range(len(tokens) - 259)],
      "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * (
          len(tokens) - 259),
      "tokenizer.ggml.unknown_token_id": 0, "tokenizer.ggml.bos_token_id": 1,
      "tokenizer.ggml.eos_token_id": 2}


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_sentencepiece_tokens_are_those_of_transformers(architecture,
                                                        sentencepiece):
  metadata = {**sentencepiece, "general.architecture": architecture,
              "tokenizer.ggml.add_space_prefix": architecture == "llama"}
  ours, reference = build(metadata), theirs(metadata)
  for text in TEXTS[:4]:
    assert ids(ours, text) == ids(reference, text)
    assert ours.decode(ids(ours, text)) == text
  tokens = metadata["tokenizer.ggml.tokens"]
  assert tokens[ids(ours, "日")[-1]] == "<0xA5>"
  assert max(len(tokens[i]) for i in ids(ours, TEXTS[1])) > 4
  assert ours.encode("a").ids[0] == 1


def test_a_space_is_put_before_every_text_as_sentencepiece_does(sentencepiece):
  ours = build(sentencepiece)
  assert ours.decode(ids(ours, "  a b ")) == "  a b "
  with_space = [t for t in ids(ours, " a")]
  assert len(with_space) == len(ids(ours, "a")) + 1


@pytest.mark.parametrize("changes, message", [
    (dict(model="bert"), "tokenizer.ggml.model='bert' is not supported"),
    (dict(pre="klingon"), "tokenizer.ggml.pre='klingon' is not supported"),
    (dict(tokens=[1, 2]), "tokenizer.ggml.tokens is no list of texts"),
    (dict(tokens="abc"), "expected list"),
    (dict(merges=["zz top"]), "the merge 'zz top' is not of two tokens"),
    (dict(merges=["a"]), "the merge 'a' is not of two tokens"),
    (dict(token_type=[1]), "with 1 types"),
    (dict(bos_token_id="x"), "tokenizer.ggml.bos_token_id"),
])
def test_damaged_tokenizers_are_refused(changes, message, byte_level):
  metadata = {**byte_level, **{f"tokenizer.ggml.{name}": value
                               for name, value in changes.items()}}
  with pytest.raises(ValueError, match=message):
    tokenizer_files(metadata)


def test_scores_that_do_not_fit_are_refused(sentencepiece):
  with pytest.raises(ValueError, match="with 1 scores"):
    tokenizer_files({**sentencepiece, "tokenizer.ggml.scores": [0.0]})


def test_a_file_without_a_tokenizer_has_no_files():
  assert tokenizer_files({"general.architecture": "llama"}) == {}
