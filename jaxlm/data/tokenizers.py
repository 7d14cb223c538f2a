"""Tokenizers by name: bytes, BPE trained here, tokenizer.json, tiktoken."""

import hashlib
import json
import os
import pathlib
import re
import tempfile
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import tokenizers as hf_tokenizers

from jaxlm.data import byte_tokenizer
from jaxlm.data.byte_tokenizer import check_ids, FimTokens, Tokenizer
from jaxlm.data.documents import Document

# Names in published tokenizers, the more specific first.
_KNOWN_ENDS = (
    byte_tokenizer.END_OF_DOCUMENT,
    "<|endoftext|>",
    "<|end_of_text|>",
    "<｜end▁of▁sentence｜>",
    "</s>",
    "<eos>",
)
_KNOWN_FIM = (
    byte_tokenizer.FIM,
    ("<fim_prefix>", "<fim_middle>", "<fim_suffix>"),
    ("<｜fim▁begin｜>", "<｜fim▁end｜>", "<｜fim▁hole｜>"),
)


def load_tokenizer(
    spec: str, documents: Iterable[Document] | None = None
) -> Tokenizer:
  """Resolves `bytes`, `bpe:VOCAB`, `json:PATH` or `tiktoken:NAME`.

  `documents` is the text that `bpe:VOCAB` trains on.
  """
  kind, _, rest = spec.partition(":")
  if spec == "bytes":
    return byte_tokenizer.ByteTokenizer()
  if kind == "bpe" and rest.isdecimal():
    if documents is None:
      raise ValueError(f"tokenizer={spec!r} needs documents to train on")
    return train_bpe(documents, int(rest))
  if kind == "json" and rest:
    return HuggingFaceTokenizer.from_file(rest)
  if kind == "tiktoken" and rest:
    return TiktokenTokenizer.from_name(rest)
  raise ValueError(
      f"tokenizer={spec!r} is not known: use 'bytes', 'bpe:VOCAB' (such as "
      "'bpe:4096'), 'json:PATH' or 'tiktoken:NAME'"
  )


class HuggingFaceTokenizer:
  """A tokenizer.json, byte-level (GPT-2 style) or SentencePiece style."""

  def __init__(
      self,
      tokenizer: hf_tokenizers.Tokenizer,
      *,
      end_of_document: str | None = None,
      where: str = "tokenizer",
  ):
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    self._tokenizer = tokenizer
    self._where = where
    vocab = tokenizer.get_vocab(with_added_tokens=True)
    self.vocab_size = max(vocab.values()) + 1  # ids may have holes
    names = (end_of_document,) if end_of_document else _KNOWN_ENDS
    found = [vocab[name] for name in names if name in vocab]
    if not found:
      added = tokenizer.get_added_tokens_decoder().values()
      raise ValueError(
          f"{where}: none of {list(names)} is in the vocabulary: pass "
          f"end_of_document, one of {[t.content for t in added if t.special]}"
      )
    self.end_of_document = found[0]
    self.fim = _find_fim(vocab)

  @classmethod
  def from_file(
      cls, path: str | os.PathLike, *, end_of_document: str | None = None
  ) -> "HuggingFaceTokenizer":
    try:
      text = pathlib.Path(path).expanduser().read_text("utf-8")
      tokenizer = hf_tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # tokenizers raises bare Exception
      raise ValueError(
          f"{path}: not a readable tokenizer.json ({error}): replace it, or "
          "delete it if it is in the cache"
      ) from error
    return cls(tokenizer, end_of_document=end_of_document, where=str(path))

  def encode(self, text: str) -> np.ndarray:
    encoding = self._tokenizer.encode(text, add_special_tokens=False)
    return np.asarray(encoding.ids, np.int32)

  def encode_marked(self, text: str) -> np.ndarray:
    """As `encode`, but names of special tokens in the text mean the tokens."""
    self._tokenizer.encode_special_tokens = False
    try:
      return self.encode(text)
    finally:
      self._tokenizer.encode_special_tokens = True

  def encode_prompt(self, text: str) -> np.ndarray:
    """As `encode`, with what the model is used to see before a text (BOS)."""
    return np.asarray(self._tokenizer.encode(text).ids, np.int32)

  def token_id(self, name: str) -> int | None:
    return self._tokenizer.token_to_id(name)

  def decode(self, ids: Sequence[int] | np.ndarray) -> str:
    ids = check_ids(ids, self.vocab_size)
    return self._tokenizer.decode(ids, skip_special_tokens=False)

  def token_bytes(self) -> np.ndarray:
    added = self._tokenizer.get_added_tokens_decoder()
    measure = self._piece_measure()
    sizes = np.zeros(self.vocab_size, np.int32)
    for piece, i in self._tokenizer.get_vocab(with_added_tokens=False).items():
      sizes[i] = measure(piece)
    for i, token in added.items():
      sizes[i] = 0 if token.special else len(token.content.encode())
    return sizes

  def to_json(self) -> str:
    return self._tokenizer.to_str()

  def _piece_measure(self) -> Callable[[str], int]:
    """How many bytes a vocabulary entry stands for, by the kind of decoder."""
    decoder = json.loads(self._tokenizer.to_str())["decoder"] or {}
    steps = decoder.get("decoders", [decoder])
    kinds = {step.get("type") for step in steps}
    if "ByteLevel" in kinds:
      return len  # one letter of the entry per byte
    if kinds & {"ByteFallback", "Metaspace"}:
      return _sentencepiece_bytes
    raise ValueError(
        f"{self._where}: decoder {sorted(map(str, kinds))} does not give the "
        "text back byte for byte, so bits per byte are undefined: use a "
        "byte-level or SentencePiece tokenizer"
    )


