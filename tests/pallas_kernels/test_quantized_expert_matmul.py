"""Quantized weights, and what is fused to the matmul, on the CPU."""
import functools

from hypothesis import given, settings
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pallas_kernels.expert_matmul import expert_matmul, reference
from pallas_kernels.quant import FORMATS, FP8, MXFP4, MXFP4Pairs

pytestmark = pytest.mark.usefixtures("quick_compile")

KINDS = FORMATS | {"mxfp4 pairs": MXFP4Pairs}
ROWS, D, F = 41, 96, 38
SIZES = np.array([20, 3, 0, 15, 1, 0], np.int32)
TINY = 2.0 ** -126  # what is less is zero to a CPU's matmul


@functools.cache
def weights(kind, d=D, f=F, experts=len(SIZES)):
  w = np.random.default_rng(d).normal(size=(experts, d, f)).astype(np.float32)
  if kind == "array":
    return jnp.array(w)
  return jax.tree.map(jnp.asarray, KINDS[kind].quantize(w))


def inputs(limit, dtype, rows=ROWS, d=D, f=F, experts=len(SIZES)):
  random = np.random.default_rng(rows)
  def normal(*shape):
    x = random.normal(size=shape).astype(jnp.bfloat16)
    return jnp.array(x.astype(dtype))
  return (normal(rows, d), normal(experts, f), normal(rows),
          normal(rows, f if limit is None else f // 2))


@functools.partial(jax.jit, static_argnums=(0, 1))
def results(implementation, limit, w, sizes, x, bias, scale, dy):
  """(y, dx, dbias, drow_weights), and dw of an array."""
  exact = functools.partial(reference.expert_matmul, swiglu_limit=limit)
  def function(x, bias, scale, *w_if_array):
    w_, = w_if_array or (w,)
    if implementation == "reference":
      return exact(x, w_, sizes, bias, scale)
    return expert_matmul(x, w_, sizes, bias=bias, row_weights_M=scale,
                         swiglu_limit=limit, implementation=implementation)
  arrays = (w,) if isinstance(w, jax.Array) else ()
  y, vjp = jax.vjp(function, x, bias, scale, *arrays)
  return y, *vjp(dy)


def assert_close(found, expected, dtype=jnp.float32):
  """As sums in another order differ; in bfloat16 what is kept between two
  matmuls and a gradient is rounded too, twice at most."""
  rounding = 1e-5 if dtype == jnp.float32 else 2 ** -7
  for a, b in zip(found, expected, strict=True):
    assert a.dtype == dtype
    np.testing.assert_allclose(np.asarray(a, np.float32), b, rtol=rounding,
                               atol=rounding * np.max(np.abs(b)))


@pytest.mark.parametrize("limit", [None, 1.5])
@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients_are_the_references(kind, limit):
  args = weights(kind), SIZES, *inputs(limit, jnp.float32)
  assert_close(results("xla", limit, *args),
               results("reference", limit, *args))


@pytest.mark.parametrize("implementation", ["xla", "ragged"])
@pytest.mark.parametrize("limit", [None, 1.5])
def test_fused_forms_of_arrays_are_the_references(implementation, limit):
  args = weights("array"), SIZES, *inputs(limit, jnp.float32)
  assert_close(results(implementation, limit, *args),
               results("reference", limit, *args))


@pytest.mark.parametrize("kind", [*KINDS, "array"])
def test_bfloat16_is_summed_in_float32(kind):
  w = weights(kind)
  exact = results("reference", None, w, SIZES, *inputs(None, jnp.float32))
  if kind == "array":
    w = w.astype(jnp.bfloat16)
    exact = results("reference", None, w.astype(jnp.float32), SIZES,
                    *inputs(None, jnp.float32))
  found = results("xla", None, w, SIZES, *inputs(None, jnp.bfloat16))
  assert_close(found, exact, jnp.bfloat16)


@pytest.mark.parametrize("kind", [*FORMATS, "array"])
def test_several_tiles_and_blocks_of_rows_an_expert(kind):
  # A forward tile has 256 outputs, a gradient's 1024: the last ones overlap.
  rows, d, f = 37, 2048, 1100
  sizes = np.array([0, 36], np.int32)
  args = weights(kind, d, f, 2), sizes, *inputs(None, jnp.float32, rows, d, f,
                                                2)
  assert_close(results("xla", None, *args), results("reference", None, *args))


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, ROWS), min_size=5, max_size=5))
def test_any_group_sizes(cuts):
  edges = [0, *sorted(cuts)]
  sizes = np.diff([*edges, edges[-1]]).astype(np.int32)
  args = weights("mxfp4"), sizes, *inputs(1.5, jnp.float32)
  assert_close(results("xla", 1.5, *args), results("reference", 1.5, *args))


def test_several_seeds_at_once_under_vmap():
  sizes = jnp.array([SIZES, np.roll(SIZES, 2), [0, 0, 0, 41, 0, 0]])
  x, bias, scale, dy = inputs(1.5, jnp.float32)
  w = weights("mxfp4")
  together = jax.vmap(
      lambda sizes: results("xla", 1.5, w, sizes, x, bias, scale, dy))(sizes)
  for i, one in enumerate(sizes):
    assert_close([result[i] for result in together],
                 results("reference", 1.5, w, one, x, bias, scale, dy))


