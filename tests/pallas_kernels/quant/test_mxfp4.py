"""MXFP4 against transformers, and the bytes that quantization gives back."""
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from hypothesis.extra import numpy as hnp
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from pallas_kernels.quant import MXFP4
from pallas_kernels.quant.mxfp4 import VALUES, round_to_mxfp4

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def every_byte() -> MXFP4:
  """Each byte under each scale, as two experts of 2048 outputs."""
  blocks = np.tile(np.arange(256, dtype=np.uint8).reshape(1, 16, 16),
                   (256, 1, 1))
  scales = np.repeat(np.arange(256, dtype=np.uint8)[:, None], 16, 1)
  return MXFP4(blocks.reshape(2, 2048, 1, 16), scales.reshape(2, 2048, 1))


def bits(x) -> np.ndarray:
  """As integers, every NaN alike."""
  x = np.asarray(x)
  x = np.where(np.isnan(x), np.array(np.nan, x.dtype), x)
  return np.ascontiguousarray(x).view(f"u{x.dtype.itemsize}")


def theirs(leaf: MXFP4, dtype) -> np.ndarray:
  x = convert_moe_packed_tensors(torch.tensor(leaf.blocks),
                                 torch.tensor(leaf.scales),
                                 dtype=torch.float32).numpy()
  return x.astype(dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_every_byte_under_every_scale_on_host_and_device(dtype):
  leaf = every_byte()
  host = leaf.dequantize(dtype)
  assert host.dtype == dtype and host.shape == leaf.shape == (2, 32, 2048)
  with np.errstate(over="ignore", invalid="ignore"):
    expected = theirs(leaf, host.dtype)
  device = np.asarray(jax.jit(lambda x: x.dequantize(dtype))(leaf))
  # Under 255 theirs has infinities; the CPU flushes tiny values.
  scale = leaf.scales[..., 0]
  assert np.isnan(host.swapaxes(1, 2)[scale == 255]).all()
  assert np.isnan(device.swapaxes(1, 2)[scale == 255]).all()
  same_bits(host, expected, scale < 255)
  same_bits(device, expected, (scale > 1) & (scale < 255))
  tiny = device.swapaxes(1, 2)[scale < 2].astype(np.float32)
  exact = host.swapaxes(1, 2)[scale < 2].astype(np.float32)
  assert (np.abs(tiny - exact) < 2.0 ** -124).all()


def same_bits(ours, expected, outputs):
  np.testing.assert_array_equal(bits(ours.swapaxes(1, 2))[outputs],
                                bits(expected.swapaxes(1, 2))[outputs])


def test_against_transformers_in_bfloat16():
  rng = np.random.default_rng(0)
  leaf = MXFP4(rng.integers(0, 256, (3, 5, 2, 16), np.uint8),
               rng.integers(100, 140, (3, 5, 2), np.uint8))
  expected = convert_moe_packed_tensors(torch.tensor(leaf.blocks),
                                        torch.tensor(leaf.scales))
  np.testing.assert_array_equal(leaf.dequantize().astype(np.float32),
                                expected.float().numpy())


def largest_code(blocks):
  return np.maximum(blocks & 7, blocks >> 4 & 7).max(-1)


@settings(max_examples=300, deadline=None)
@given(hnp.arrays(np.uint8, (3, 2, 16)), hnp.arrays(np.uint8, (3, 2)),
       st.sampled_from(["float32", "bfloat16"]))
def test_canonical_blocks_come_back_byte_for_byte(blocks, scales, dtype):
  leaf = MXFP4(blocks, scales % 253)
  again = MXFP4.quantize(leaf.dequantize(dtype))
  canonical = (largest_code(blocks) >= 6) | (leaf.scales == 0)
  np.testing.assert_array_equal(again.blocks[canonical],
                                leaf.blocks[canonical])
  np.testing.assert_array_equal(again.scales[canonical],
                                leaf.scales[canonical])
  # The others change their bytes, never their values.
  assert (again.scales <= leaf.scales).all()
  np.testing.assert_array_equal(bits(again.dequantize("float32")),
                                bits(leaf.dequantize("float32")))
  assert ((largest_code(again.blocks) >= 6) | (again.scales == 0)).all()


@settings(max_examples=300, deadline=None)
@given(hnp.arrays(np.float32, (64, 3), elements=st.floats(
    width=32, allow_nan=False, allow_infinity=False)))
def test_what_quantize_writes_comes_back_byte_for_byte(w):
  leaf = MXFP4.quantize(w)
  for dtype in ("float32", "bfloat16"):
    again = MXFP4.quantize(leaf.dequantize(dtype))
    np.testing.assert_array_equal(again.blocks, leaf.blocks)
    np.testing.assert_array_equal(again.scales, leaf.scales)


jit_round = jax.jit(round_to_mxfp4)


@settings(max_examples=300, deadline=None)
@given(hnp.arrays(np.float32, (2, 64, 3), elements=st.floats(
    width=32, allow_nan=False, allow_infinity=False)))
def test_rounds_within_jit_as_it_quantizes(w):
  expected = MXFP4.quantize(w).dequantize("float32")
  ours = np.asarray(jit_round(w))
  # The CPU takes tiny values for zero.
  tiny = (np.abs(w) < 2.0 ** -126) | (np.abs(expected) < 2.0 ** -126)
  np.testing.assert_array_equal(bits(ours)[~tiny], bits(expected)[~tiny])
  assert (np.abs(ours - expected)[tiny] <= 2.0 ** -126).all()


@pytest.mark.parametrize("exponents", [(-3, 3), (-120, 120)])
def test_rounds_random_blocks_within_jit_as_it_quantizes(exponents):
  rng = np.random.default_rng(2)
  w = np.ldexp(rng.normal(size=(3, 5, 96, 17)), rng.integers(
      *exponents, (3, 5, 96, 17))).astype(np.float32)
  expected = MXFP4.quantize(w).dequantize("float32")
  np.testing.assert_array_equal(bits(jit_round(w)), bits(expected))


def test_what_is_not_finite_stays_within_jit():
  w = np.ones((64, 2), np.float32)
  w[3, 0], w[5, 1] = np.nan, -np.inf
  ours = np.asarray(jit_round(w))
  assert np.isnan(ours[3, 0]) and ours[5, 1] == -np.inf
  np.testing.assert_array_equal(ours[32:], 1)


def test_rounds_to_the_nearest_ties_to_even_and_saturates():
  ties = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 7.9]
  expected = [0, 1, 1, 2, 2, 4, 4, 6]
  just = np.nextafter(np.float32(ties[:7]), np.float32(9))
  above = [0.5, 1, 1.5, 2, 3, 4, 6]
  w = np.zeros((32, 1), np.float32)
  w[:8, 0], w[8:16, 0], w[16:23, 0] = ties, -np.float32(ties), just
  for scale in (1, 2.0 ** -40, 2.0 ** 100):
    leaf = MXFP4.quantize(w * np.float32(scale))
    np.testing.assert_array_equal(
        bits(jit_round(w * np.float32(scale))),
        bits(leaf.dequantize("float32")))
    x = leaf.dequantize("float32")[:, 0] / np.float32(scale)
    np.testing.assert_array_equal(x[:8], expected)
    np.testing.assert_array_equal(x[8:16], -np.float32(expected))
    assert np.signbit(x[8])
    np.testing.assert_array_equal(x[16:23], above)


