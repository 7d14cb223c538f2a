"""The Triton kernels: interpreted, and lowered for CUDA, neither on a GPU."""
import functools
import inspect

import jax
import jax.numpy as jnp
from jax import export
import numpy as np
import pytest

from pallas_kernels.expert_matmul import expert_matmul, gpu, reference
from pallas_kernels.expert_matmul import unsupported
from pallas_kernels.expert_matmul.gpu import Blocks
from pallas_kernels.expert_matmul.options import Options
from pallas_kernels.quant import FP8, MXFP4, Int8

pytestmark = pytest.mark.usefixtures("quick_compile")

FORMATS = {"array": None, "mxfp4": MXFP4, "int8": Int8, "fp8": FP8}
ROUNDING = {"float32": 2e-6, "bfloat16": 2 ** -8, "float16": 2 ** -11}
# Neither D nor F is a multiple of a tile or of 128, and both are more than
# one; some experts have no rows, and some rows no expert.
EXPERTS, D, F = 5, 160, 90
FEW = (41, [20, 3, 0, 15, 1])  # rows, and those of each expert
MANY = (203, [0, 130, 1, 0, 70])


def made(kind, dtype, rows, sizes, d=D, f=F):
  """x, weights, group sizes, bias, row weights."""
  random = np.random.default_rng(rows)
  x = jnp.asarray(random.normal(size=(rows, d)), dtype)
  w = random.normal(size=(len(sizes), d, f)).astype(np.float32) / 8
  w = (jnp.asarray(w, dtype) if kind is None
       else jax.tree.map(jnp.asarray, kind.quantize(w)))
  bias = jnp.asarray(random.normal(size=(len(sizes), f)), dtype)
  return (x, w, jnp.array(sizes, jnp.int32), bias,
          jnp.asarray(random.uniform(size=rows), jnp.float32))


@functools.partial(jax.jit, static_argnames=("limit", "kernel", "blocks"))
def results(x, w, sizes, bias, row_weights, *, limit=None, kernel=True,
            blocks=None):
  """y and the gradients of all floating-point arguments; None for the bits
  of quantized weights."""
  is_array = isinstance(w, jax.Array)

  def run(x, bias, row_weights, w_array):
    weights = w_array if is_array else w
    if kernel:
      return expert_matmul(
          x, weights, sizes, bias=bias, row_weights_M=row_weights,
          swiglu_limit=limit, implementation="pallas-gpu", interpret=True,
          blocks=blocks)
    return reference.expert_matmul(
        x, weights, sizes, bias, row_weights, limit)

  y, vjp = jax.vjp(run, x, bias, row_weights, w if is_array else None)
  dy = jnp.sin(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape)
  return y, *vjp(dy.astype(y.dtype))


def assert_close(found, expected, rounding):
  for name, a, b in zip(("y", "dx", "dbias", "drow_weights", "dw"), found,
                        expected):
    if a is None:
      continue
    b = np.asarray(b, np.float32)
    np.testing.assert_allclose(
        np.asarray(a, np.float32), b, err_msg=name, rtol=rounding,
        atol=2 * rounding * max(1e-3, np.abs(b).max()))


def wide(x):
  """Floats as float32."""
  return jax.tree.map(lambda a: a.astype(jnp.float32)
                      if a.dtype in (jnp.bfloat16, jnp.float16) else a, x)


@pytest.mark.parametrize("name", FORMATS)
def test_float32_fused_forward_and_backward_with_few_rows(name):
  args = made(FORMATS[name], "float32", *FEW)
  assert_close(results(*args, limit=1.5),
               results(*args, limit=1.5, kernel=False), 4e-6)


@pytest.mark.parametrize("name", FORMATS)
def test_bfloat16_forward_and_backward_with_many_rows(name):
  args = made(FORMATS[name], "bfloat16", *MANY)[:3] + (None, None)
  found = results(*args)
  assert all(x.dtype == jnp.bfloat16 for x in found if x is not None)
  # Transposed, int8's scales of outputs are multiplied into bfloat16 rows.
  rounding = ROUNDING["bfloat16"] * (2 if name == "int8" else 1)
  assert_close(found, results(*wide(args[:2]), *args[2:], kernel=False),
               rounding)


