"""The tokenizer in a GGUF file's metadata, as Hugging Face's two files."""
import json

from tokenizers import (AddedToken, Regex, Tokenizer, decoders, models,
                        normalizers, pre_tokenizers, processors)

_UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 2, 3, 4, 5, 6

_LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s"
           r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
_GPT4O = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*"
    r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+"
    r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+")
# How text is cut before it is merged, by tokenizer.ggml.pre; None is GPT-2's.
_SPLITS = {
    "default": None, "gpt-2": None, "smollm": None,
    "llama-bpe": _LLAMA3 % r"\p{N}{1,3}", "qwen2": _LLAMA3 % r"\p{N}",
    "deepseek-r1-qwen": _LLAMA3 % r"\p{N}", "gpt-4o": _GPT4O,
}


def tokenizer_files(metadata: dict) -> dict[str, bytes]:
  """tokenizer.json and tokenizer_config.json, or none if there is none.

  Raises:
    ValueError: the tokenizer is damaged or of a kind that is not supported.
  """
  if metadata.get("tokenizer.ggml.model", "no_vocab") == "no_vocab":
    return {}
  read = _Reader(metadata)
  try:
    tokenizer = build(metadata)
    text = tokenizer.to_str()
  except ValueError:
    raise
  except Exception as error:  # tokenizers raises bare Exception
    raise ValueError(f"tokenizers does not take it: {error}") from error
  config = {
      "tokenizer_class": "PreTrainedTokenizerFast",
      "add_bos_token": _adds_bos(read),
      "add_eos_token": read("ggml.add_eos_token", bool, False),
      "clean_up_tokenization_spaces": False,
      **{f"{name}_token": _special(read, theirs) for name, theirs in (
          ("bos", "bos"), ("eos", "eos"), ("unk", "unknown"),
          ("pad", "padding"))},
      "chat_template": read("chat_template", str, ""),
  }
  return {"tokenizer.json": text.encode(),
          "tokenizer_config.json": json.dumps(
              {name: value for name, value in config.items()
               if value not in (None, "")}, indent=2).encode()}


def build(metadata: dict) -> Tokenizer:
  """The tokenizer; see `tokenizer_files`."""
  read = _Reader(metadata)
  kind = read("ggml.model", str)
  if kind not in _BUILDERS:
    raise ValueError(f"tokenizer.ggml.model={kind!r} is not supported: only "
                     f"{', '.join(_BUILDERS)}")
  tokens = read.strings("ggml.tokens")
  types = metadata.get("tokenizer.ggml.token_type") or [1] * len(tokens)
  if len(types) != len(tokens) or len(set(tokens)) != len(tokens):
    raise ValueError(f"{len(tokens)} tokens, {len(set(tokens))} different "
                     f"ones, with {len(types)} types")
  tokenizer = _BUILDERS[kind](read, tokens, types)
  tokenizer.add_tokens([
      AddedToken(token, normalized=False, special=of_type == _CONTROL)
      for token, of_type in zip(tokens, types)
      if of_type in (_CONTROL, _USER_DEFINED) and token])
  bos = _special(read, "bos")
  if _adds_bos(read) and bos is not None:
    tokenizer.post_processor = processors.TemplateProcessing(
        f"{bos} $A", f"{bos} $A {bos} $B",
        [(bos, read("ggml.bos_token_id", int))])
  return tokenizer


