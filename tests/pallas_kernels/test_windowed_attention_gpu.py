import functools
import inspect

import jax
from jax import export
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.windowed_attention import (cached_attention, decode_gpu,
                                               gpu, windowed_attention)
from pallas_kernels.windowed_attention.gpu_tiles import Problem, Tile
from pallas_kernels.windowed_attention.options import Options

pytestmark = pytest.mark.usefixtures("quick_compile")

SMALL = gpu.Blocks(*[Tile(32, 16, 4, 2)] * 3)
UNEVEN = gpu.Blocks(Tile(16, 32, 4, 2), Tile(64, 16, 4, 2),
                    Tile(16, 32, 4, 1))

# Name: sizes (B, T, S, K, G, H), then options. SMALL tiles unless named.
CASES = {
    "shorter than a tile": ((2, 5, 5, 1, 3, 40), dict(sinks=True)),
    "full": ((2, 83, 83, 1, 2, 24), dict(sinks=True, soft_cap=1.5)),
    "gpt-oss": ((1, 203, 203, 2, 8, 64),
                dict(window=128, sinks=True, blocks=None)),
    "many blocks in a window": ((1, 150, 150, 2, 4, 5), dict(window=77)),
    "window of one": ((1, 70, 70, 3, 2, 17), dict(window=1, sinks=True)),
    "window past the end": ((1, 50, 50, 1, 1, 9),
                            dict(window=51, blocks=UNEVEN)),
    "six heads to one, two at a time": ((1, 75, 75, 2, 6, 12),
                                        dict(window=37, blocks=UNEVEN)),
    "segments": ((2, 91, 91, 2, 1, 20),
                 dict(window=40, segments=True, sinks=True)),
    "full, segments, capped": ((2, 69, 69, 1, 3, 11),
                               dict(segments=True, soft_cap=0.7)),
    "offset": ((2, 47, 131, 1, 2, 7),
               dict(window=50, q_offset=73, segments=True)),
    "offset, full": ((1, 41, 97, 2, 3, 6),
                     dict(q_offset=50, sinks=True, blocks=UNEVEN)),
    "one query": ((3, 1, 61, 2, 4, 19), dict(window=30, q_offset=60)),
    "narrow values, negative scale": ((1, 71, 71, 2, 2, 33),
                                      dict(v_head_dim=12, scale=-0.3)),
    "wide values": ((1, 45, 45, 1, 2, 4),
                    dict(v_head_dim=21, window=20, sinks=True)),
}
WIDE = {
    "head_dim 96": ((1, 150, 150, 1, 4, 96), dict(window=100, blocks=None)),
    "head_dim 128": ((1, 147, 147, 1, 1, 128), dict(blocks=None)),
    "head_dim 256": ((1, 139, 139, 1, 2, 256),
                     dict(window=64, blocks=None, sinks=True)),
    "head_dim 64": ((1, 157, 157, 1, 8, 64),
                    dict(window=31, blocks=None, sinks=True, segments=True)),
}


def inputs(sizes, options, dtype=jnp.float32):
  """((q, k, v, sinks or None, segments or None), cotangent)."""
  batch, t, s, kv_heads, group, head_dim = sizes
  random = np.random.default_rng(t + s)
  def normal(*shape):
    return random.normal(size=shape).astype(jnp.bfloat16).astype(dtype)
  v_head_dim = options.get("v_head_dim", head_dim)
  q, do = (normal(batch, t, kv_heads * group, dim)
           for dim in (head_dim, v_head_dim))
  k, v = (normal(batch, s, kv_heads, dim) for dim in (head_dim, v_head_dim))
  sinks = normal(kv_heads * group) if options.get("sinks") else None
  segments = None
  if options.get("segments"):
    # Runs of uneven length; id 1 belongs to nobody and -7 is no count.
    segments = np.sort(random.choice([-7, 0, 2, 3, 900], (batch, s)), axis=1)
    segments = segments.astype(np.int32)
  return (q, k, v, sinks, segments), do


