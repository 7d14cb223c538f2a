"""Conversations with a model.

A format has `stop_tokens`, `prompt(messages)`, which gives the tokens an
answer follows, and `pieces(chunks)`, which gives the answer's text while its
tokens come. Messages are dicts of "role" ("system", "user", "assistant") and
"content".
"""
from collections.abc import Sequence

from jaxlm.decode.harmony import HarmonyFormat
from jaxlm.decode.template import TemplateFormat

# How a checkpoint shows that it is made for harmony: a special token of its
# tokenizer or, without one (OpenAI's own layout), the size of the vocabulary.
HARMONY_TOKEN, HARMONY_SIZE = "<|channel|>", 201088


def chat_format(lm, *, thinking: bool | None = None,
                reasoning: str | None = None, vocabulary=None,
                stop_strings: Sequence[str] = ()):
  """The format that a checkpoint's tokenizer asks for.

  Args:
    lm: a `jaxlm.LM`.
    thinking: for templates that know the switch (Qwen3); None is their
      default.
    reasoning, vocabulary: harmony's alone (see `HarmonyFormat`).
    stop_strings: for templates; an answer ends before the first of them.

  Raises:
    ValueError: the checkpoint has no tokenizer or no chat template, or its
      format has no place for an argument.
  """
  tokenizer = lm.tokenizer
  if (lm.config.vocab_size == HARMONY_SIZE if tokenizer is None
      else tokenizer.token_id(HARMONY_TOKEN) is not None):
    if thinking is not None or stop_strings:
      raise ValueError("harmony has neither a thinking switch nor stop "
                       "strings: use reasoning, and leave them out")
    return HarmonyFormat(reasoning or "medium", vocabulary)
  if reasoning is not None or vocabulary is not None:
    raise ValueError("reasoning and vocabulary are gpt-oss's: this checkpoint "
                     "chats by a template, leave them out")
  settings = lm.tokenizer_settings
  template = settings.get("chat_template")
  if "chat_template.jinja" in lm.files:
    template = lm.files["chat_template.jinja"].decode()
  if isinstance(template, list):  # several, by name
    template = {t["name"]: t["template"] for t in template}.get("default")
  if tokenizer is None or template is None:
    raise ValueError("the checkpoint has no "
                     f"{'tokenizer' if tokenizer is None else 'chat template'}"
                     ": it cannot chat; `jaxlm generate` continues text")
  variables = {name: settings[name] for name in ("bos_token", "eos_token")
               if name in settings}
  if thinking is not None:
    if "enable_thinking" not in template:
      raise ValueError("the checkpoint's chat template has no enable_thinking: "
                       "it cannot be told to think or not to")
    variables["enable_thinking"] = thinking
  return TemplateFormat(tokenizer, template, lm.stop_tokens, stop_strings,
                        **variables)
