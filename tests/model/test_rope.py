"""Rotary positions against published numbers and transformers' own."""
import jax.numpy as jnp
import numpy as np
import pytest

import jaxlm
from jaxlm.config import (LinearScaling, Llama3Scaling, RopeConfig,
                          YarnScaling)
from jaxlm.model.rope import frequencies, rope_table, rotate, yarn_ramp

GPT_OSS = jaxlm.preset("gpt-oss-20b").attention


def test_yarn_ramp_of_gpt_oss_is_not_rounded():
  rope = GPT_OSS.rope_full
  low, high = yarn_ramp(rope.scaling, rope.theta, GPT_OSS.head_dim)
  assert low == pytest.approx(8.092779, abs=1e-6)
  assert high == pytest.approx(17.398025, abs=1e-6)


def test_yarn_scales_cos_and_sin_of_gpt_oss():
  _, factor = frequencies(GPT_OSS.rope_full, GPT_OSS.head_dim)
  assert factor == pytest.approx(1.3465736, abs=1e-7)
  table = rope_table(GPT_OSS.rope_full, GPT_OSS.head_dim, jnp.arange(3))
  assert table.cos[0] == pytest.approx(factor)


def test_yarn_keeps_the_fast_and_divides_the_slow():
  rope = GPT_OSS.rope_full
  plain, _ = frequencies(RopeConfig(rope.theta), GPT_OSS.head_dim)
  scaled, _ = frequencies(rope, GPT_OSS.head_dim)
  # The ramp runs from 8.09 to 17.40: dimensions up to 8, and from 18.
  np.testing.assert_array_equal(scaled[:9], plain[:9])
  np.testing.assert_allclose(scaled[18:], plain[18:] / 32, rtol=1e-12)
  inside = scaled[9:18] / plain[9:18]
  assert np.all((inside < 1) & (inside > 1 / 32) & (np.diff(inside, prepend=1)
                                                    < 0))


SCALINGS = {
    "linear": (LinearScaling(8.0), dict(factor=8.0)),
    "llama3": (Llama3Scaling(8.0, 1.0, 4.0, 8192),
               dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                    original_max_position_embeddings=8192)),
    "yarn": (YarnScaling(32.0, 4096, 32.0, 1.0, truncate=False),
             dict(factor=32.0, beta_fast=32.0, beta_slow=1.0, truncate=False,
                  original_max_position_embeddings=4096)),
    "yarn truncated": (YarnScaling(40.0, 4096, 32.0, 1.0, truncate=True),
                       dict(factor=40.0, beta_fast=32.0, beta_slow=1.0,
                            truncate=True,
                            original_max_position_embeddings=4096)),
    "yarn with mscale": (
        YarnScaling(40.0, 2048, 32.0, 1.0, True, 0.7, 1.3),
        dict(factor=40.0, mscale=0.7, mscale_all_dim=1.3,
             original_max_position_embeddings=2048)),
}


@pytest.mark.parametrize("name", SCALINGS)
@pytest.mark.parametrize("head_dim", [22, 64, 128])
@pytest.mark.parametrize("theta", [1e4, 150000.0, 1e6])
def test_frequencies_equal_those_of_transformers(name, head_dim, theta):
  # Where torch has no build at hand, the newest jax is still tested.
  pytest.importorskip("torch", reason="the peer runs on torch")
  transformers = pytest.importorskip("transformers")
  from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
  scaling, parameters = SCALINGS[name]
  kind = name.split()[0]
  reference = transformers.LlamaConfig(
      head_dim=head_dim, max_position_embeddings=131072,
      rope_parameters=dict(rope_type=kind, rope_theta=theta, **parameters))
  expected, expected_factor = ROPE_INIT_FUNCTIONS[kind](reference)
  ours, factor = frequencies(RopeConfig(theta, scaling), head_dim)
  np.testing.assert_allclose(ours, expected.numpy(), rtol=2e-6)
  assert factor == pytest.approx(expected_factor, abs=1e-12)


def test_interleaved_pairs_turn_as_complex_numbers():
  head_dim, positions = 10, jnp.arange(3, 8)[None]
  config = RopeConfig(100.0, interleaved=True)
  q, k = np.random.default_rng(0).normal(size=(2, 1, 5, 1, head_dim))
  table = rope_table(config, head_dim, positions)
  found = np.einsum("BTNH,BSNH->TS", *(rotate(jnp.asarray(x), table, True)
                                       for x in (q, k)))
  angles = positions[0, :, None] * frequencies(config, head_dim)[0]
  q, k = ((x[0, :, 0, ::2] + 1j * x[0, :, 0, 1::2]) * np.exp(1j * angles)
          for x in (q, k))
  np.testing.assert_allclose(found, np.real(q @ np.conj(k).T), atol=1e-5)


def test_mscale_of_deepseek():
  attention = jaxlm.preset("deepseek-v3").attention
  _, factor = frequencies(attention.rope, attention.rope_head_dim)
  assert factor == 1
  scale = attention.query_scale * 192 ** 0.5
  assert scale == pytest.approx((0.1 * np.log(40) + 1) ** 2)


def test_rotation_turns_halves_and_depends_on_distance_alone():
  head_dim = 6
  config = RopeConfig(100.0)
  radians, _ = frequencies(config, head_dim)
  unit = jnp.zeros((1, 1, 1, head_dim)).at[..., 1].set(1.0)
  at = lambda p: rotate(unit, rope_table(config, head_dim, jnp.array([[p]])))
  turned = at(5)[0, 0, 0]
  # Component 1 of the first half turns into component 1 of the second.
  expected = np.zeros(head_dim)
  expected[1], expected[4] = np.cos(5 * radians[1]), np.sin(5 * radians[1])
  np.testing.assert_allclose(turned, expected, atol=1e-6)
  near, far = (float(jnp.vdot(at(p), at(p + 7))) for p in (2, 1002))
  assert near == pytest.approx(far, abs=1e-4)
  assert near == pytest.approx(np.cos(7 * radians[1]), abs=1e-6)
