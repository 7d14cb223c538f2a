"""The TPU kernels' forward pass, in Pallas's interpreters."""
import functools

from jax.experimental.pallas import tpu as pltpu
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.windowed_attention import (reference, tpu, tpu_running,
                                               windowed_attention)
from pallas_kernels.windowed_attention.options import Options
from pallas_kernels.windowed_attention.tpu_blocks import (Blocks, FoldBlocks,
                                                          RunningBlocks)

pytestmark = pytest.mark.usefixtures("quick_compile")

SMALL = RunningBlocks(128, 256)

# Name: sizes (B, T, S, K, G, H), options, blocks.
CASES = {
    "full": ((2, 300, 300, 2, 2, 16), dict(sinks=True), None),
    "full, many blocks": ((1, 700, 700, 1, 2, 32), dict(sinks=True), SMALL),
    "window of one": ((1, 300, 300, 3, 1, 96), dict(window=1, sinks=True),
                      SMALL),
    "odd window, a block's edge": ((1, 513, 513, 1, 4, 16),
                                   dict(window=129, sinks=True), SMALL),
    "odd window": ((2, 389, 389, 2, 1, 48), dict(window=37), SMALL),
    "window past the end": ((1, 150, 150, 1, 2, 64), dict(window=151), None),
    "window over blocks": ((1, 900, 900, 1, 2, 32), dict(window=300),
                           RunningBlocks(256, 128)),
    "capped": ((2, 267, 267, 1, 4, 16), dict(soft_cap=1.5, sinks=True), SMALL),
    "capped, folds otherwise": ((1, 267, 267, 1, 4, 16),
                                dict(window=128, soft_cap=1.5), None),
    "segments": ((3, 301, 301, 1, 2, 16), dict(segments=True, sinks=True),
                 SMALL),
    "window, segments": ((2, 523, 523, 2, 1, 32),
                         dict(window=128, segments=True), SMALL),
    "offset, window": ((1, 131, 331, 2, 1, 16),
                       dict(window=50, q_offset=73), SMALL),
    "offset, everything": ((2, 131, 411, 1, 4, 16), dict(
        window=200, q_offset=280, segments=True, sinks=True, soft_cap=2.),
        SMALL),
    "one query": ((2, 1, 300, 2, 4, 64), dict(q_offset=299, sinks=True), None),
    "one token": ((3, 1, 1, 2, 1, 16), dict(window=1, sinks=True), None),
    "fold: gpt-oss": ((1, 389, 389, 2, 8, 64), dict(window=128, sinks=True),
                      None),
    "fold: rows of 64": ((2, 600, 600, 1, 4, 64), dict(window=128, sinks=True),
                         FoldBlocks(256, 64, 2, 3, 2)),
    "fold: rows of 32": ((1, 500, 500, 1, 8, 32), dict(window=256),
                         FoldBlocks(256, 32, 8, 0, 0)),
    "fold: a head alone": ((1, 700, 700, 3, 1, 96), dict(window=256),
                           FoldBlocks(512, 128, 1, 1, 3)),
    "fold: wide": ((1, 800, 800, 1, 2, 256), dict(window=512), None),
    "fold: more keys than queries": ((1, 200, 700, 2, 2, 16),
                                     dict(window=128), None),
}


def inputs(sizes, options, dtype):
  batch, t, s, kv_heads, group, head_dim = sizes
  random = np.random.default_rng(t + s)
  def normal(*shape):
    return random.normal(size=shape).astype(jnp.bfloat16).astype(dtype)
  q = normal(batch, t, kv_heads * group, head_dim)
  k, v = (normal(batch, s, kv_heads, head_dim) for _ in range(2))
  sinks = 2 + normal(kv_heads * group) if options.get("sinks") else None
  segments = None
  if options.get("segments"):  # uneven runs; id 1 belongs to nobody
    segments = np.sort(random.choice([-7, 0, 2, 900], (batch, s)), axis=1)
    first = options.get("q_offset", 0)
    segments = segments[:, first:first + t], segments
  return q, k, v, sinks, segments


def run(case, implementation, dtype=jnp.float32, interpret=True, **changed):
  """The output and, of the kernel, the log of the denominator."""
  sizes, options, blocks = CASES[case]
  blocks = None if blocks is None else Blocks(blocks)
  options = dict(options)
  args = inputs(sizes, options, dtype)
  for given_as_arrays in ("sinks", "segments"):
    options.pop(given_as_arrays, None)
  options = Options(**dict(window=None, scale=1.5 / sizes[-1] ** 0.5,
                           blocks=blocks, interpret=interpret)
                    | options | changed)
  return jax.jit(functools.partial(implementation, options=options))(*args)