@functools.partial(jax.jit, static_argnums=(0, 1))
def results(implementation, options, q, k, v, sinks, segments, do):
  """The output and the gradients, by name."""
  options = {"window": None, "scale": q.shape[3] ** -0.5} | dict(options)
  for given_as_arrays in ("sinks", "segments", "v_head_dim"):
    options.pop(given_as_arrays, None)
  blocks = options.pop("blocks", SMALL)
  if implementation == "pallas-gpu":
    options |= dict(blocks=blocks, interpret=True)
  function = lambda q, k, v, sinks: windowed_attention(
      q, k, v, sinks_N=sinks, segment_ids=segments,
      implementation=implementation, **options)
  o, vjp = jax.vjp(function, q, k, v, sinks)
  return dict(o=o, **dict(zip(("dq", "dk", "dv", "dsinks"), vjp(do))))


def both(case, dtype=jnp.float32):
  """What the kernels find in `dtype`, and the reference in float32."""
  sizes, options = case
  items = tuple(options.items())
  args, do = inputs(sizes, options, dtype)
  found = results("pallas-gpu", items, *args, do)
  args, do = inputs(sizes, options)
  return found, results("reference", items, *args, do)


@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_are_the_references(case):
  found, expected = both(CASES[case])
  for name, b in expected.items():
    if b is not None:
      # Sums of float32 in another order, exp2 for exp.
      np.testing.assert_allclose(found[name], b, rtol=2e-5, err_msg=name,
                                 atol=3e-6 * max(1, np.max(np.abs(b))))


@pytest.mark.parametrize("case", WIDE)
def test_bfloat16_has_its_softmax_in_float32(case):
  found, expected = both(WIDE[case], jnp.bfloat16)
  for name, b in expected.items():
    if b is not None:
      # Probabilities, products and results are each rounded to 8 bits.
      a = np.asarray(found[name], np.float32)
      assert found[name].dtype == jnp.bfloat16, name
      assert np.linalg.norm(a - b) <= 2 ** -7 * np.linalg.norm(b), name


@pytest.mark.parametrize("window", [None, 1, 5, 16, 33, 64, 1000])
@pytest.mark.parametrize("rows,keys,group", [(16, 16, 1), (32, 16, 4),
                                             (16, 64, 8)])
def test_blocks_are_those_of_the_band(window, rows, keys, group):
  num_queries, num_keys, q_offset = 75, 131, 37
  problem = Problem(
      num_queries, num_keys, 3 * group, 3, 8, 8, jnp.dtype("float32"), False,
      Options(window, 1.0, q_offset=q_offset), Tile(rows, keys, 4, 2))
  q_position = q_offset + np.arange(num_queries)[:, None]
  seen = np.arange(num_keys) <= q_position
  if window is not None:
    seen &= q_position - np.arange(num_keys) < window

  def check(seen_AB, complete, first, count, full_from, full_to, size):
    """Of one tile A: its blocks of B hold all it sees and none is in vain;
    those without a mask are those that all of A sees, if A is `complete`."""
    first, count, full_from, full_to = map(int, (first, count, full_from,
                                                 full_to))
    some_B, all_B = seen_AB.any(0), seen_AB.all(0)
    inside = np.zeros_like(some_B)
    inside[first:first + count * size] = True
    assert not np.any(some_B & ~inside)
    for i in range(count):
      block = slice(first + i * size, first + (i + 1) * size)
      assert some_B[block].any()
      whole = len(all_B[block]) == size and all_B[block].all()
      assert whole >= (full_from <= i < full_to), (first, i)
      assert whole == (full_from <= i < full_to) or not complete, (first, i)

  for token in range(0, num_queries, problem.tokens):
    check(seen[token:token + problem.tokens],
          token + problem.tokens <= num_queries, *problem.key_blocks(token),
          keys)
  for key in range(0, num_keys, keys):
    check(seen[:, key:key + keys].T, key + keys <= num_keys,
          *problem.query_blocks(key), problem.tokens)


