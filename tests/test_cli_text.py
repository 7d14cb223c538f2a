"""`jaxlm generate` and `jaxlm chat`, on a small random model."""
import dataclasses
import json
import re

import jax
import numpy as np
import pytest
import tokenizers

import jaxlm
from jaxlm import cli
from jaxlm.decode.chat import chat_format
from jaxlm.lm import LM
from quick import jax_options

TEMPLATE = ("{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>"
            "{% endfor %}<|assistant|>{% if enable_thinking %}!{% endif %}")
CONFIG = jaxlm.ModelConfig(
    vocab_size=270, d_model=20, num_layers=2,
    attention=jaxlm.AttentionConfig(4, 2, 6, jaxlm.RopeConfig()),
    mlp=jaxlm.MLPConfig(17))


def tokenizer():
  result = tokenizers.Tokenizer(tokenizers.models.BPE())
  level = tokenizers.pre_tokenizers.ByteLevel
  result.pre_tokenizer = level(add_prefix_space=False)
  result.decoder = tokenizers.decoders.ByteLevel()
  result.train_from_iterator([], tokenizers.trainers.BpeTrainer(
      initial_alphabet=level.alphabet(), show_progress=False,
      special_tokens=["<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]))
  return result


@pytest.fixture(scope="module")
def lm():
  params = jax.tree.map(lambda x: 3 * x,
                        jaxlm.init_params(CONFIG, jax.random.key(2)))
  settings = {"eos_token": "<|end|>", "chat_template": TEMPLATE}
  return LM(CONFIG, params, {"max_position_embeddings": 90},
            {"tokenizer.json": tokenizer().to_str().encode(),
             "tokenizer_config.json": json.dumps(settings).encode()})


@pytest.fixture(scope="module")
def source(lm, tmp_path_factory):
  path = tmp_path_factory.mktemp("models") / "small"
  jaxlm.save(lm, path)
  return str(path)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
  monkeypatch.setenv("JAXLM_CACHE", str(tmp_path_factory.getbasetemp()))
  with jax_options():
    yield


def run(*arguments):
  return cli.main([*arguments, "--dtype", "float32"])


def expected(lm, text, count, **options):
  """Greedily, up to the end of the text; of the model's 270 tokens the last
  ten are none of the tokenizer's."""
  ids = lm.tokenizer.encode_marked(text)
  new = np.asarray(lm.generate(ids[None], count, **options))[0].tolist()
  return lm.tokenizer.decode(
      [i for i in new[:(new + [0]).index(0)] if i < 260])


def test_generate_continues_the_prompt(lm, source, capsys):
  assert run("generate", source, "--prompt", "def", "--max-new-tokens", "11",
             "--stats") == 0
  out, err = capsys.readouterr()
  assert out == expected(lm, "def", 11) + "\n"
  assert "tokens, the first after" in err


def test_generate_draws_by_its_seed(lm, source, capsys):
  found = []
  for seed in ("3", "3", "4"):
    assert run("generate", source, "--prompt", "def", "--max-new-tokens", "9",
               "--temperature", "2.0", "--top-k", "50", "--seed", seed) == 0
    found.append(capsys.readouterr().out)
  assert found[0] == found[1] != found[2]


def test_chat_answers_each_message(lm, source, capsys):
  assert run("chat", source, "--message", "a", "--message", "b", "--system",
             "c", "--max-new-tokens", "9") == 0
  first = expected(lm, "<|system|>c<|end|><|user|>a<|end|><|assistant|>", 9)
  second = expected(lm, "<|system|>c<|end|><|user|>a<|end|><|assistant|>"
                    f"{first}<|end|><|user|>b<|end|><|assistant|>", 9)
  assert capsys.readouterr().out == f"{first}\n{second}\n"


def test_the_thinking_switch_reaches_the_template(lm, source, capsys):
  assert run("chat", source, "--message", "a", "--max-new-tokens", "5",
             "--thinking") == 0
  assert capsys.readouterr().out == expected(
      lm, "<|user|>a<|end|><|assistant|>!", 5) + "\n"


@pytest.mark.parametrize("arguments, message", [
    (("generate", "--prompt", ""), "the prompt is empty"),
    (("generate", "--prompt", "x" * 90), "90 tokens so far.*holds 90"),
    (("generate", "--prompt", "x", "--top-p", "1.5"), "top_p=1.5"),
    (("generate", "--prompt", "x", "--max-new-tokens", "0"),
     "max_new_tokens=0"),
    (("generate", "--prompt", "x", "--stop", ""), "empty string"),
])
def test_what_cannot_be_is_said(source, arguments, message, capsys):
  command, *options = arguments
  assert run(command, source, *options) == 1
  err = capsys.readouterr().err
  assert err.startswith("jaxlm: error: ")
  assert re.search(message, err)


@pytest.mark.parametrize("missing, command, message", [
    ("tokenizer.json", "generate", "has no tokenizer.json"),
    ("tokenizer.json", "chat", "has no tokenizer"),
    ("tokenizer_config.json", "chat", "end_of_document"),
])
def test_a_checkpoint_without_its_files(lm, tmp_path, missing, command,
                                        message, capsys):
  files = {name: x for name, x in lm.files.items() if name != missing}
  jaxlm.save(dataclasses.replace(lm, files=files), tmp_path / "m")
  said = "--prompt" if command == "generate" else "--message"
  assert run(command, str(tmp_path / "m"), said, "a") == 1
  assert message in capsys.readouterr().err


def test_a_template_without_the_switch_cannot_be_told(lm, tmp_path, capsys):
  settings = {"eos_token": "<|end|>", "chat_template": "{{ messages }}"}
  files = lm.files | {"tokenizer_config.json": json.dumps(settings).encode()}
  jaxlm.save(dataclasses.replace(lm, files=files), tmp_path / "m")
  assert run("chat", str(tmp_path / "m"), "--message", "a", "--no-thinking"
             ) == 1
  assert "no enable_thinking" in capsys.readouterr().err


def test_wrong_usage_exits_with_2(source):
  for arguments in (["chat", source, "--reasoning", "most"], ["generate"],
                    ["generate", source, "--temprature", "1"]):
    with pytest.raises(SystemExit) as exit_:
      cli.main(arguments)
    assert exit_.value.code == 2


@pytest.mark.parametrize("option", [("--reasoning", "low"),
                                    ("--vocabulary", "x")])
def test_options_of_another_format_are_refused(source, option, capsys):
  assert run("chat", source, "--message", "a", *option) == 1
  assert "chats by a template" in capsys.readouterr().err


def test_without_a_tokenizer_the_vocabulary_tells_harmony(tmp_path):
  lm = LM(dataclasses.replace(CONFIG, vocab_size=201088), {})
  with pytest.raises(ValueError, match="no such vocabulary file"):
    chat_format(lm, vocabulary=tmp_path / "absent")
  with pytest.raises(ValueError, match="neither a thinking switch"):
    chat_format(lm, thinking=True)