@pytest.mark.parametrize("name", ["array", "mxfp4"])
def test_float16_rows_lose_nothing(name):
  args = made(FORMATS[name], "float16", *FEW)[:3] + (None, None)
  assert_close(results(*args)[:1],
               results(*wide(args[:2]), *args[2:], kernel=False)[:1],
               ROUNDING["float16"])


@pytest.mark.parametrize("rows, sizes", [
    (1, [0, 0, 1]), (1, [0, 0, 0]),
    (48, [48, 0, 0]), (48, [0, 0, 48]), (48, [16, 16, 16]),  # few
    (64, [0, 64, 0]), (64, [1, 62, 1]), (64, [0, 0, 0])])  # many
def test_spreads_of_rows(rows, sizes):
  args = made(MXFP4, "bfloat16", rows, sizes, d=64, f=48)
  assert_close(results(*args, limit=2.0)[:1],
               results(*wide(args), limit=2.0, kernel=False)[:1],
               ROUNDING["bfloat16"])


@pytest.mark.parametrize("rows, sizes", [FEW, MANY])
def test_experts_without_rows_are_not_read(rows, sizes):
  x, w, *_ = made(MXFP4, "bfloat16", rows, sizes)
  nobody = jnp.array(sizes) == 0
  w = MXFP4(w.blocks, jnp.where(nobody[:, None, None], 255, w.scales))
  y = expert_matmul(x, w, jnp.array(sizes), implementation="pallas-gpu",
                    interpret=True)
  assert np.isfinite(np.asarray(y, np.float32)).all()
  assert not np.any(y[sum(sizes):])
  assert np.all(np.any(np.asarray(y[:sum(sizes)], np.float32), axis=1))


