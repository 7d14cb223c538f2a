"""Attention put together from parts of the keys, and its gradient."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.windowed_attention import (
    attend_part, part_gradients, windowed_attention)

BATCH, LENGTH, KV_HEADS, GROUP, HEAD_DIM = 2, 150, 2, 3, 16
NOTHING = -1e20  # a sink that takes no part, for queries that see nothing


def halves(x):
  return jnp.split(x, 2, 1)


def in_parts(q, k, v, sinks, segments, do, **options):
  """The second half's queries over the first half's keys and over their own:
  the first see all but those of other segments, so they stand, backwards, for
  what causality would hide as well."""
  def earlier(function, q, k, v, *rest, segments, **more):
    """In order, and what that leaves out in reverse."""
    def reverse(x, start, stop, axis=1):
      return jnp.flip(jax.lax.slice_in_dim(x, start, stop, axis=axis), axis)
    n = q.shape[1]
    first = function(q, k, v, *rest, segment_ids=segments, **more)
    turned = [reverse(x, 0, n - 1) if x.ndim == 4 else
              reverse(x, 0, n - 1, 2) for x in rest]
    second = function(
        reverse(q, 0, n - 1), reverse(k, 1, n), reverse(v, 1, n), *turned,
        segment_ids=(reverse(segments[0], 0, n - 1),
                     reverse(segments[1], 1, n)), **more)
    return first, second

  (_, q), (k0, k1), (v0, v1), (s0, s1), (_, do) = map(
      halves, (q, k, v, segments, do))
  low = jnp.full(sinks.shape, NOTHING)
  part = functools.partial(attend_part, sinks_N=low, window=None, **options)
  (oa, la), (ob, lb) = earlier(part, q, k0, v0, segments=(s1, s0))
  ob = jnp.pad(jnp.flip(ob, 1), ((0, 0), (0, 1), (0, 0), (0, 0)))
  lb = jnp.pad(jnp.flip(lb, 2), ((0, 0), (0, 0), (0, 1)),
               constant_values=NOTHING)
  o, lse = part(q, k1, v1, segment_ids=s1)
  parts = (o, lse), (oa, la), (ob, lb)
  whole = functools.reduce(jnp.logaddexp, [l for _, l in parts])
  whole = jnp.logaddexp(whole, sinks[:, None])
  o = sum(o * jnp.exp(l - whole).swapaxes(1, 2)[..., None]
          for o, l in parts)

  gradients = functools.partial(part_gradients, window=None, **options)
  dq, dk1, dv1 = gradients(q, k1, v1, o, whole, do, segment_ids=s1)
  a, b = earlier(gradients, q, k0, v0, o, whole, do, segments=(s1, s0))
  dq += a[0] + jnp.pad(jnp.flip(b[0], 1), ((0, 0), (0, 1), (0, 0), (0, 0)))
  dk0, dv0 = (x + jnp.pad(jnp.flip(y, 1), ((0, 0), (1, 0), (0, 0), (0, 0)))
              for x, y in zip(a[1:], b[1:]))
  return o, dq, jnp.concatenate([dk0, dk1], 1), jnp.concatenate([dv0, dv1], 1)


@pytest.mark.parametrize("implementation", ["xla", "pallas-tpu", "pallas-gpu"])
def test_parts_make_up_the_whole(implementation, quick_compile):
  random = np.random.default_rng(3)
  def normal(*shape):
    return jnp.asarray(random.normal(size=shape), jnp.float32)
  q = normal(BATCH, LENGTH, KV_HEADS * GROUP, HEAD_DIM)
  k, v = (normal(BATCH, LENGTH, KV_HEADS, HEAD_DIM) for _ in range(2))
  do, sinks = normal(*q.shape), normal(KV_HEADS * GROUP)
  # One sequence's halves have a segment in common, the other's have none.
  segments = jnp.asarray(np.repeat([[4, -2, -2, 9, 0], [1, 5, 7, 8, 8]],
                                   LENGTH // 5, 1), jnp.int32)
  segments = segments.at[1, :LENGTH // 2].set(5)
  options = dict(scale=0.3, soft_cap=3.0)
  interpret = implementation != "xla"

  def whole(q, k, v):
    o = windowed_attention(q, k, v, window=None, sinks_N=sinks,
                           segment_ids=segments, implementation="xla",
                           **options)[:, LENGTH // 2:]
    return jnp.sum(o * do[:, LENGTH // 2:]), o

  (_, o), (dq, dk, dv) = jax.jit(jax.value_and_grad(
      whole, (0, 1, 2), has_aux=True))(q, k, v)
  found = jax.jit(functools.partial(
      in_parts, implementation=implementation, interpret=interpret,
      **options))(q, k, v, sinks, segments, do)
  for x, y in zip(found, (o, dq[:, LENGTH // 2:], dk, dv), strict=True):
    np.testing.assert_allclose(x, y, rtol=2e-5, atol=2e-5)
