"""A number for each array that tells it from others, wherever the array lies.

It is the sum of the array's words, each mixed and times an odd number made of
its position, modulo 2^32. So it is the same however the array is split over
devices; it always differs if one word does, in whichever bits; and words that
change places, or several that change, escape it once in a billion times.
"""
import functools
import math

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec as P

from pallas_kernels import vma

# Words looked at at once: they and their sums stay in the cache of a CPU.
BLOCK = 2**16

_UNSIGNED = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}


def fingerprints(leaves: dict) -> dict[str, tuple[int, bool]]:
  """Of each array, jax's or the host's, its number, and whether it is finite.

  Each device reads the parts that it has, once; of what is on several
  processes, all of them must ask.
  """
  shardings = tuple(
      x.sharding if isinstance(x, jax.Array) and len(x.sharding.device_set) > 1
      else None for x in leaves.values())
  found = jax.device_get(_fingerprints(shardings, list(leaves.values())))
  return {name: (int(number), bool(finite))
          for name, (number, finite) in zip(leaves, found)}


@functools.partial(jax.jit, static_argnums=0)
def _fingerprints(shardings, leaves):
  leaves = [x.reshape(x.shape or (1,)) for x in leaves]
  return [_part(x, x.shape, (0,) * x.ndim, ()) if sharding is None
          else _split(x, sharding) for x, sharding in zip(leaves, shardings)]


def _split(x, sharding: NamedSharding):
  """Of an array on several devices, each for itself."""
  spec = (*sharding.spec, *(None,) * x.ndim)[:x.ndim]
  axes = [(names,) if isinstance(names, str) else names or ()
          for names in spec]
  all_axes = sum(axes, ())

  def part(x_part):
    first = [jax.lax.axis_index(names) * size if names else 0
             for names, size in zip(axes, x_part.shape)]
    number, finite = _part(x_part, x.shape, first, all_axes)
    return (jax.lax.psum(number, all_axes),
            jax.lax.psum((~finite).astype(jnp.int32), all_axes) == 0)

  return jax.shard_map(part, mesh=sharding.mesh, in_specs=P(*spec),
                       out_specs=P())(x)


def _part(x, whole_shape, first, axes):
  """What a part of an array adds to its number, and whether it is finite.

  Args:
    whole_shape: of the array. first: where the part begins along each axis.
    axes: of the mesh, over which the array is split.
  """
  num_rows = math.prod(x.shape[:-1])
  row_keys = _keys(x.shape[:-1], whole_shape[:-1], first[:-1], 0x9E3779B9)
  row_keys = row_keys.reshape(num_rows, 1)
  column_keys = _keys(x.shape[-1:], whole_shape[-1:], first[-1:], 0x7F4A7C15)
  x = x.reshape(num_rows, x.shape[-1])
  step = min(num_rows, max(1, BLOCK // max(1, x.shape[1])))

  def add(sums, start, size):
    word = _words(jax.lax.dynamic_slice_in_dim(x, start, size))
    keys = jax.lax.dynamic_slice_in_dim(row_keys, start, size)
    number, top = (total[:size] for total in sums)
    return (number + (word ^ (word >> 15)) * keys,
            jnp.maximum(top, _magnitude(word, x.dtype)))

  zeros = jnp.zeros((step, x.shape[1]), jnp.uint32)
  sums = vma.vary((zeros, zeros), axes)
  blocks = num_rows // step if step else 0
  if blocks == 1:
    sums = add(sums, 0, step)
  else:
    sums = jax.lax.fori_loop(
        0, blocks, lambda i, sums: add(sums, i * step, step), sums)
  ends = [sums]
  if rest := num_rows - blocks * step:
    ends.append(add((zeros, zeros), blocks * step, rest))
  number = sum(jnp.sum(number * column_keys, dtype=jnp.uint32)
               for number, _ in ends)
  top = functools.reduce(jnp.maximum, [jnp.max(top, initial=0)
                                       for _, top in ends])
  return number, top < _infinity(x.dtype)


def _keys(part_shape, whole_shape, first, salt: int):
  """Odd numbers that look random, of positions in the whole array.

  `salt` is another for rows and columns: else x.T would have x's number.
  """
  position, stride = jnp.full(part_shape, salt, jnp.uint32), 1
  for axis in reversed(range(len(part_shape))):
    here = jax.lax.broadcasted_iota(jnp.uint32, part_shape, axis)
    here += jnp.uint32(first[axis])
    position += here * jnp.uint32(stride % 2**32)
    stride *= whole_shape[axis]
  x = (position ^ (position >> 16)) * jnp.uint32(0x85EBCA6B)
  x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
  return (x ^ (x >> 16)) | jnp.uint32(1)  # MurmurHash3's end, made odd


def _words(x):
  if x.dtype == bool:
    return x.astype(jnp.uint32)
  kind = _UNSIGNED[x.dtype.itemsize]
  return jax.lax.bitcast_convert_type(x, kind).astype(jnp.uint32)


def _magnitude(word, dtype):
  """Without the sign: bits that order as the numbers do."""
  if not jnp.issubdtype(dtype, jnp.floating):
    return jnp.zeros_like(word)
  return word & jnp.uint32(2**(8 * dtype.itemsize - 1) - 1)


def _infinity(dtype):
  if not jnp.issubdtype(dtype, jnp.floating):
    return jnp.uint32(1)
  return _words(jnp.array(jnp.inf, dtype))
