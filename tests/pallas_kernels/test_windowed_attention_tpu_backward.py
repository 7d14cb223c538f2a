"""The TPU backward, interpreted, against the gradient of the reference."""
import functools

import jax
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.windowed_attention import reference, tpu_backward, xla
from pallas_kernels.windowed_attention.options import Options
from pallas_kernels.windowed_attention.tpu_blocks import BackwardBlocks

pytestmark = pytest.mark.usefixtures("quick_compile")

SMALL = BackwardBlocks(rows=128)
V5 = BackwardBlocks(rows=128, lanes=128, sub=32)

# Name: sizes (B, T, S, K, G, H), window, then options.
CASES = {
    "gpt-oss": ((1, 201, 201, 1, 8, 64), 128, dict(sinks=True, blocks=SMALL)),
    "gpt-oss, as on v5": ((1, 201, 201, 1, 8, 64), 128,
                        dict(sinks=True, blocks=V5)),
    "window of one": ((1, 150, 150, 3, 1, 16), 1, dict(sinks=True)),
    "two blocks of rows": ((1, 333, 333, 2, 4, 32), 37,
                           dict(sinks=True, blocks=SMALL)),
    "window past a tile": ((2, 201, 201, 1, 2, 48), 129, dict(blocks=SMALL)),
    "window of three tiles": ((1, 301, 301, 1, 4, 64), 250,
                              dict(blocks=BackwardBlocks(rows=256))),
    "window past the end": ((1, 110, 110, 1, 2, 96), 149, dict(sinks=True)),
    "narrow, segments": ((2, 201, 201, 1, 4, 32), 100,
                         dict(segments=True, sinks=True, blocks=SMALL)),
    "narrow, capped": ((1, 167, 167, 1, 3, 16), 50,
                       dict(soft_cap=1.5, blocks=SMALL)),
    "wide": ((1, 491, 491, 2, 1, 128), 300, dict(blocks=SMALL)),
    "wide, all kinds of blocks": ((1, 650, 650, 1, 2, 32), 384,
                                  dict(blocks=SMALL, sinks=True)),
    "wide, segments, capped": ((2, 400, 400, 1, 4, 16), 280, dict(
        blocks=SMALL, segments=True, soft_cap=1.5, sinks=True)),
    "full": ((1, 329, 329, 1, 8, 32), None, dict(sinks=True, blocks=SMALL)),
    "full, head_dim 256": ((1, 267, 267, 2, 1, 256), None, dict()),
    "full, segments": ((2, 201, 201, 1, 2, 16), None,
                       dict(segments=True, blocks=SMALL)),
    "offset, narrow": ((1, 131, 411, 1, 2, 16), 50,
                       dict(q_offset=173, sinks=True, blocks=SMALL)),
    "offset, full": ((1, 131, 411, 1, 2, 32), None,
                     dict(q_offset=180, segments=True, blocks=SMALL)),
}


def inputs(sizes, options, dtype):
  batch, t, s, kv_heads, group, head_dim = sizes
  random = np.random.default_rng(t + s)
  def normal(*shape):
    return jnp.asarray(random.normal(size=shape), jnp.bfloat16).astype(dtype)
  heads = kv_heads * group
  q, do = (normal(batch, t, heads, head_dim) for _ in range(2))
  k, v = (normal(batch, s, kv_heads, head_dim) for _ in range(2))
  sinks = normal(heads) if options.get("sinks") else None
  segments = None
  if options.get("segments"):
    # Runs of uneven length; id 1 belongs to nobody and -7 is no count.
    segments = np.sort(random.choice([-7, 0, 2, 3, 900], (batch, s)), axis=1)
    segments = jnp.asarray(segments, jnp.int32)
    first = options.get("q_offset", 0)
    segments = segments[:, first:first + t], segments
  return q, k, v, sinks, segments, do


