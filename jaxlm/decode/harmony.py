"""gpt-oss's conversations: the harmony format (by openai-harmony)."""
from collections.abc import Iterable, Iterator, Sequence
import os
import pathlib
import tempfile

from jaxlm.decode.text import Piece

REASONING = ("low", "medium", "high")


class HarmonyFormat:
  """gpt-oss's harmony, by openai-harmony.

  Args:
    reasoning: how long the model thinks, one of `REASONING`.
    vocabulary: the file o200k_base.tiktoken, or the folder it lies in; None
      leaves it to the library, which keeps a copy and else downloads it.
    date: what the model is told the day is, "2025-08-05"; None tells nothing.
  """

  def __init__(self, reasoning: str = "medium",
               vocabulary: str | os.PathLike | None = None,
               date: str | None = None):
    if reasoning not in REASONING:
      raise ValueError(f"reasoning={reasoning!r}: use one of {REASONING}")
    self._encoding = _harmony_encoding(vocabulary)
    self._reasoning, self._date = reasoning, date
    self.stop_tokens = tuple(
        self._encoding.stop_tokens_for_assistant_actions())

  def prompt(self, messages: Sequence[dict]) -> list[int]:
    import openai_harmony as harmony
    system = harmony.SystemContent.new().with_reasoning_effort(
        harmony.ReasoningEffort(self._reasoning.capitalize()))
    if self._date:
      system = system.with_conversation_start_date(self._date)
    conversation = [harmony.Message.from_role_and_content(
        harmony.Role.SYSTEM, system)]
    for message in messages:
      conversation.append(_harmony_message(message))
    return self._encoding.render_conversation_for_completion(
        harmony.Conversation.from_messages(conversation),
        harmony.Role.ASSISTANT)

  def pieces(self, chunks: Iterable[Sequence[int]]) -> Iterator[Piece]:
    import openai_harmony as harmony
    parser = harmony.StreamableParser(self._encoding, harmony.Role.ASSISTANT,
                                      strict=False)
    for chunk in chunks:
      for token in chunk:
        parser.process(token)
        if parser.last_content_delta:
          yield Piece(parser.current_channel or "final",
                      parser.last_content_delta)


def _harmony_message(message: dict):
  """What others call system is the developer's part in harmony."""
  import openai_harmony as harmony
  role, content = message["role"], message["content"]
  if role == "system":
    return harmony.Message.from_role_and_content(
        harmony.Role.DEVELOPER,
        harmony.DeveloperContent.new().with_instructions(content))
  result = harmony.Message.from_role_and_content(harmony.Role(role), content)
  return result.with_channel("final") if role == "assistant" else result


def _harmony_encoding(vocabulary):
  try:
    import openai_harmony as harmony
  except ImportError as error:
    raise ValueError("gpt-oss's chat format needs the package openai-harmony: "
                     "pip install 'jaxlm[harmony]'") from error
  name = harmony.HarmonyEncodingName.HARMONY_GPT_OSS
  try:
    if vocabulary is None:
      return harmony.load_harmony_encoding(name)
    return _from_file(pathlib.Path(vocabulary), harmony, name)
  except harmony.HarmonyError as error:
    raise ValueError(
        f"gpt-oss's vocabulary {vocabulary or ''} cannot be read ({error}): "
        "download o200k_base.tiktoken from https://openaipublic.blob.core."
        "windows.net/encodings/ and name the file") from error


def _from_file(path: pathlib.Path, harmony, name):
  """The library looks for a file of one name in a folder of its own."""
  if path.is_dir():
    path = path / "o200k_base.tiktoken"
  if not path.is_file():
    raise ValueError(f"{path}: there is no such vocabulary file")
  before = os.environ.get("TIKTOKEN_ENCODINGS_BASE")
  with tempfile.TemporaryDirectory() as folder:
    pathlib.Path(folder, "o200k_base.tiktoken").symlink_to(path.resolve())
    os.environ["TIKTOKEN_ENCODINGS_BASE"] = folder
    try:
      return harmony.load_harmony_encoding(name)
    finally:
      del os.environ["TIKTOKEN_ENCODINGS_BASE"]
      if before is not None:
        os.environ["TIKTOKEN_ENCODINGS_BASE"] = before