def test_every_value_under_every_scale_at_every_place():
  # Output o has value o % 16 under scale o // 16, at input o % 32; others 0.
  o = np.arange(16 * 256)
  place = (o * 5 + o // 16) % 32
  nibbles = np.zeros((len(o), 32), np.uint8)
  nibbles[o, place] = o % 16
  w = MXFP4((nibbles[:, ::2] | nibbles[:, 1::2] << 4)[None, :, None],
            (o // 16).astype(np.uint8)[None, :, None])
  expected = w.dequantize(np.float32)[0][place, o]
  # This arithmetic flushes what is below the normal numbers, also scales.
  expected = np.where(
      (np.abs(expected) < 2.0 ** -126) | (o < 16), 0, expected)
  with np.errstate(over="ignore"):
    expected = expected.astype(jnp.bfloat16).astype(np.float32)
  w = jax.tree.map(jnp.asarray, w)
  y = jax.jit(lambda w: expert_matmul(
      jnp.eye(32, dtype=jnp.bfloat16), w, jnp.array([32]), interpret=True,
      implementation="pallas-gpu", blocks=Blocks(32, 256, 64, 4, 2)))(w)
  np.testing.assert_array_equal(np.asarray(y, np.float32)[place, o], expected)
  # The other way, where infinities would spoil their neighbours.
  some = np.flatnonzero(np.isfinite(expected))[::31]
  assert {*place[some]} == {*range(32)} and {*o[some] % 16} == {*range(16)}
  w = jax.tree.map(lambda x: x[:, some], w)
  dx = jax.jit(lambda w: gpu.input_gradient(
      jnp.eye(len(some), dtype=jnp.bfloat16), w, jnp.array([len(some)]),
      Options(interpret=True)))(w)
  np.testing.assert_array_equal(
      np.asarray(dx, np.float32)[np.arange(len(some)), place[some]],
      expected[some])


def test_other_blocks_give_the_same():
  args = made(MXFP4, "bfloat16", *MANY)
  expected = results(*wide(args), limit=2.0, kernel=False)[0]
  for blocks in (Blocks(16, 32, 64, 4, 1), Blocks(64, 64, 128, 8, 2)):
    y = results(*args, limit=2.0, blocks=blocks)[0]
    assert_close([y], [expected], ROUNDING["bfloat16"])


@pytest.mark.parametrize("change, message", [
    (dict(rows=24), "Blocks.rows=24: expected a power of two from 16"),
    (dict(depth=8), "Blocks.depth=8"), (dict(stages=0), "Blocks.stages=0"),
    (dict(warps=3), "Blocks.warps=3")])
def test_impossible_blocks_are_refused(change, message):
  with pytest.raises(ValueError, match=message):
    Blocks(**(dict(rows=16, columns=64, depth=64, warps=4, stages=3) | change))


def test_what_is_not_supported_is_named():
  x, w, *_ = made(FP8, "float32", *FEW)
  why = functools.partial(unsupported, "pallas-gpu")
  assert why(x, w) is None
  assert "at most 128" in why(x, w, blocks=Blocks(16, 256, 64, 4, 3))
  assert "gpu.Blocks" in why(x, w, blocks=(1, 2))
  assert "at least 32 and 64" in why(
      x, made(MXFP4, "float32", *FEW)[1], blocks=Blocks(16, 16, 64, 4, 3))
  big = jax.ShapeDtypeStruct((256, 7168, 1200), jnp.int8)
  scales = jax.ShapeDtypeStruct((256, 7168), jnp.float32)
  assert "split the experts" in why(
      jax.ShapeDtypeStruct((8, 1200), jnp.bfloat16), Int8(big, scales))
  with jax.enable_x64(True):
    assert "float64" in why(jnp.ones((3, 4)), jnp.ones((2, 4, 5)))


# Lowering for CUDA needs no GPU.
SHAPES = {  # experts, experts a token, d_model, d_expert, swiglu_limit
    "gpt-oss-20b": (32, 4, 2880, 2880, 7.0),
    "gpt-oss-120b": (128, 4, 2880, 2880, 7.0),
    "Qwen3-30B-A3B": (128, 8, 2048, 768, None),
}


def h200():
  known = inspect.signature(jax.sharding.AbstractDevice).parameters
  about = dict(device_kind="NVIDIA H200", num_cores=132, platform="gpu")
  device = jax.sharding.AbstractDevice(
      **{key: value for key, value in about.items() if key in known})
  return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh(
      (1,), ("x",), (jax.sharding.AxisType.Explicit,), abstract_device=device))


def lowered(function, *args) -> str:
  with h200():
    return export.export(
        jax.jit(function), platforms=["cuda"],
        disabled_checks=[export.DisabledSafetyCheck.custom_call(
            "__gpu$xla.gpu.triton")])(*args).mlir_module()


def leaf(kind, *shape):
  if kind is None:
    return jax.ShapeDtypeStruct(shape, jnp.bfloat16)
  return kind(*(jax.ShapeDtypeStruct(*part) for part in zip(
      kind.part_shapes(shape), kind.PARTS.values())))


@pytest.mark.parametrize("tokens", [1, 64, 4096])
@pytest.mark.parametrize("model", SHAPES)
def test_mxfp4_layers_lower_for_cuda(model, tokens):
  experts, each, d, f, limit = SHAPES[model]
  rows = tokens * each

  def layer(x, gate_up, down, sizes, bias, down_bias, row_weights):
    run = functools.partial(expert_matmul, implementation="pallas-gpu")
    h = run(x, gate_up, sizes, bias=bias, swiglu_limit=limit)
    return run(h[:, :f], down, sizes, bias=down_bias,
               row_weights_M=row_weights)

  text = lowered(
      layer, leaf(None, rows, d), leaf(MXFP4, experts, d, 2 * f),
      leaf(MXFP4, experts, f, d), jax.ShapeDtypeStruct((experts,), jnp.int32),
      leaf(None, experts, 2 * f), leaf(None, experts, d),
      jax.ShapeDtypeStruct((rows,), jnp.float32))
  assert text.count("@__gpu$xla.gpu.triton") == 2


@pytest.mark.parametrize("name", FORMATS)
def test_gradients_lower_for_cuda(name):
  experts, each, d, f, _ = SHAPES["Qwen3-30B-A3B"]
  rows, w = 4096 * each, leaf(FORMATS[name], experts, d, 2 * f)

  def step(x, w, sizes):
    run = functools.partial(expert_matmul, group_sizes_E=sizes,
                            implementation="pallas-gpu")
    if name == "array":
      return jax.grad(lambda x, w: run(x, w).sum(), (0, 1))(x, w)
    return jax.grad(lambda x: run(x, w).sum())(x)

  text = lowered(step, leaf(None, rows, d), w,
                 jax.ShapeDtypeStruct((experts,), jnp.int32))
  # The forward's result is not needed.
  assert text.count("@__gpu$xla.gpu.triton") == (2 if name == "array" else 1)