# Name: sizes (B, T, S, K, G, H, the values' H), then options.
CACHED = {
    "ring": ((3, 1, 37, 2, 4, 20, 20), dict(window=37, sinks=True)),
    "window inside the cache": ((2, 1, 150, 1, 8, 64, 64),
                                dict(window=50, sinks=True)),
    "guesses": ((3, 4, 61, 2, 3, 9, 13), dict(window=57, soft_cap=1.5)),
    "full, in parts": ((2, 3, 131, 3, 2, 12, 12),
                       dict(sinks=True, slots=16, parts=3)),
    "long parts, narrow window": ((2, 1, 400, 1, 2, 5, 5),
                                  dict(window=33, slots=16, parts=2)),
    "more rows than a tile": ((1, 9, 53, 2, 10, 7, 7),
                              dict(slots=32, parts=2)),
}


def cache(sizes, options, dtype=jnp.float32):
  """Arguments of cached_attention: rows of unequal lengths, slots shuffled,
  some empty, some with guesses that failed, and queries that are padding."""
  batch, t, s, kv_heads, group, head_dim, v_head_dim = sizes
  random = np.random.default_rng(s)
  normal = lambda *shape: random.normal(size=shape).astype(
      jnp.bfloat16).astype(dtype)
  q = normal(batch, t, kv_heads * group, head_dim)
  k_own, v_own = (normal(batch, t, kv_heads, d) for d in (head_dim, v_head_dim))
  k, v = (normal(batch, s, kv_heads, d) for d in (head_dim, v_head_dim))
  # The last row has a short past, the others more than the cache holds.
  first = np.where(np.arange(batch) < batch - 1, s + 5, s // 3)
  q_positions = first[:, None] + np.arange(t)
  k_positions = first[:, None] - s + 2 + np.arange(s)
  k_positions = np.maximum(k_positions, -1)
  for row in k_positions:
    random.shuffle(row)
  if t > 1:
    q_positions[0, -1] = -1
  sinks = normal(kv_heads * group) if options.get("sinks") else None
  return (q, k_own, v_own, k, v, q_positions.astype(np.int32),
          k_positions.astype(np.int32), sinks)


def run_cached(implementation, sizes, options, dtype=jnp.float32):
  *arrays, sinks = cache(sizes, options, dtype)
  options = {"window": None} | options
  slots, parts = options.pop("slots", 64), options.pop("parts", None)
  options["sinks_N"] = sinks
  options.pop("sinks", None)
  if implementation == "pallas-gpu":
    options |= dict(interpret=True,
                    blocks=decode_gpu.DecodeBlocks(slots, parts=parts))
  return jax.jit(functools.partial(
      cached_attention, scale=0.4, implementation=implementation,
      **options))(*arrays)


@pytest.mark.parametrize("case", CACHED)
def test_attention_over_a_cache_is_the_references(case):
  found = run_cached("pallas-gpu", *CACHED[case])
  expected = run_cached("reference", *CACHED[case])
  np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-6)


def test_attention_over_a_cache_in_bfloat16():
  sizes, options = CACHED["full, in parts"]
  found = np.asarray(run_cached("pallas-gpu", sizes, options, jnp.bfloat16),
                     np.float32)
  expected = run_cached("reference", sizes, options)
  error = np.linalg.norm(found - expected)
  assert error <= 2 ** -7 * np.linalg.norm(expected)


def test_unseen_slots_are_not_read():
  """Past the last slot that is seen, the rest of a part is left out."""
  q, k_own, v_own, k, v, q_positions, k_positions, _ = cache(
      (1, 1, 320, 1, 2, 8, 8), {})
  k_positions = np.where(np.arange(320) < 100, np.arange(320), -1)[None]
  q_positions = np.full((1, 1), 100)
  k[:, 112:] = v[:, 112:] = np.nan
  found = cached_attention(
      q, k_own, v_own, k, v, q_positions, k_positions, window=None, scale=0.4,
      implementation="pallas-gpu", interpret=True,
      blocks=decode_gpu.DecodeBlocks(16, parts=1))
  assert np.isfinite(found).all()