def _find_fim(vocab: dict[str, int]) -> FimTokens | None:
  for names in _KNOWN_FIM:
    if all(name in vocab for name in names):
      return FimTokens(*(vocab[name] for name in names))
  return None


def _sentencepiece_bytes(piece: str) -> int:
  if re.fullmatch(r"<0x[0-9A-Fa-f]{2}>", piece):
    return 1
  return len(piece.replace("▁", " ").encode("utf-8"))


def train_bpe(
    documents: Iterable[Document], vocab_size: int
) -> HuggingFaceTokenizer:
  """A byte-level BPE of `vocab_size` ids, trained on `documents`.

  The result is kept in $JAXLM_CACHE (default ~/.cache/jaxlm) under a hash of
  the text and the size. A small text may yield fewer ids than asked for.
  """
  least = 256 + len(byte_tokenizer.SPECIAL)
  if vocab_size < least:
    raise ValueError(
        f"bpe vocabulary {vocab_size} is too small: {least} ids are taken by "
        "the bytes and the special tokens"
    )
  texts = [document.text for document in documents]
  digest = hashlib.sha256(f"byte-level-bpe-1,{vocab_size}".encode())
  for text in texts:
    encoded = text.encode("utf-8")
    digest.update(len(encoded).to_bytes(8, "big"))
    digest.update(encoded)
  name = f"bpe-{vocab_size}-{digest.hexdigest()[:16]}.json"
  path = cache_dir() / "tokenizers" / name
  if not path.exists():
    tokenizer = hf_tokenizers.Tokenizer(hf_tokenizers.models.BPE())
    pre_tokenizer = hf_tokenizers.pre_tokenizers.ByteLevel
    tokenizer.pre_tokenizer = pre_tokenizer(add_prefix_space=False)
    tokenizer.decoder = hf_tokenizers.decoders.ByteLevel()
    trainer = hf_tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(byte_tokenizer.SPECIAL),
        initial_alphabet=pre_tokenizer.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer, length=len(texts))
    _write_atomically(path, tokenizer.to_str())
  return HuggingFaceTokenizer.from_file(path)


class TiktokenTokenizer:
  """A tiktoken encoding."""

  def __init__(self, encoding):
    """Wraps a `tiktoken.Encoding`."""
    self._encoding = encoding
    self.vocab_size = encoding.n_vocab
    special = {
        name: encoding.encode_single_token(name)
        for name in encoding.special_tokens_set
    }
    if "<|endoftext|>" not in special:
      raise ValueError(
          f"tiktoken encoding {encoding.name!r} has no <|endoftext|> among "
          f"its special tokens {sorted(special)}: use another encoding"
      )
    self.end_of_document = special["<|endoftext|>"]
    self.fim = _find_fim(special)

  @classmethod
  def from_name(cls, name: str) -> "TiktokenTokenizer":
    try:
      import tiktoken
    except ImportError as error:
      raise ValueError(
          f"tokenizer='tiktoken:{name}' needs the 'tiktoken' package: pip "
          "install tiktoken"
      ) from error
    try:
      return cls(tiktoken.get_encoding(name))
    except Exception as error:  # unknown names and network errors alike
      raise ValueError(
          f"tokenizer='tiktoken:{name}' cannot be loaded ({error}): use one "
          f"of {tiktoken.list_encoding_names()}; the first use downloads it"
      ) from error

  def encode(self, text: str) -> np.ndarray:
    return np.asarray(self._encoding.encode_ordinary(text), np.int32)

  def decode(self, ids: Sequence[int] | np.ndarray) -> str:
    ids = check_ids(ids, self.vocab_size)
    try:
      return self._encoding.decode(ids)
    except KeyError as error:
      raise ValueError(
          f"tiktoken encoding {self._encoding.name!r} cannot decode {ids}: "
          f"{error.args[0]}; its vocabulary has holes"
      ) from error

  def token_bytes(self) -> np.ndarray:
    sizes = np.zeros(self.vocab_size, np.int32)
    for piece in self._encoding.token_byte_values():
      sizes[self._encoding.encode_single_token(piece)] = len(piece)
    return sizes

  def to_json(self) -> None:
    return None


def cache_dir() -> pathlib.Path:
  """What can be made again is kept in $JAXLM_CACHE or ~/.cache/jaxlm."""
  chosen = os.environ.get("JAXLM_CACHE")
  return pathlib.Path(chosen or "~/.cache/jaxlm").expanduser()


def _write_atomically(path: pathlib.Path, text: str) -> None:
  temporary = None
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(
        "w", encoding="utf-8", dir=path.parent, delete=False
    ) as file:
      temporary = file.name
      file.write(text)
    os.replace(temporary, path)
  except OSError as error:
    if temporary:
      pathlib.Path(temporary).unlink(missing_ok=True)
    raise ValueError(
        f"{path}: cannot be written ({error}): set JAXLM_CACHE to a folder "
        "with space that you may write to"
    ) from error