def test_no_value_is_nearer():
  rng = np.random.default_rng(1)
  w = rng.normal(size=(96, 7)).astype(np.float32)
  leaf = MXFP4.quantize(w)
  scale = np.ldexp(1.0, leaf.scales.astype(int) - 127).repeat(32, -1).T
  nearest = np.abs(w[..., None] - scale[..., None] * VALUES).min(-1)
  np.testing.assert_allclose(np.abs(w - leaf.dequantize("float32")), nearest,
                             rtol=1e-6)


def test_indexing_and_stacks_under_jit():
  rng = np.random.default_rng(2)
  leaf = MXFP4(rng.integers(0, 256, (4, 7, 3, 5, 16), np.uint8),
               rng.integers(90, 150, (4, 7, 3, 5), np.uint8))
  assert leaf.shape == (4, 7, 160, 3) and leaf.ndim == 4
  assert leaf.nbytes == 4 * 7 * 3 * 5 * 17
  whole = leaf.dequantize("float32")
  np.testing.assert_array_equal(leaf[2].dequantize("float32"), whole[2])
  np.testing.assert_array_equal(leaf[1:3].dequantize("float32"), whole[1:3])
  some = jax.jit(lambda leaf, i: leaf[1][i].astype(jnp.float32))(
      leaf, jnp.array([6, 0, 6]))
  np.testing.assert_array_equal(some, whole[1][[6, 0, 6]])
  scanned = jax.lax.scan(lambda c, x: (c, x.astype(jnp.float32)), 0,
                         jax.tree.map(jnp.asarray, leaf))[1]
  np.testing.assert_array_equal(scanned, whole)
  with pytest.raises(ValueError, match="only the first axis"):
    leaf[0][0][0]
  with pytest.raises(ValueError, match="only the first axis"):
    leaf[0, 0]


def test_the_shape_of_an_abstract_leaf():
  leaf = MXFP4(np.zeros((3, 5, 2, 16), np.uint8), np.zeros((3, 5, 2), np.uint8))
  abstract = jax.eval_shape(lambda x: x, leaf)
  assert abstract.shape == (3, 64, 5) and abstract.dtype == jnp.bfloat16
  assert repr(leaf) == "MXFP4(3, 64, 5)"


@pytest.mark.parametrize("blocks, scales", [
    (np.zeros((3, 2, 16), np.uint8), np.zeros((3, 3), np.uint8)),
    (np.zeros((3, 2, 15), np.uint8), np.zeros((3, 2), np.uint8)),
    (np.zeros((3, 2, 16), np.int8), np.zeros((3, 2), np.uint8)),
    (np.zeros((3, 2, 16), np.uint8), np.zeros((3, 2), np.float32)),
    (np.zeros((2, 16), np.uint8), np.zeros((2,), np.uint8)),
])
def test_arrays_that_do_not_fit_are_refused(blocks, scales):
  with pytest.raises(ValueError, match="MXFP4 blocks"):
    MXFP4(blocks, scales).dequantize()


def test_what_cannot_be_quantized_is_refused():
  with pytest.raises(ValueError, match="multiple of 32"):
    MXFP4.quantize(np.zeros((3, 45, 7), np.float32))
  w = np.zeros((32, 7), np.float32)
  w[3, 1], w[4, 2] = np.nan, np.inf
  with pytest.raises(ValueError, match="2 of 224 values"):
    MXFP4.quantize(w)


def test_other_dtypes_are_quantized_as_what_they_are():
  w = np.random.default_rng(3).normal(size=(2, 64, 5))
  for dtype in (np.float16, ml_dtypes.bfloat16):
    ours = MXFP4.quantize(w.astype(dtype))
    expected = MXFP4.quantize(w.astype(dtype).astype(np.float32))
    np.testing.assert_array_equal(ours.blocks, expected.blocks)