def test_what_is_unsupported():
  q = jnp.ones((1, 3, 2, 8), jnp.bfloat16)
  run = functools.partial(windowed_attention, window=2, scale=1.0,
                          implementation="pallas-gpu")
  with pytest.raises(NotImplementedError, match="bfloat16, float32, bfloat16"):
    run(q, q.astype(jnp.float32), q)
  wide = jnp.ones((1, 3, 2, 257), jnp.bfloat16)
  with pytest.raises(NotImplementedError, match="head_dim of 257"):
    run(q, q, wide)
  with pytest.raises(ValueError, match="gpu.Blocks"):
    run(q, q, q, blocks=(128, 128))
  with pytest.raises(ValueError, match="rows=48"):
    Tile(48, 16, 4, 2)
  with pytest.raises(ValueError, match="stages=0"):
    Tile(32, 16, 4, 0)
  huge = jax.ShapeDtypeStruct((1, 1 << 17, 128, 128), jnp.bfloat16)
  assert "2^31" in gpu.unsupported(huge, huge, huge, None, Options(None, 1.0))


# Name: N, K, H, window, sinks.
MODELS = {
    "gpt-oss-20b sliding": (64, 8, 64, 128, True),
    "gpt-oss-20b full": (64, 8, 64, None, True),
    "Gemma 3 27B sliding": (32, 16, 128, 1024, False),
    "Gemma 3 27B full": (32, 16, 128, None, False),
    "Qwen3-30B-A3B": (32, 4, 128, None, False),
    "head_dim 256": (8, 4, 256, 1024, False),
    "head_dim 96": (12, 12, 96, 100, False),
}


def lowered_for_cuda(function, *args) -> str:
  """The program for a GPU, lowered without one."""
  device = dict(device_kind="NVIDIA H200", num_cores=132)
  if "platform" in inspect.signature(jax.sharding.AbstractDevice).parameters:
    device["platform"] = "gpu"
  mesh = jax.sharding.AbstractMesh(
      (1,), ("x",), (jax.sharding.AxisType.Explicit,),
      abstract_device=jax.sharding.AbstractDevice(**device))
  checks = [export.DisabledSafetyCheck.custom_call("__gpu$xla.gpu.triton")]
  with jax.sharding.use_abstract_mesh(mesh):
    return export.export(jax.jit(function), platforms=["cuda"],
                         disabled_checks=checks)(*args).mlir_module()


@pytest.mark.parametrize("model", MODELS)
def test_lowers_for_cuda_over_a_cache(model):
  num_heads, num_kv_heads, head_dim, window, has_sinks = MODELS[model]
  shape = lambda *shape: jax.ShapeDtypeStruct((8, *shape), "bfloat16")
  own, cached = (shape(length, num_kv_heads, head_dim)
                 for length in (2, window or 32768))
  positions = [jax.ShapeDtypeStruct(x.shape[:2], "int32")
               for x in (own, cached)]
  module = lowered_for_cuda(
      functools.partial(
          cached_attention, window=window, scale=1.0,
          sinks_N=jnp.ones(num_heads) if has_sinks else None),
      shape(2, num_heads, head_dim), own, own, cached, cached, *positions)
  assert "cached_attention" in module and "stablehlo.transpose" not in module


@pytest.mark.parametrize("model,dtype", [
    *((model, "bfloat16") for model in MODELS),
    ("gpt-oss-20b sliding", "float32"), ("head_dim 96", "float16")])
def test_lowers_for_cuda_forward_and_backward(model, dtype):
  num_heads, num_kv_heads, head_dim, window, has_sinks = MODELS[model]
  shape = lambda heads: jax.ShapeDtypeStruct((2, 8192, heads, head_dim), dtype)
  q, k = shape(num_heads), shape(num_kv_heads)
  sinks = jax.ShapeDtypeStruct((num_heads,), "float32") if has_sinks else None

  def gradients(q, k, v, sinks):
    run = lambda *args: jnp.sum(windowed_attention(
        *args[:3], window=window, scale=head_dim ** -0.5,
        sinks_N=args[3] if args[3:] else None, implementation="pallas-gpu"))
    args = (q, k, v) if sinks is None else (q, k, v, sinks)
    return jax.grad(run, tuple(range(len(args))))(*args)

  module = lowered_for_cuda(gradients, q, k, k, sinks)
  kernels = ["forward", "dq", "dkv"]
  assert all(f"windowed_attention_{kernel}" in module for kernel in kernels)
  assert module.count("@__gpu$xla.gpu.triton") == 3 + (head_dim > 128)
  # Nothing but the kernels' own arrays: no score and no transposed copy.
  assert "stablehlo.transpose" not in module