@functools.partial(jax.jit, static_argnums=0)
def expected_gradients(options, q, k, v, sinks, segments, do):
  """Of the reference in float32, and a size of the sums that dsinks are."""
  q, k, v, do = (x.astype(jnp.float32) for x in (q, k, v, do))
  sinks = None if sinks is None else sinks.astype(jnp.float32)
  _, vjp = jax.vjp(lambda *args: reference.windowed_attention(
      *args, segments, options), q, k, v, sinks)
  size = None
  if sinks is not None:
    o, lse_BNT = xla.forward(q, k, v, sinks, segments, options)
    terms = jnp.exp(sinks[:, None] - lse_BNT) * jnp.einsum(
        "BTNH,BTNH->BNT", o, do)
    size = jnp.linalg.norm(terms)
  return dict(zip(("dq", "dk", "dv", "dsinks"), vjp(do))), size


@functools.partial(jax.jit, static_argnums=(0, 1))
def found_gradients(options, blocks, q, k, v, sinks, segments, do):
  o, lse_BNT = xla.forward(q, k, v, sinks, segments, options)
  *gradients, dsinks = tpu_backward.backward(
      *(x.transpose(0, 2, 3, 1) for x in (q, k, v)), sinks, segments,
      o.transpose(0, 2, 3, 1), lse_BNT, do.transpose(0, 2, 3, 1), options,
      blocks)
  return *(x.transpose(0, 3, 1, 2) for x in gradients), dsinks


def both(case, dtype, interpret=True):
  sizes, window, given = CASES[case]
  args = inputs(sizes, given, dtype)
  options = Options(window, sizes[-1] ** -0.5, given.get("soft_cap"),
                    given.get("q_offset", 0), interpret=interpret)
  found = found_gradients(options, given.get("blocks"), *args)
  return (dict(zip(("dq", "dk", "dv", "dsinks"), found)),
          *expected_gradients(options._replace(interpret=False), *args))


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_the_references(case):
  found, expected, _ = both(case, jnp.float32)
  for name, b in expected.items():
    if b is not None:
      np.testing.assert_allclose(found[name], b, rtol=2e-5, err_msg=name,
                                 atol=3e-6 * max(1, np.max(np.abs(b))))


# In bfloat16 the narrow schedule has code of its own.
BFLOAT16 = [case for case in CASES if CASES[case][1] is not None
            and CASES[case][1] < 258] + ["wide, segments, capped", "full"]


@pytest.mark.parametrize("case", BFLOAT16)
def test_in_bfloat16(case):
  found, expected, size_of_sums = both(case, jnp.bfloat16)
  for name, b in expected.items():
    if b is not None:
      # Probabilities, products and results are each rounded to 8 bits; the
      # sinks' gradient is a sum of terms of both signs, of which each is.
      size = size_of_sums if name == "dsinks" else np.linalg.norm(b)
      error = np.linalg.norm(np.asarray(found[name], np.float32) - b)
      assert error <= 2 ** -7 * size, name


def test_queries_and_keys_apart(monkeypatch):
  monkeypatch.setattr(tpu_backward, "RING_BYTES", 0)
  jax.clear_caches()
  for case in "wide, all kinds of blocks", "full":
    found, expected, _ = both(case, jnp.float32)
    for name in "dq", "dk", "dv":
      np.testing.assert_allclose(
          found[name], expected[name], rtol=2e-5, err_msg=name,
          atol=3e-6 * max(1, np.max(np.abs(expected[name]))))
  jax.clear_caches()


@pytest.mark.parametrize("window", [128, 300])
def test_no_races_nor_reads_of_what_was_not_written(window, capfd):
  """In the TPU's interpreter, where memory is NaN until written."""
  args = inputs((1, 512, 512, 1, 4, 16), dict(sinks=True), jnp.bfloat16)
  interpret = pltpu.InterpretParams(detect_races=True)
  options = Options(window, 0.25, interpret=interpret)
  found = found_gradients(options, BackwardBlocks(rows=256, sub=32), *args)
  expected = found_gradients(options._replace(interpret=True),
                             BackwardBlocks(rows=256, sub=32), *args)
  for a, b in zip(found, expected):
    np.testing.assert_allclose(np.asarray(a, np.float32),
                               np.asarray(b, np.float32), rtol=2e-2,
                               atol=1e-2)
  assert "race" not in "".join(capfd.readouterr()).lower()
