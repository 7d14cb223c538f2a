"""int8 and FP8 leaves: bytes that come back, errors, transformers' FP8."""
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from hypothesis.extra import numpy as hnp
from transformers.integrations.finegrained_fp8 import _dequantize_fp8_weight

from pallas_kernels.quant import (FORMATS, FP8, Int8, MXFP4, is_quantized,
                         quantization_error)
from pallas_kernels.quant.fp8 import round_to_fp8

FLOATS = hnp.arrays(np.float32, (2, 37, 3), elements=st.floats(
    -2.0 ** 126, 2.0 ** 126, width=32))


def normal(*shape, scale=1.0, seed=0):
  return (scale * np.random.default_rng(seed).normal(size=shape)).astype(
      np.float32)


def assert_same_bytes(a, b):
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    x, y = np.asarray(x), np.asarray(y)
    np.testing.assert_array_equal(x.view(np.uint8), y.view(np.uint8))


@settings(max_examples=200, deadline=None)
@given(FLOATS)
def test_int8_comes_back_byte_for_byte_from_float32(w):
  leaf = Int8.quantize(w)
  assert_same_bytes(Int8.quantize(leaf.dequantize("float32")), leaf)
  assert (np.abs(leaf.integers) <= 127).all()
  step = np.abs(w).max(1, keepdims=True) / 127 * (1 + 2.0 ** -15)
  step = np.maximum(step.astype(np.float64), 2.0 ** -126)
  assert (np.abs(w - leaf.dequantize("float32")) <= step / 2 * 1.0001).all()


@settings(max_examples=200, deadline=None)
@given(FLOATS, st.sampled_from(["float32", "bfloat16"]))
def test_fp8_comes_back_byte_for_byte(w, dtype):
  if dtype == "bfloat16":  # has fewer tiny values
    w = np.where(np.abs(w) < 2.0 ** -126, 0, w)
  leaf = FP8.quantize(w)
  assert_same_bytes(FP8.quantize(leaf.dequantize(dtype)), leaf)
  largest = np.abs(w).max()
  error = np.abs(w - leaf.dequantize("float32"))
  assert (error <= np.maximum(np.abs(w) / 16, largest * 2.0 ** -17)
          + 2.0 ** -130).all()


@pytest.mark.parametrize("value", [0.0, 1.519e-42, 1e-40, 1e-38])
@pytest.mark.parametrize("kind", FORMATS)
def test_tiny_values_come_back_byte_for_byte(kind, value):
  leaf = FORMATS[kind].quantize(np.full((32, 3), value, np.float32))
  assert_same_bytes(FORMATS[kind].quantize(leaf.dequantize("float32")), leaf)


def test_fp8_has_the_smallest_scale_that_does_not_saturate():
  for largest, scale in ((448, 1), (464, 1), (464.1, 2), (465, 2), (232.1, 1),
                         (232, 0.5), (1, 2 ** -8)):
    leaf = FP8.quantize(np.full((1, 1), largest, np.float32))
    assert leaf.block_scales.item() == scale, largest
    assert abs(leaf.dequantize("float32").item() / largest - 1) < 1 / 16


def test_fp8_is_rounded_to_within_jit_as_it_is_quantized():
  spread = np.exp2(np.random.default_rng(1).integers(-30, 9, (3, 301, 141)))
  w = normal(3, 301, 141) * spread.astype(np.float32)
  # Ties, the largest that does not saturate and the first that does, zeros.
  w[0, :128, :128] = 0
  w[0, 0, :8] = 448, 17, 19, -2.0 ** -10, 3 * 2.0 ** -10, -0.0, 21, 455
  w[0, 128:256, :128] /= np.abs(w[0, 128:256, :128]).max() / 464
  w[1, 128:256, :128] /= np.abs(w[1, 128:256, :128]).max() / 465
  expected = FP8.quantize(w).dequantize("float32")
  ours = jax.jit(round_to_fp8)(w)
  np.testing.assert_array_equal(np.asarray(ours).view(np.uint32),
                                expected.view(np.uint32))
  row = FP8.quantize(w[2, 5:6]).dequantize("float32")
  tiles = jax.jit(lambda x: round_to_fp8(x, rows=1))
  np.testing.assert_array_equal(tiles(w)[2, 5:6], row)
  # Exact in bfloat16.
  assert tiles(w.astype(jnp.bfloat16)).dtype == jnp.bfloat16
  np.testing.assert_array_equal(tiles(ours), tiles(tiles(ours)))
  np.testing.assert_array_equal(ours, ours.astype(jnp.bfloat16))
  lost = jax.jit(round_to_fp8)(w + np.where(w == 448, np.nan, 0))
  assert np.isnan(lost).sum() == 1