@pytest.mark.parametrize("kind", KINDS)
def test_experts_without_rows_are_not_multiplied(kind):
  """Theirs are not a number, which times zero would show."""
  w = weights(kind)
  idle = np.flatnonzero(SIZES == 0)
  part = "pair_scales" if kind == "mxfp4 pairs" else list(w.PARTS)[1]
  poison = 255 if "mxfp4" in kind else np.nan
  leaves = vars(w) | {part: getattr(w, part).at[idle].set(poison)}
  args = inputs(None, jnp.float32)
  found = results("xla", None, type(w)(**leaves), SIZES, *args)
  assert_close(found, results("reference", None, w, SIZES, *args))


def tile_of(leaf):
  """All outputs of the first expert, [in, out], as a matmul sees them."""
  planes = jax.jit(lambda leaf: leaf.tiles()(0, 0, leaf.shape[-1]))(leaf)
  return np.stack(planes, -1).reshape(leaf.shape[-1], -1).T


def assert_same_but_tiny(found, expected):
  expected = np.where(np.abs(expected) < TINY, 0, expected)
  np.testing.assert_array_equal(found, expected)


def test_every_nibble_under_every_scale_byte_of_mxfp4():
  nibble = np.arange(32, dtype=np.uint8) % 16
  blocks = np.tile(nibble[::2] | nibble[1::2] << 4, (1, 256, 1, 1))
  leaf = MXFP4(blocks, np.arange(256, dtype=np.uint8).reshape(1, 256, 1))
  found = tile_of(leaf)
  assert_same_but_tiny(found, leaf.dequantize(np.float32)[0])
  assert np.isnan(found[:, 255]).all() and not np.isnan(found[:, :255]).any()


def test_every_byte_of_fp8_under_scales_small_and_large():
  bytes_ = np.tile(np.arange(256, dtype=np.uint8), (1, 300, 1))
  scales = np.float32(2.0) ** np.array([[-126, 3], [127, 119], [-100, 120]])
  leaf = FP8(bytes_.view(ml_dtypes.float8_e4m3fn),
             (scales * np.float32(1.25))[None])
  with np.errstate(over="ignore"):
    expected = leaf.dequantize(np.float32)[0]
  assert_same_but_tiny(tile_of(leaf), expected)


@settings(max_examples=30, deadline=None)
@given(st.sampled_from([*FORMATS]), st.integers(0, 2 ** 32 - 1))
def test_tiles_are_what_dequantize_gives(kind, seed):
  w = np.random.default_rng(seed).normal(size=(1, 160, 7)) * 2.0 ** (
      seed % 60 - 30)
  leaf = FORMATS[kind].quantize(w.astype(np.float32))
  assert_same_but_tiny(tile_of(leaf), leaf.dequantize(np.float32)[0])


@pytest.mark.parametrize("sizes", [
    np.eye(64, dtype=int)[17] * 3, np.arange(64) % 21 == 1,
    np.arange(64) % 3 == 0, np.full(64, 1)])
@pytest.mark.parametrize("kind", ["mxfp4", "fp8"])
def test_cost_follows_the_rows(kind, sizes, executed_flops):
  rows = int(np.sum(sizes))
  w = weights(kind, D, F, 64)
  x, *_ = inputs(None, jnp.float32, rows)
  flops = executed_flops(
      lambda x, w, sizes: expert_matmul(x, w, sizes, implementation="xla"),
      x, w, jnp.array(sizes, jnp.int32))
  needed = 2 * D * F * rows
  # Three rows are computed as four, or as three if there are no more.
  assert needed <= flops <= needed * 4 / 3


@pytest.mark.parametrize("rows", [1, 64])
def test_no_expert_is_dequantized_whole(rows, largest_array):
  """At gpt-oss-20b's sizes, whose experts have 16.6 million weights."""
  experts, d, f = 32, 2880, 5760
  parts = [jax.ShapeDtypeStruct(shape, np.uint8)
           for shape in MXFP4.part_shapes((experts, d, f))]
  x = jax.ShapeDtypeStruct((rows, d), jnp.bfloat16)
  sizes = jax.ShapeDtypeStruct((experts,), np.int32)
  run = functools.partial(expert_matmul, swiglu_limit=7.0,
                          implementation="xla")
  largest = largest_array(run, x, MXFP4(*parts), sizes)
  assert largest <= max(2 ** 19, rows * f)


@pytest.mark.parametrize("kind", ["array", "mxfp4", "fp8"])
def test_narrow_weights_are_not_widened_whole(kind):
  """XLA would, given the chance: nothing is as large as the weights."""
  w = weights(kind, 64, 96, 128)
  w = w.astype(jnp.bfloat16) if kind == "array" else w
  x = jnp.zeros((3, 64), jnp.bfloat16)
  compiled = jax.jit(expert_matmul, compiler_options={
      "xla_backend_optimization_level": 0}).lower(
          x, w, jnp.zeros(128, jnp.int32)).compile()
  temporary = compiled.memory_analysis().temp_size_in_bytes
  assert temporary < sum(x.nbytes for x in jax.tree.leaves(w)) / 4
