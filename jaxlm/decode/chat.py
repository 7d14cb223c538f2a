"""Conversations with a model.

A format has `stop_tokens`, `prompt(messages)`, which gives the tokens an
answer follows, and `pieces(chunks)`, which gives the answer's text while its
tokens come. Messages are dicts of "role" ("system", "user", "assistant") and
"content".
"""
from collections.abc import Sequence

from jaxlm.decode.harmony import HarmonyFormat
from jaxlm.decode.template import TemplateFormat

# The special token by which a tokenizer shows that it is made for harmony.
HARMONY = "<|channel|>"


def chat_format(lm, *, thinking: bool | None = None,
                reasoning: str = "medium", vocabulary=None,
                stop_strings: Sequence[str] = ()):
  """The format that a checkpoint's tokenizer asks for.

  Args:
    lm: a `jaxlm.LM`.
    thinking: for templates that know the switch (Qwen3); None is their
      default.
    reasoning, vocabulary: harmony's (see `HarmonyFormat`).
    stop_strings: an answer ends before the first of them.

  Raises:
    ValueError: the checkpoint has no tokenizer or no chat template.
  """
  tokenizer = lm.tokenizer
  if (200002 in lm.stop_tokens if tokenizer is None
      else tokenizer.token_id(HARMONY) is not None):
    return HarmonyFormat(reasoning, vocabulary)
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
