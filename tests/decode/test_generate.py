"""Generation against the whole forward pass, run again for every token."""
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.config import (AttentionConfig, MLAConfig, MLPConfig, ModelConfig,
                          MoEConfig, RopeConfig, RouterConfig)
from jaxlm.decode import generate
from jaxlm.model.transformer import (Execution, forward, init_params,
                                     logits)

LENGTH, NEW, WINDOW = 9, 11, 5
CONFIG = ModelConfig(
    vocab_size=61, d_model=20, num_layers=2,
    attention=AttentionConfig(
        6, 2, 8, RopeConfig(), RopeConfig(), sliding_window=WINDOW, sinks=True,
        biases=("q", "k", "v", "o")),
    moe=MoEConfig(7, 3, MLPConfig(13, "clamped_swiglu", bias=True,
                                  interleaved=True),
                  RouterConfig("topk_softmax", bias=True)),
    layer_pattern=("sliding", "full"))
LEARNED = ModelConfig(
    vocab_size=61, d_model=20, num_layers=1,
    attention=AttentionConfig(2, 2, 9), mlp=MLPConfig(17), max_positions=19)
LATENT = ModelConfig(
    vocab_size=61, d_model=20, num_layers=2,
    attention=MLAConfig(3, 11, 7, 4, 9, q_rank=8), mlp=MLPConfig(17),
    num_dense_layers=1, moe=MoEConfig(
        6, 3, MLPConfig(13), RouterConfig(
            "sigmoid_topk", renormalize=True, balance_bias=True, num_groups=3,
            groups_per_token=2, weight_scale=2.5), shared=MLPConfig(13)))
PROMPTS = np.random.default_rng(3).integers(0, 61, (3, LENGTH))


# What is compiled for a few runs is compiled quickly.
quick_jit = functools.partial(
    jax.jit, static_argnums=0,
    compiler_options={"xla_backend_optimization_level": 0})


@functools.cache
def params_of(config):
  # Larger than at init, so that the likeliest token depends on the context.
  return jax.tree.map(lambda x: 3 * x,
                      quick_jit(init_params)(config, jax.random.key(1)))


@quick_jit
def logits_of(config, params, tokens_BT):
  execution = Execution(attention="reference", experts="ragged")
  hidden_BTD = forward(config, params, tokens_BT,
                       execution=execution).hidden_BTD
  return logits(config, params, hidden_BTD)


def greedy_by_forward(config, prompt_T, count):
  """Causality lets one padded length serve every step."""
  tokens, found = np.zeros((1, LENGTH + count - 1), np.int32), []
  tokens[0, :len(prompt_T)] = prompt_T
  for end in range(len(prompt_T), len(prompt_T) + count):
    found.append(np.argmax(
        logits_of(config, params_of(config), tokens)[0, end - 1]))
    tokens[0, end:end + 1] = found[-1]
  return np.array(found)


@pytest.mark.parametrize("config", [CONFIG, LEARNED, LATENT])
def test_greedy_is_the_argmax_of_the_forward_pass(config):
  new_BT = generate(config, params_of(config), PROMPTS, max_new_tokens=NEW)
  assert new_BT.shape == (3, NEW) and new_BT.dtype == jnp.int32
  expected = [greedy_by_forward(config, row, NEW) for row in PROMPTS]
  np.testing.assert_array_equal(new_BT, expected)
  assert len(np.unique(expected)) > 3  # not one token over and over


@pytest.mark.parametrize("config", [CONFIG, LATENT])
def test_prompts_of_unequal_lengths_are_independent(config):
  lengths = np.array([9, 4, 1])
  padded = PROMPTS.copy()
  for row, length in zip(padded, lengths):
    row[:LENGTH - length] = 60
  together = generate(config, params_of(config), padded, lengths_B=lengths,
                      max_new_tokens=NEW)
  for row, length, new in zip(PROMPTS, lengths, together):
    np.testing.assert_array_equal(
        new, greedy_by_forward(config, row[LENGTH - length:], NEW))


def test_a_row_ends_at_eos_and_the_others_go_on():
  free = np.asarray(generate(LEARNED, params_of(LEARNED), PROMPTS,
                             max_new_tokens=NEW))
  eos = int(free[0, 4])
  new_BT = generate(LEARNED, params_of(LEARNED), PROMPTS, max_new_tokens=NEW,
                    eos=eos)
  for row, unhindered in zip(np.asarray(new_BT), free):
    first = np.append(np.flatnonzero(unhindered == eos), NEW)[0]
    np.testing.assert_array_equal(row[:first + 1], unhindered[:first + 1])
    assert (row[first:] == eos).all()


def test_samples_follow_seed_and_temperature():
  sample = functools.partial(generate, LEARNED, params_of(LEARNED), PROMPTS,
                             max_new_tokens=NEW)
  greedy = sample()
  np.testing.assert_array_equal(sample(temperature=1.5, seed=4),
                                sample(temperature=1.5, seed=4))
  assert (sample(temperature=1.5, seed=4) != sample(
      temperature=1.5, seed=5)).any()
  np.testing.assert_array_equal(sample(temperature=1e-6), greedy)


def test_the_first_token_is_drawn_from_the_softmax():
  one = PROMPTS[:1]
  expected = jax.nn.softmax(
      logits_of(LEARNED, params_of(LEARNED), one)[0, -1] / 2)
  draws = generate(LEARNED, params_of(LEARNED), np.repeat(one, 2000, 0),
                   max_new_tokens=1, temperature=2.0)
  counts = np.bincount(np.asarray(draws)[:, 0], minlength=61) / 2000
  # Four standard deviations of a share of 2000 draws, and a little.
  spread = np.sqrt(expected * (1 - expected) / 2000)
  assert (abs(counts - expected) < 4 * spread + 2e-3).all()


@pytest.mark.parametrize("changes, message", [
    (dict(tokens_BT=np.zeros((1, 0), np.int32)), "at least one prompt"),
    (dict(tokens_BT=PROMPTS[0]), r"shape \(9,\)"),
    (dict(tokens_BT=PROMPTS / 2), "give integers"),
    (dict(tokens_BT=PROMPTS + 60), "outside the vocabulary of 61"),
    (dict(tokens_BT=PROMPTS - 61), "outside the vocabulary of 61"),
    (dict(lengths_B=[3, 0, 2]), "3 lengths from 1 to 9"),
    (dict(lengths_B=[3, 10, 2]), "3 lengths from 1 to 9"),
    (dict(max_new_tokens=0), "max_new_tokens=0"),
    (dict(max_new_tokens=12), "need 20 positions, but the model has 19"),
    (dict(temperature=-1.0), "temperature=-1.0"),
    (dict(temperature=float("nan")), "temperature=nan"),
    (dict(eos=61), "eos=61"),
])
def test_impossible_arguments_are_named(changes, message):
  arguments = {"tokens_BT": PROMPTS, "max_new_tokens": 2, **changes}
  with pytest.raises(ValueError, match=message):
    generate(LEARNED, params_of(LEARNED), **arguments)


def test_expert_choice_cannot_generate():
  config = dataclasses.replace(CONFIG, moe=dataclasses.replace(
      CONFIG.moe, router=RouterConfig("expert_choice")))
  with pytest.raises(ValueError, match="expert_choice"):
    generate(config, {}, PROMPTS, max_new_tokens=1)