def _byte_level(read, tokens, types) -> Tokenizer:
  """Byte-level BPE, as GPT-2's."""
  kind = read("ggml.pre", str, "default")
  if kind not in _SPLITS:
    raise ValueError(f"tokenizer.ggml.pre={kind!r} is not supported: only "
                     f"{', '.join(_SPLITS)}")
  vocab = {token: i for i, token in enumerate(tokens)}
  merges = []
  for merge in read.strings("ggml.merges"):
    left, _, right = merge.partition(" ")
    if left not in vocab or right not in vocab or left + right not in vocab:
      raise ValueError(f"the merge {merge!r} is not of two tokens to one")
    merges.append((left, right))
  tokenizer = Tokenizer(models.BPE(vocab, merges,
                                   ignore_merges=kind == "llama-bpe"))
  split = _SPLITS[kind]
  steps = [pre_tokenizers.ByteLevel(False, use_regex=split is None)]
  if split is not None:
    steps.insert(0, pre_tokenizers.Split(Regex(split), "isolated"))
  if kind == "smollm":
    steps.insert(0, pre_tokenizers.Digits(individual_digits=True))
  tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
  if "qwen" in kind:
    tokenizer.normalizer = normalizers.NFC()
  tokenizer.decoder = decoders.ByteLevel()
  return tokenizer


def _sentencepiece(read, tokens, types) -> Tokenizer:
  """SentencePiece's BPE: the pair whose union has the best score merges."""
  scores = read("ggml.scores", list)
  if len(scores) != len(tokens):
    raise ValueError(f"{len(tokens)} tokens with {len(scores)} scores")
  if read.architecture.startswith("gemma"):
    # Runs of spaces are written as such; the order of merges is the tokens'.
    tokens = ["▁" * len(t) if t and not t.strip(" ") else t for t in tokens]
    scores = range(0, -len(tokens), -1)
  vocab = {token: i for i, token in enumerate(tokens)}
  unknown = _special(read, "unknown") or next(
      (t for t, of_type in zip(tokens, types) if of_type == _UNKNOWN), None)
  tokenizer = Tokenizer(models.BPE(
      vocab, _merges(vocab, scores, types), unk_token=unknown, fuse_unk=True,
      byte_fallback=_BYTE in types))
  steps = [normalizers.Replace(" ", "▁")]
  strip = []
  if read("ggml.add_space_prefix", bool, True):
    steps.insert(0, normalizers.Prepend("▁"))
    strip = [decoders.Strip(" ", 1, 0)]
  tokenizer.normalizer = normalizers.Sequence(steps)
  tokenizer.decoder = decoders.Sequence(
      [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
       *strip])
  return tokenizer


_BUILDERS = {"gpt2": _byte_level, "llama": _sentencepiece}


def _merges(vocab: dict[str, int], scores, types) -> list[tuple[str, str]]:
  """All pairs of pieces whose union is one, the best score first."""
  pieces = {token: i for token, i in vocab.items()
            if types[i] not in (_UNKNOWN, _CONTROL, _UNUSED, _BYTE)}
  ranked = []
  for token, i in pieces.items():
    for cut in range(1, len(token)):
      left, right = token[:cut], token[cut:]
      if left in pieces and right in pieces:
        ranked.append((-scores[i], pieces[left], pieces[right], left, right))
  return [pair[3:] for pair in sorted(ranked)]


def _adds_bos(read) -> bool:
  """As llama.cpp does where the file does not say."""
  usual = (read("ggml.model", str) == "llama"
           or read("ggml.pre", str, "default") == "llama-bpe")
  return read("ggml.add_bos_token", bool, usual)


def _special(read, name: str) -> str | None:
  """The text of a special token, None where there is none."""
  i = read(f"ggml.{name}_token_id", int, -1)
  tokens = read.strings("ggml.tokens")
  return tokens[i] if 0 <= i < len(tokens) else None


class _Reader:
  """Values of the tokenizer, checked."""

  def __init__(self, metadata: dict):
    self._values = metadata
    self.architecture = str(metadata.get("general.architecture"))

  def __call__(self, name: str, kind: type, default=None):
    value = self._values.get(f"tokenizer.{name}", default)
    if type(value) is not kind:
      raise ValueError(f"tokenizer.{name} is {str(value)[:80]!r}: expected "
                       f"{kind.__name__}")
    return value

  def strings(self, name: str) -> list[str]:
    value = self(name, list)
    if not value or not isinstance(value[0], str):
      raise ValueError(f"tokenizer.{name} is no list of texts")
    return value
