"""The Jinja templates by which checkpoints say what a conversation is."""
from collections.abc import Iterable, Iterator, Sequence
import datetime
import json

import jinja2
import jinja2.sandbox

from jaxlm.decode.text import Piece, stream_text


class TemplateFormat:
  """The Jinja template that a checkpoint's tokenizer_config.json carries.

  Args:
    tokenizer: what `encode_marked` and `decode` of
      `jaxlm.data.tokenizers.HuggingFaceTokenizer` are.
    template: Jinja; run in a sandbox, for it comes from strangers.
    variables: what the template is told besides the messages: `bos_token`,
      `eos_token`, and switches such as Qwen3's `enable_thinking`.
  """

  def __init__(self, tokenizer, template: str, stop_tokens: Sequence[int],
               stop_strings: Sequence[str] = (), **variables):
    self.stop_tokens = tuple(stop_tokens)
    self._tokenizer, self._stop_strings = tokenizer, stop_strings
    self._variables = variables
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True,
        extensions=["jinja2.ext.loopcontrols"])
    environment.filters["tojson"] = _to_json
    environment.globals |= {"raise_exception": _refuse, "strftime_now": _now}
    try:
      self._template = environment.from_string(template)
    except jinja2.TemplateSyntaxError as error:
      raise ValueError(f"the chat template does not parse, line {error.lineno}"
                       f": {error.message}") from error

  def text(self, messages: Sequence[dict]) -> str:
    """The prompt as text.

    Raises:
      ValueError: the template refuses the messages.
    """
    try:
      return self._template.render(messages=messages, tools=None,
                                   add_generation_prompt=True,
                                   **self._variables)
    except (jinja2.TemplateError, TypeError) as error:
      raise ValueError(f"the chat template refuses the messages: {error}"
                       ) from error

  def prompt(self, messages: Sequence[dict]) -> list[int]:
    return self._tokenizer.encode_marked(self.text(messages)).tolist()

  def pieces(self, chunks: Iterable[Sequence[int]]) -> Iterator[Piece]:
    for text in stream_text(chunks, self._tokenizer,
                            self._stop_strings):
      yield Piece("final", text)


def _to_json(value, ensure_ascii=False, **options):
  return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def _refuse(message):
  raise jinja2.TemplateError(message)


def _now(format_):
  return datetime.datetime.now().strftime(format_)
