import functools

import jax
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.expert_matmul import expert_matmul, reference
from pallas_kernels.expert_matmul import tpu_schedule as schedule
from pallas_kernels.expert_matmul.tpu import Tile, TPUBlocks
from pallas_kernels.quant import FP8, Int8, MXFP4, MXFP4Pairs

pytestmark = pytest.mark.usefixtures("quick_compile")

# Several tiles along every axis.
SMALL = TPUBlocks(Tile(16, 128, 128), Tile(16, 1024, 10 ** 6),
                  Tile(16, 128, 128))
D, F = 160, 300
# Name: (rows, rows of each expert).
SIZES = {"uneven": (41, [20, 3, 0, 17, 1]), "rest": (45, [9, 0, 21, 2, 0]),
         "none": (5, [0, 0, 0]), "one row": (1, [0, 1, 0])}
KINDS = {
    "array": lambda w: w, "int8": Int8.quantize, "fp8": FP8.quantize,
    "mxfp4": lambda w: MXFP4Pairs.quantize(w),
    "mxfp4 gate, up": lambda w: MXFP4Pairs.quantize(w, deinterleave=True)}


def inputs(case, dtype, d=D, f=F):
  rows, sizes = SIZES[case]
  random = np.random.default_rng(rows)
  shapes = (rows, d), (len(sizes), d, f), (len(sizes), f), (rows, f)
  x, w, b, dy = (random.normal(size=shape).astype(jnp.bfloat16).astype(dtype)
                 for shape in shapes)
  return x, w, np.array(sizes, np.int32), b, dy


def quantize(kind, w):
  if kind == "array":
    return w
  return jax.tree.map(jnp.asarray, KINDS[kind](np.asarray(w, np.float32)))


def results(function, x, w, b, q, dy):
  """(y, dx, db, dq[, dw])."""
  if isinstance(w, jax.Array | np.ndarray):
    y, vjp = jax.vjp(lambda x, b, q, w: function(x, w, b, q), x, b, q, w)
  else:
    y, vjp = jax.vjp(lambda x, b, q: function(x, w, b, q), x, b, q)
  return y, *vjp(dy)


@functools.partial(jax.jit, static_argnames=("blocks", "interpret", "limit"))
def kernels(x, w, sizes, b, q, dy, blocks=None, interpret=True, limit=None):
  return results(
      lambda x, w, b, q: expert_matmul(
          x, w, sizes, bias=b, row_weights_M=q, swiglu_limit=limit,
          implementation="pallas-tpu", blocks=blocks, interpret=interpret),
      x, w, b, q, dy)


def meaning(x, w, sizes, b, q, dy, limit=None):
  """In float32, from what the weights are in x's dtype."""
  dtype = x.dtype
  x, b, dy = (jnp.asarray(a, jnp.float32) for a in (x, b, dy))
  w = w.astype(dtype).astype(jnp.float32)
  return results(lambda x, w, b, q: reference.expert_matmul(
      x, w, sizes, b, q, limit), x, w, b, q, dy)


def assert_close(found, expected, dtype):
  """float32: sums in any order; bfloat16: what each step rounds to.

  Gradients are of dy times the row weights, rounded as such, and so have
  half a unit of each of their terms, which average out.
  """
  rounding = 2 ** -7 if dtype == jnp.bfloat16 else 2e-6
  for i, (a, b) in enumerate(zip(found, expected)):
    np.testing.assert_allclose(
        np.asarray(a, np.float32), b, err_msg=f"result {i}", rtol=rounding,
        atol=rounding / 2 * max(1, np.max(np.abs(b))))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients_of_each_format(kind, dtype):
  x, w, sizes, b, dy = inputs("rest", dtype)
  w = quantize(kind, w)
  q = np.random.default_rng(0).uniform(size=len(x)).astype(np.float32)
  found = kernels(x, w, sizes, b, q, dy, SMALL)
  assert found[0].dtype == dtype
  assert_close(found, meaning(x, w, sizes, b, q, dy), dtype)
  assert not np.any(found[0][32:]) and not np.any(found[1][32:])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("kind", ["mxfp4", "mxfp4 gate, up"])