@pytest.mark.parametrize("shape", [(3, 300, 141), (128, 257), (5, 7)])
def test_fp8_as_transformers_reads_it(shape):
  """With arbitrary scales, as DeepSeek's, and blocks cut off at the ends."""
  *lead, dim_in, dim_out = shape
  blocks = (-(-dim_out // 128), -(-dim_in // 128))
  values = normal(*lead, dim_out, dim_in, scale=100).astype(
      ml_dtypes.float8_e4m3fn)
  scales = np.abs(normal(*lead, *blocks, scale=1e-3, seed=1))
  leaf = FP8(values, scales)
  expected = _dequantize_fp8_weight(
      torch.tensor(values.view(np.uint8)).view(torch.float8_e4m3fn),
      torch.tensor(scales), [128, 128], torch.float32).numpy()
  assert leaf.shape == shape
  np.testing.assert_array_equal(leaf.dequantize("float32").swapaxes(-1, -2),
                                expected)
  np.testing.assert_array_equal(
      jax.jit(lambda x: x.astype(jnp.float32))(leaf).swapaxes(-1, -2),
      expected)


@pytest.mark.parametrize("kind", FORMATS)
def test_host_and_device_agree_and_the_error_is_as_expected(kind):
  w = normal(4, 64, 9, scale=0.02)
  leaf = FORMATS[kind].quantize(w)
  assert is_quantized(leaf) and leaf.shape == w.shape
  host = leaf.dequantize("float32")
  device = jax.jit(lambda x: x.astype(jnp.float32))(leaf)
  np.testing.assert_array_equal(device, host)
  np.testing.assert_array_equal(jax.jit(lambda x, i: x[i].astype(jnp.float32))(
      leaf, jnp.array([3, 3])), host[[3, 3]])
  error = quantization_error(w, leaf)
  np.testing.assert_allclose(error.relative_rms,
                             np.linalg.norm(host - w) / np.linalg.norm(w),
                             rtol=1e-5)
  np.testing.assert_allclose(error.largest, np.abs(host - w).max(), rtol=1e-6)
  low, high = {"mxfp4": (0.09, 0.14), "int8": (0.004, 0.009),
               "fp8": (0.02, 0.03)}[kind]
  assert low < error.relative_rms < high


def test_the_error_of_zeros_is_zero_and_shapes_are_compared():
  w = np.zeros((32, 3), np.float32)
  assert quantization_error(w, MXFP4.quantize(w)) == (0, 0)
  with pytest.raises(ValueError, match=r"\(3, 32\)"):
    quantization_error(w.T, MXFP4.quantize(w))


@pytest.mark.parametrize("leaf", [
    Int8(np.zeros((3, 5), np.int8), np.zeros(5, np.float32)),
    Int8(np.zeros((3, 5), np.uint8), np.zeros(3, np.float32)),
    FP8(np.zeros((200, 5), ml_dtypes.float8_e4m3fn),
        np.zeros((1, 1), np.float32)),
    FP8(np.zeros((200, 5), np.uint8), np.zeros((2, 1), np.float32)),
])
def test_arrays_that_do_not_fit_are_refused(leaf):
  with pytest.raises(ValueError, match="do not fit"):
    leaf.dequantize()