def lse_by_reference(q, k, v, sinks, segments, options):
  """The logarithm of the denominator: a value of ones that sinks dilute."""
  q, k = (x.astype(jnp.float32) for x in (q, k))
  k_BSNH = jnp.repeat(k, q.shape[2] // k.shape[2], 2)
  s = options.scale * jnp.einsum("BTNH,BSNH->BNTS", q, k_BSNH)
  if options.soft_cap is not None:
    s = options.soft_cap * jnp.tanh(s / options.soft_cap)
  position = options.q_offset + jnp.arange(q.shape[1])
  seen = reference.visible(position, jnp.arange(k.shape[1]), options.window)
  if segments is not None:
    seen = seen & (segments[0][..., None] == segments[1][:, None])[:, None]
  lse = jax.nn.logsumexp(jnp.where(seen, s, -jnp.inf), -1)
  return lse if sinks is None else jnp.logaddexp(lse, sinks[:, None])


@pytest.mark.parametrize("case", CASES)
def test_output_and_denominator_are_the_references(case):
  o, lse = run(case, tpu.forward)
  np.testing.assert_allclose(o, run(case, reference.windowed_attention),
                             rtol=2e-5, atol=4e-6)
  np.testing.assert_allclose(lse, run(case, lse_by_reference), rtol=2e-6,
                             atol=4e-6)


@pytest.mark.parametrize("case", ["segments", "fold: gpt-oss",
                                  "fold: rows of 64"])
def test_bfloat16_has_its_softmax_in_float32(case):
  o, lse = run(case, tpu.forward, jnp.bfloat16)
  expected = run(case, reference.windowed_attention, jnp.bfloat16)
  assert o.dtype == jnp.bfloat16
  a, b = (np.asarray(x, np.float32) for x in (o, expected))
  assert np.linalg.norm(a - b) <= 2 ** -7 * np.linalg.norm(b)
  # Scores differ by the rounding of the keys times the scale.
  np.testing.assert_allclose(lse, run(case, lse_by_reference, jnp.bfloat16),
                             atol=0.02)


@pytest.mark.parametrize("case", ["capped", "fold: rows of 64"])
def test_large_scores_neither_overflow_nor_vanish(case):
  o, lse = run(case, tpu.forward, scale=20., soft_cap=None)
  assert np.abs(lse).max() > 400
  np.testing.assert_allclose(
      o, run(case, reference.windowed_attention, scale=20., soft_cap=None),
      rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("case", ["window, segments", "fold: rows of 64"])
def test_without_races_as_a_tpu_runs_it(case, capfd):
  o, _ = run(case, tpu.forward,
             interpret=pltpu.InterpretParams(detect_races=True))
  np.testing.assert_allclose(o, run(case, reference.windowed_attention),
                             rtol=2e-5, atol=4e-6)
  printed = capfd.readouterr()
  assert "race" not in (printed.out + printed.err).lower()


def test_by_name_of_the_public_op():
  q, k, v, sinks, _ = inputs((1, 260, 260, 1, 2, 16), dict(sinks=True),
                             jnp.float32)
  found, expected = (
      windowed_attention(q, k, v, window=130, scale=0.3, sinks_N=sinks,
                         implementation=name, interpret=True)
      for name in ("pallas-tpu", "reference"))
  np.testing.assert_allclose(found, expected, rtol=2e-5, atol=4e-6)


@pytest.mark.parametrize("queries, keys", [(128, 256), (256, 128)])
@pytest.mark.parametrize("window, q_offset", [
    (None, 0), (1, 0), (128, 0), (129, 0), (130, 5), (300, 128), (None, 200)])
def test_only_blocks_of_the_band_are_visited(queries, keys, window, q_offset):
  num_queries, num_keys = 1024, 1280
  seen = reference.visible(q_offset + jnp.arange(num_queries),
                           jnp.arange(num_keys), window)
  touched = seen.reshape(num_queries // queries, queries,
                         num_keys // keys, keys).any((1, 3))
  np.testing.assert_array_equal(
      tpu_running.pairs(num_queries, queries, keys,
                        Options(window, 1., q_offset=q_offset)),
      np.nonzero(touched))


@pytest.mark.parametrize("make", [
    lambda: RunningBlocks(100, 128), lambda: RunningBlocks(128, 0),
    lambda: FoldBlocks(rows=48), lambda: FoldBlocks(rows=64, heads=3),
    lambda: FoldBlocks(lead=-1),
    lambda: run("fold: wide", tpu.forward, blocks=Blocks(FoldBlocks(640))),
    lambda: run("fold: wide", tpu.forward,
                blocks=Blocks(FoldBlocks(512, 128, 4))),
    lambda: run("segments", tpu.forward, blocks=Blocks(FoldBlocks(512))),
    lambda: run("full", tpu.forward, blocks=SMALL)])
def test_wrong_blocks_are_refused(make):
  with pytest.raises(ValueError, match="use"):
    make()


@pytest.mark.parametrize("dtypes, head_dim, v_head_dim, reason", [
    (("float32", "float32"), 24, 24, "head_dim=24"),
    (("float32", "float32"), 32, 16, "values' head_dim 16"),
    (("float16", "float16"), 16, 16, "float16"),
    (("float32", "bfloat16"), 16, 16, "cast all")])
def test_what_is_unsupported_says_so(dtypes, head_dim, v_head_dim, reason):
  q = jnp.zeros((1, 3, 2, head_dim), dtypes[0])
  k = jnp.zeros((1, 3, 2, head_dim), dtypes[1])
  v = jnp.zeros((1, 3, 2, v_head_dim), dtypes[1])
  with pytest.raises(NotImplementedError, match=reason):
    windowed_attention(q, k, v, window=2, scale=1.,
                       implementation="pallas-tpu")
