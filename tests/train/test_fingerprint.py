"""The number that tells a changed array, however the array is split."""
import itertools

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec as P
import numpy as np
import pytest

from jaxlm.parallel.mesh import make_mesh
from jaxlm.train import fingerprint
from jaxlm.train.fingerprint import fingerprints


pytestmark = pytest.mark.usefixtures("quick_compile")


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
  """So that small arrays have several, and a rest."""
  monkeypatch.setattr(fingerprint, "BLOCK", 64)
  fingerprint._fingerprints.clear_cache()


def number(x) -> int:
  return fingerprints({"x": x})["x"][0]


def numbers(x):
  """Of many arrays of one shape."""
  first = (0,) * (x.ndim - 1)
  return np.asarray(jax.jit(jax.vmap(lambda x: fingerprint._part(
      x, x.shape, first, ())[0]))(x))


def noise(shape, dtype=jnp.float32, seed=0):
  return jax.random.normal(jax.random.key(seed), shape).astype(dtype)


MESHES = [{"data": 8}, {"data": 2, "expert": 4},
          {"data": 2, "context": 2, "tensor": 2}]
SPECS = [P("data"), P(None, ("data", "expert")),
         P(("expert", "data"), "tensor"),
         P(None, None, ("data", "context", "expert")), P()]


@pytest.mark.parametrize("sizes", MESHES)
def test_does_not_depend_on_the_split(sizes):
  x = noise((16, 24, 8))
  mesh, wanted = make_mesh(sizes), number(x)
  split = {str(i): jax.device_put(x, NamedSharding(mesh, spec))
           for i, spec in enumerate(SPECS)}
  assert set(fingerprints(split).values()) == {(wanted, True)}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int32,
                                   jnp.uint8])
def test_each_flipped_bit_is_seen(dtype):
  x = np.asarray(noise((9, 23)).astype(dtype))
  wanted, rng = number(jnp.asarray(x)), np.random.default_rng(0)
  flipped = np.stack([x] * 1000)
  for row in flipped:
    raw = row.reshape(-1).view(np.uint8)
    raw[rng.integers(raw.size)] ^= 1 << rng.integers(8)
  assert np.all(numbers(flipped) != wanted)


def test_values_that_change_places_are_seen():
  """Of bfloat16's precision, so that the lower half of each word is zero."""
  x = np.asarray(noise((4, 5, 6), jnp.bfloat16).astype(jnp.float32)).reshape(-1)
  swapped = np.stack([x] * (x.size * (x.size - 1) // 2))
  for row, (i, j) in zip(swapped, itertools.combinations(range(x.size), 2)):
    row[[i, j]] = row[[j, i]]
  same = np.all(swapped == x, axis=1)  # equal values that change places
  assert same.sum() < 9
  np.testing.assert_array_equal(
      numbers(swapped.reshape(-1, 4, 5, 6))
      == number(jnp.asarray(x.reshape(4, 5, 6))), same)


def test_other_arrays_have_other_numbers():
  x = np.asarray(noise((18, 18)))
  others = [x, x.T, x[::-1], x[:, ::-1], np.roll(x, 1, 0), np.roll(x, 1, 1),
            -x, x + 1]
  assert len(set(numbers(np.stack(others)).tolist())) == len(others)


def test_any_shape():
  shapes = [(), (1,), (129,), (3, 0), (67, 1), (2, 129)]
  found = fingerprints({str(shape): 1 + noise(shape) for shape in shapes})
  assert all(finite for _, finite in found.values())
  assert [bool(number) for number, _ in found.values()] == [
      True, True, True, False, True, True]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_what_is_not_finite_is_told(dtype):
  largest = np.full((24, 7), jnp.finfo(dtype).max, dtype)
  split = NamedSharding(make_mesh({"data": 8}), P("data"))
  for sharding in (split, jax.sharding.SingleDeviceSharding(jax.devices()[0])):
    for bad in (1, np.nan, np.inf, -np.inf):
      for place in ((0, 0), (23, 6)):
        x = largest.copy()
        x[place] = bad
        found = fingerprints({"x": jax.device_put(x, sharding)})
        assert found["x"][1] == (bad == 1)