def test_weights_dequantized_at_each_visit(kind, dtype):
  x, w, sizes, b, dy = inputs("rest", dtype, 416)
  w = quantize(kind, w)
  q = np.random.default_rng(0).uniform(size=len(x)).astype(np.float32)
  found = kernels(x, w, sizes, b, q, dy, TPUBlocks(Tile(16, 128, 128, False)))
  assert_close(found, meaning(x, w, sizes, b, q, dy), dtype)


@pytest.mark.parametrize("kind, case, d, f", [
    ("array", "uneven", 7, 9), ("array", "one row", 33, 130),
    ("array", "none", 7, 9), ("mxfp4", "one row", 32, 5),
    ("mxfp4", "uneven", 1088, 130), ("int8", "uneven", 13, 257),
    ("fp8", "none", 129, 11)])
def test_odd_sizes_with_the_default_blocks(kind, case, d, f):
  x, w, sizes, b, dy = inputs(case, jnp.float32, d, f)
  w = quantize(kind, w)
  q = np.ones(len(x), np.float32)
  assert_close(kernels(x, w, sizes, b, q, dy),
               meaning(x, w, sizes, b, q, dy), jnp.float32)


@pytest.mark.parametrize("kind", ["array", "mxfp4", "mxfp4 gate, up"])
def test_swiglu(kind):
  x, w, sizes, b, dy = inputs("uneven", jnp.float32)
  w = quantize(kind, 0.1 * w)
  q = np.random.default_rng(0).uniform(size=len(x)).astype(np.float32)
  args = x, w, sizes, b, q, dy[:, :F // 2]
  blocks = TPUBlocks(Tile(16, 256, 10 ** 6))
  found = kernels(*args, blocks=blocks, limit=1.5)
  assert found[0].shape == (41, F // 2)
  assert_close(found, meaning(*args, limit=1.5), jnp.float32)


def test_swiglu_in_bfloat16_rounds_once():
  x, w, sizes, b, _ = inputs("uneven", jnp.bfloat16)
  w = quantize("mxfp4 gate, up", 0.1 * w)
  found = jax.jit(lambda x, b: expert_matmul(
      x, w, sizes, bias=b, swiglu_limit=1.5, implementation="pallas-tpu",
      interpret=True))(x, b)
  x, b = (jnp.asarray(a, jnp.float32) for a in (x, b))
  expected = reference.expert_matmul(x, w.astype(jnp.float32), sizes, b,
                                     swiglu_limit=1.5)
  np.testing.assert_allclose(np.asarray(found, np.float32), expected,
                             rtol=2 ** -8, atol=1e-5)


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_every_scale_and_nibble_exactly(dtype, keep):
  # Output s of expert 0 has scale s; expert 1 has none above 240. One row
  # for each input picks the weights themselves.
  blocks = np.tile(np.arange(16, dtype=np.uint8) * 17, (2, 256, 6, 1))
  scales = np.tile(np.arange(256, dtype=np.uint8)[:, None], (2, 1, 6))
  scales[1] = np.minimum(scales[1], 240)
  w = jax.tree.map(jnp.asarray,
                   MXFP4Pairs.from_mxfp4(MXFP4(blocks, scales)))
  x = np.tile(np.eye(192, dtype=np.float32), (2, 1)).astype(dtype)
  y = jax.jit(lambda x: expert_matmul(
      x, w, np.array([192, 192]), implementation="pallas-tpu",
      blocks=TPUBlocks(Tile(64, 256, 128, keep)), interpret=True))(x)
  with np.errstate(over="ignore", under="ignore"):
    expected = np.asarray(MXFP4(blocks, scales).dequantize(np.float32))
    expected = expected.astype(dtype).astype(np.float32).reshape(384, 256)
  # Infinite and NaN weights of a column are multiplied by zeros too.
  finite = np.isfinite(expected).reshape(2, 192, 256).all(1).repeat(192, 0)
  assert finite.mean() > 0.98 and np.isnan(y[:192, 255]).all()
  flushed = np.where(np.abs(expected) < 2.0 ** -126, 0, expected)
  np.testing.assert_array_equal(np.asarray(y, np.float32)[finite],
                                flushed[finite])


@pytest.mark.parametrize("kind", ["array", "mxfp4 gate, up"])
def test_on_a_simulated_tpu_without_races(kind, capfd):
  # Tile by tile in memory that starts as NaN, with copies as they may happen.
  x, w, sizes, b, dy = inputs("rest", jnp.bfloat16, 64, 280)
  w = quantize(kind, w)
  q = np.ones(len(x), np.float32)
  limit = 3. if kind != "array" else None
  dy = dy[:, :140] if limit else dy
  interpret = pltpu.InterpretParams(detect_races=True)
  blocks = TPUBlocks(Tile(16, 256, 10 ** 6, kind == "array"), None,
                     Tile(32, 256, 64))
  if limit is None:
    found = kernels(x, w, sizes, b, q, dy, blocks, interpret)
    assert_close(found, meaning(x, w, sizes, b, q, dy), jnp.bfloat16)
  else:
    found = jax.jit(lambda x: expert_matmul(
        x, w, sizes, bias=b, swiglu_limit=limit, implementation="pallas-tpu",
        blocks=blocks, interpret=interpret))(x)
    assert_close([found], meaning(x, w, sizes, b, q, dy, limit),
                 jnp.bfloat16)
  assert "race" not in capfd.readouterr().out.lower()


@pytest.mark.parametrize("rows", [1, 8, 64])
@pytest.mark.parametrize("of_each_expert", [False, True])
def test_visits_cover_each_row_once_in_order(rows, of_each_expert):
  random = np.random.default_rng(rows)
  run = jax.jit(functools.partial(schedule.visits, num_rows=50, rows=rows,
                                  of_each_expert=of_each_expert))
  for _ in range(50):
    sizes = random.multinomial(random.integers(51), np.ones(6) / 6)
    sizes = sizes * random.integers(0, 2, 6)
    v = jax.tree.map(np.asarray, run(sizes))
    count = int(v.count)
    assert count <= len(v.expert)
    expected = np.repeat(np.arange(6), sizes)
    found = np.full(50, -1)
    for i in range(count):
      tile = np.arange(v.row_tile[i] * rows, (v.row_tile[i] + 1) * rows)
      mine = tile[(tile >= v.start[i]) & (tile < v.end[i])]
      assert np.all(found[mine] == -1)
      found[mine] = v.expert[i]
      for flag, x in ((schedule.NEW_EXPERT, v.expert),
                      (schedule.NEW_TILE, v.row_tile)):
        assert bool(v.flags[i] & flag) == (i == 0 or x[i] != x[i - 1])
    np.testing.assert_array_equal(found[:len(expected)], expected)
    assert np.all(found[len(expected):] == -1)
    assert np.all(np.diff(v.expert[:count]) >= 0)
    needed = range(6) if of_each_expert else range(-(-50 // rows))
    visited = v.expert if of_each_expert else v.row_tile
    assert set(needed) == set(visited[:count])


@pytest.mark.parametrize("change, error, message", [
    (dict(w="published"), NotImplementedError, "MXFP4Pairs.from_mxfp4"),
    (dict(blocks=(16, 128)), NotImplementedError, "blocks are tuple"),
    (dict(blocks=TPUBlocks(Tile(12, 128, 128))), ValueError, "rows=12 is not"),
    (dict(blocks=TPUBlocks(Tile(16, 100, 128))), ValueError,
     "columns=100 is neither all 384"),
    (dict(blocks=TPUBlocks(Tile(16, 128, 64))), ValueError, "depth=64"),
    (dict(w="int8", blocks=TPUBlocks(Tile(16, 128, 128, False))), ValueError,
     "keep=False is for MXFP4"),
    (dict(interpret=False), NotImplementedError, "not on cpu"),
])
def test_errors_say_what_would_do(change, error, message):
  x, w, sizes, _, _ = inputs("uneven", jnp.float32)
  kind = change.get("w", "mxfp4")
  leaf = MXFP4.quantize(w) if kind == "published" else quantize(kind, w)
  options = dict(implementation="pallas-tpu", interpret=True) | change
  options.pop("w", None)
  with pytest.raises(error, match=message):
    expert_matmul(x, leaf, sizes, **options)
