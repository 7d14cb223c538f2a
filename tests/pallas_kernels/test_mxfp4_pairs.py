from hypothesis import given, settings
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.quant import MXFP4, MXFP4Pairs, is_quantized


def published(seed, lead, dim_out, blocks) -> MXFP4:
  """Any bytes at all."""
  random = np.random.default_rng(seed)
  shape = (*lead, dim_out, blocks)
  return MXFP4(random.integers(0, 256, (*shape, 16), dtype=np.uint8),
               random.integers(0, 256, shape, dtype=np.uint8))


def assert_same(a, b):
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    assert x.dtype == y.dtype
    np.testing.assert_array_equal(x, y)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2 ** 32), st.integers(1, 5), st.integers(1, 150),
       st.booleans(), st.sampled_from([(), (3,), (2, 3)]))
def test_every_byte_comes_back(seed, blocks, dim_out, deinterleave, lead):
  dim_out += deinterleave * (dim_out % 2)
  weights = published(seed, lead, dim_out, blocks)
  pairs = MXFP4Pairs.from_mxfp4(weights, deinterleave=deinterleave)
  assert pairs.shape == weights.shape == (*lead, 32 * blocks, dim_out)
  assert_same(pairs.to_mxfp4(), weights)


def test_all_nibbles_under_all_scales():
  # Output s has scale byte s; each block holds every nibble twice.
  blocks = np.tile(np.arange(16, dtype=np.uint8) * 17, (256, 3, 1))
  scales = np.tile(np.arange(256, dtype=np.uint8)[:, None], (1, 3))
  weights = MXFP4(blocks, scales)
  pairs = MXFP4Pairs.from_mxfp4(weights)
  assert_same(pairs.to_mxfp4(), weights)
  np.testing.assert_array_equal(pairs.dequantize(np.float32),
                                weights.dequantize(np.float32))
  assert np.isnan(pairs.dequantize(np.float32)[:, 255]).all()


@pytest.mark.parametrize("deinterleave", [False, True])
def test_a_word_gives_two_floats_by_the_documented_shifts(deinterleave):
  weights = published(1, (), 6, 4)
  pairs = MXFP4Pairs.from_mxfp4(weights, deinterleave=deinterleave)
  words = np.asarray(pairs.pairs, np.uint32)
  mask = np.uint32(0x8E8E8E8E)
  second = (words << np.uint32(7) ^ words >> np.uint32(3)) & mask
  nibbles = np.stack([weights.blocks & 15, weights.blocks >> 4], -1)
  nibbles = nibbles.reshape(6, 128)  # [out, in]
  lane = [0, 128, 1, 129, 2, 130] if deinterleave else range(6)
  for out in range(6):
    for pair in range(2):
      for row in range(32):
        at = 8 * pair + row // 4, lane[out]
        for block, word in enumerate((words & mask, second)):
          byte = int(word[at]) >> 8 * (row % 4) & 255
          nibble = nibbles[out, 64 * pair + 32 * block + row]
          assert byte == (nibble & 8) << 4 | (nibble & 7) << 1


@pytest.mark.parametrize("deinterleave", [False, True])
def test_on_a_device_it_is_the_hosts(deinterleave):
  weights = published(2, (3,), 22, 5)
  on_host = MXFP4Pairs.from_mxfp4(weights, deinterleave=deinterleave)
  def there_and_back(weights):
    pairs = MXFP4Pairs.from_mxfp4(weights, deinterleave=deinterleave)
    return pairs, pairs.to_mxfp4()
  pairs, back = jax.jit(there_and_back)(jax.tree.map(jnp.asarray, weights))
  assert_same(pairs, on_host)
  assert_same(back, weights)
  assert_same(pairs[1], MXFP4Pairs.from_mxfp4(weights[1],
                                              deinterleave=deinterleave))


def test_matrices_with_scales_above_240_are_marked():
  weights = published(3, (4,), 2, 2)
  weights.scales[...] = [[[0]], [[240]], [[241]], [[255]]]
  pairs = MXFP4Pairs.from_mxfp4(weights)
  np.testing.assert_array_equal(pairs.large_scales, [0, 0, 1, 1])


def test_it_is_a_quantized_leaf():
  pairs = MXFP4Pairs.quantize(np.ones((2, 64, 6), np.float32))
  assert is_quantized(pairs) and pairs.ndim == 3
  np.testing.assert_array_equal(pairs.astype(np.float32), np.ones((2, 64, 6)))


def test_columns_go_to_lanes_and_back():
  pairs = MXFP4Pairs.quantize(np.ones((64, 300), np.float32),
                              deinterleave=True)
  x = np.arange(600).reshape(2, 300)
  lanes = pairs.to_lanes(x)
  np.testing.assert_array_equal(lanes[0, [0, 1, 128, 129, 256, 384]],
                                [0, 2, 1, 3, 256, 257])
  np.testing.assert_array_equal(pairs.from_lanes(lanes), x)


def test_errors_name_the_values():
  with pytest.raises(ValueError, match="3 outputs cannot be de-interleaved"):
    MXFP4Pairs.from_mxfp4(published(0, (), 3, 2), deinterleave=True)
  pairs = MXFP4Pairs.quantize(np.ones((2, 64, 6), np.float32))
  with pytest.raises(ValueError, match=r"\(64, 6\): expected \(2, 8, 128\)"):
    jax.tree.map(lambda x: x[..., :4], pairs).shape
