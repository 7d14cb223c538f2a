"""A model in memory: what it answers, what it refuses, what it carries."""
import json

import jax
import numpy as np
import pytest
import tokenizers

import jaxlm
from jaxlm.convert.checkpoint import named_leaves
from jaxlm.decode.generate import generate
from reference_models import shrink

pytestmark = pytest.mark.usefixtures("quick_compile")


@pytest.fixture(scope="module")
def lm():
  config = shrink("qwen3-0.6b", 2)
  return jaxlm.LM(config, jaxlm.init_params(config, jax.random.key(0)),
                  {"eos_token_id": 7}, text_files())


def text_files():
  tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(
      {letter: i for i, letter in enumerate(
          sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())[:90])}, []))
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
      add_prefix_space=False)
  tokenizer.decoder = tokenizers.decoders.ByteLevel()
  tokenizer.add_special_tokens(["<stop>"])
  return {"tokenizer.json": tokenizer.to_str().encode(),
          "tokenizer_config.json": json.dumps(
              {"eos_token": {"content": "<stop>"}}).encode(),
          "chat_template.jinja": b"{{ messages }}"}


def test_logits_are_those_of_the_pure_functions(lm):
  tokens_BT = np.arange(10).reshape(2, 5)
  hidden_BTD = jaxlm.forward(lm.config, lm.params, tokens_BT).hidden_BTD
  expected = jaxlm.logits(lm.config, lm.params, hidden_BTD)
  found = lm.logits(tokens_BT)
  assert found.dtype == "float32" and found.shape == (2, 5, 101)
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_it_generates(lm):
  tokens_BT = np.arange(10).reshape(2, 5)
  expected = generate(lm.config, lm.params, tokens_BT, max_new_tokens=4)
  np.testing.assert_array_equal(lm.generate(tokens_BT, 4), expected)


@pytest.mark.parametrize("tokens,message", [
    ([[3, 101]], r"ids 3\.\.101, outside the vocabulary of 101"),
    ([[-1, 5]], r"ids -1\.\.5, outside"),
    ([1, 2], r"shape \(2,\): give at least"),
    ([[]], r"shape \(1, 0\): give at least"),
    ([[1.5]], "float64")])
def test_impossible_tokens_are_refused(lm, tokens, message):
  with pytest.raises(ValueError, match=message):
    lm.logits(np.array(tokens))


@pytest.mark.parametrize("format", ["native", "hf"])
def test_all_of_it_survives(lm, format, tmp_path):
  jaxlm.save(lm, tmp_path / "x", format)
  back = jaxlm.load(tmp_path / "x", "float32")
  assert (back.config, back.files) == (lm.config, lm.files)
  assert back.about["eos_token_id"] == 7
  expected = jax.tree.leaves(jaxlm.LM(
      lm.config, lm.params).logits(np.array([[1, 2]])))
  np.testing.assert_array_equal(back.logits(np.array([[1, 2]])), expected[0])
  # Loaded parameters are per layer; saving takes either form.
  jaxlm.save(back, tmp_path / "y", format)
  again = named_leaves(jaxlm.load(tmp_path / "y", None).params)
  for name, x in named_leaves(back.params).items():
    np.testing.assert_array_equal(again[name], x)


def test_the_tokenizer_travels(lm, tmp_path):
  jaxlm.save(lm, tmp_path / "x", "hf")
  tokenizer = jaxlm.load(tmp_path / "x").tokenizer
  assert tokenizer.decode(tokenizer.encode("AbC")) == "AbC"
  assert tokenizer.end_of_document == 90
  assert (tmp_path / "x/chat_template.jinja").read_text() == "{{ messages }}"


def test_without_or_with_a_damaged_tokenizer(lm):
  assert jaxlm.LM(lm.config, lm.params).tokenizer is None
  damaged = jaxlm.LM(lm.config, lm.params, {}, {"tokenizer.json": b"{"})
  with pytest.raises(ValueError, match="tokenizer cannot be read"):
    damaged.tokenizer


def test_parameters_of_another_model_are_not_saved(lm, tmp_path):
  params = {**lm.params, "extra": np.zeros(3, np.float32)}
  del params["final_norm"]
  with pytest.raises(ValueError) as error:
    jaxlm.save(jaxlm.LM(lm.config, params), tmp_path / "x")
  assert "missing: final_norm/scale" in str(error.value)
  assert "unexpected: extra" in str(error.value)
  assert not (tmp_path / "x").exists()
