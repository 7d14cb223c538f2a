"""Attention of sequences whose heads, rows and tokens are split over a mesh.

Heads are split over `tensor` and sequences over the batch's axes, of which no
attention sees more than its own. Of sequences in n parts over `context`

- a window sees only the last W - 1 tokens before a part: its halo, which the
  devices to the left send;
- over whole sequences the devices exchange tokens for heads, so that each
  attends with 1/n of the heads over all of the sequence, and back, if n divides
  the query heads and divides, or is a multiple of, the key heads: work is as
  even, and kernels are used, as without a mesh;
- otherwise keys travel round a ring and every device joins the softmax of its
  queries over each part. The last part has most to do: up to twice the time.

All is exact, and the memory for each device is that of its own tokens.
"""
import functools
import typing

import jax
import jax.numpy as jnp
from jax import lax

from jaxlm.parallel import mesh
from pallas_kernels import vma
from pallas_kernels.windowed_attention import (
    attend_part, part_gradients, windowed_attention)

AXIS = "context"
# A sink that takes no part in any softmax but for queries that see nothing;
# kernels mark what is unseen with less.
NOTHING = -1e20
# No sequence's segment: of a halo where there are no tokens before.
BEFORE = jnp.iinfo(jnp.int32).min


class Options(typing.NamedTuple):
  """As for `windowed_attention`.

  expand: (keys, weights) to k and v [B, S, K, H], where what is exchanged are
    not these themselves.
  scheme: of whole sequences, "heads", "ring" or "auto" as stated above.
  """
  window: int | None
  scale: float
  soft_cap: float | None = None
  implementation: str = "auto"
  expand: typing.Callable = lambda keys, weights: keys
  scheme: str = "auto"

  def attention(self) -> dict:
    return dict(scale=self.scale, soft_cap=self.soft_cap,
                implementation=self.implementation)


HEADS = ("batch", "length", "heads", None)
KEYS = ("batch", "length", "kv_heads", None)


def attention(q_BTNH, keys, weights, sinks_N, segment_ids_BT,
              options: Options, keys_axes=(KEYS, KEYS), weights_axes=()):
  """Attention of sequences, [B, T, N, H], under the mesh that is set, if any.

  Args:
    keys: k and v, or what `options.expand` makes them of, with logical axes
      `keys_axes`; `weights`: for that, with `weights_axes`.
    segment_ids_BT: or None.
  """
  if mesh.current() is None:
    return _attend(options, q_BTNH, keys, weights, sinks_N, segment_ids_BT)
  q_spec = mesh.spec(*HEADS)
  return mesh.manual(
      functools.partial(_sharded, options),
      (q_spec, tuple(mesh.spec(*axes) for axes in keys_axes),
       tuple(mesh.spec(*axes) for axes in weights_axes), mesh.spec("heads"),
       mesh.spec("batch", "length")),
      q_spec)(q_BTNH, keys, weights, sinks_N, segment_ids_BT)


def _attend(options, q, keys, weights, sinks_N, segment_ids, q_offset=0):
  return windowed_attention(
      q, *options.expand(keys, weights), window=options.window,
      sinks_N=sinks_N, segment_ids=segment_ids, q_offset=q_offset,
      **options.attention())


def _sharded(options, q_BTNH, keys, weights, sinks_N, segment_ids_BT):
  parts, length = lax.axis_size(AXIS), q_BTNH.shape[1]
  args = q_BTNH, keys, weights, sinks_N, segment_ids_BT
  if parts == 1:
    return _attend(options, *args)
  if options.window is not None and options.window < parts * length:
    return _with_halo(options, *args)
  options = options._replace(window=None)
  q_heads = q_BTNH.shape[2]
  kv_heads = jax.eval_shape(options.expand, keys, weights)[0].shape[2]
  divides = q_heads % parts == 0 and (
      kv_heads % parts == 0 or parts % kv_heads == 0)
  if options.scheme == "heads" or divides and options.scheme == "auto":
    return _by_heads(options, *args)
  return _ring(options, *vma.aligned(*args))


def _with_halo(options, q_BTNH, keys, weights, sinks_N, segment_ids_BT):
  parts, length = lax.axis_size(AXIS), q_BTNH.shape[1]
  wanted = min(options.window - 1, (parts - 1) * length)
  if wanted == 0:
    return _attend(options, q_BTNH, keys, weights, sinks_N, segment_ids_BT)

  def with_halo(x):
    found = [x]
    for hop in range(1, -(-wanted // length) + 1):
      last = min(length, wanted - (hop - 1) * length)
      # The first parts get zeros, which no query sees.
      found.insert(0, lax.ppermute(
          x[:, length - last:], AXIS,
          [(i, i + hop) for i in range(parts - hop)]))
    return jnp.concatenate(found, 1)

  if segment_ids_BT is None:
    segment_ids_BT = jnp.zeros(q_BTNH.shape[:2], jnp.int32)
  segment_ids_BT = vma.vary(segment_ids_BT, {AXIS})
  there = lax.axis_index(AXIS) * length + jnp.arange(-wanted, length) >= 0
  segments_BS = jnp.where(there, with_halo(segment_ids_BT), BEFORE)
  return _attend(options, q_BTNH, jax.tree.map(with_halo, keys), weights,
                 sinks_N, (segment_ids_BT, segments_BS), q_offset=wanted)


def _by_heads(options, q_BTNH, keys, weights, sinks_N, segment_ids_BT):
  """Exchanges tokens for heads, and back.

  Keys that are to be expanded come whole to all, each of which makes the
  heads of its own.
  """
  parts = lax.axis_size(AXIS)

  def own_heads(x, axis):
    size = x.shape[axis] // parts
    return lax.dynamic_slice_in_dim(x, lax.axis_index(AXIS) * size, size, axis)

  def exchange(x):
    if x.shape[2] < parts:
      x = jnp.repeat(x, parts // x.shape[2], 2)
    return lax.all_to_all(x, AXIS, 2, 1, tiled=True)

  if weights:
    keys = tuple(lax.all_gather(x, AXIS, axis=1, tiled=True) for x in keys)
    weights = tuple(own_heads(x, 1) for x in weights)
  else:
    keys = tuple(map(exchange, keys))
  if sinks_N is not None:
    sinks_N = own_heads(sinks_N, 0)
  if segment_ids_BT is not None:
    segment_ids_BT = lax.all_gather(segment_ids_BT, AXIS, axis=1, tiled=True)
  o = _attend(options, exchange(q_BTNH), keys, weights, sinks_N,
              segment_ids_BT)
  return lax.all_to_all(o, AXIS, 1, 2, tiled=True)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _ring(options, *args):
  return _ring_forward(options, *args)[0]


def _ring_forward(options, q, keys, weights, sinks_N, segments):
  low_N = vma.vary(jnp.full(q.shape[2], NOTHING), vma.varying(q))
  part = functools.partial(attend_part, window=None, sinks_N=low_N,
                           **options.attention())

  def join(total, found):
    (o, lse), (o_part, lse_part) = total, found
    both = jnp.logaddexp(lse, lse_part)
    return _weighed(o, lse - both) + _weighed(o_part, lse_part - both), both

  def earlier(travelling, total, sums):
    keys, k_segments = travelling
    found = _attend_earlier(part, q, *options.expand(keys, weights),
                            _pair(segments, k_segments))
    return functools.reduce(join, found, total), sums

  o, lse = part(q, *options.expand(keys, weights), segment_ids=segments)
  total = o.astype(jnp.float32), lse
  (o, lse), _ = _round(earlier, (keys, segments), total, ())
  if sinks_N is not None:
    both = jnp.logaddexp(lse, sinks_N[:, None].astype(jnp.float32))
    o, lse = _weighed(o, lse - both), both
  o = o.astype(q.dtype)
  return o, (q, keys, weights, sinks_N, segments, o, lse)


def _ring_backward(options, residuals, do):
  q, keys, weights, sinks_N, segments, o, lse = residuals
  part = functools.partial(part_gradients, window=None, **options.attention())

  def add(of_part, keys, total, sums):
    """What a part's k and v add to the gradients of all they were made of."""
    (k, v), vjp = jax.vjp(options.expand, keys, weights)
    dq, dk, dv = of_part(k, v)
    dkeys, dweights = vjp((dk.astype(k.dtype), dv.astype(v.dtype)))
    plus = functools.partial(jax.tree.map, lambda x, y: x + y)
    return plus(total, (dq, dweights)), plus(sums, dkeys)

  def earlier(travelling, total, sums):
    keys, k_segments = travelling
    return add(lambda k, v: _earlier_gradients(
        part, q, k, v, o, lse, do, _pair(segments, k_segments)), keys, total,
               sums)

  zeros = functools.partial(
      jax.tree.map, lambda x: vma.zeros(x.shape, jnp.float32, q))
  total, sums = add(
      lambda k, v: part(q, k, v, o, lse, do, segment_ids=segments), keys,
      zeros((q, weights)), zeros(keys))
  (dq, dweights), dkeys = _round(earlier, (keys, segments), total, sums)
  dsinks_N = None
  if sinks_N is not None:
    delta_BNT = jnp.einsum("BTNH,BTNH->BNT", o, do,
                           preferred_element_type=jnp.float32)
    dsinks_N = -jnp.sum(jnp.exp(sinks_N[:, None] - lse) * delta_BNT, (0, 2))
  gradients = dq, dkeys, dweights, dsinks_N
  return *jax.tree.map(lambda dx, x: dx.astype(x.dtype), gradients,
                       (q, keys, weights, sinks_N)), None


_ring.defvjp(_ring_forward, _ring_backward)


def _round(step, travelling, total, sums):
  """`step(travelling, total, sums)` on each device with what travels of all
  devices before it; `sums` travel too, and end where they began."""
  parts, index = lax.axis_size(AXIS), lax.axis_index(AXIS)

  def shifted(tree):
    return jax.tree.map(lambda x: lax.ppermute(
        x, AXIS, [(i, (i + 1) % parts) for i in range(parts)]), tree)

  def body(carry, hops):
    travelling, total, sums = carry
    following = shifted(travelling)  # while this is worked on
    total, sums = lax.cond(index >= hops, step, lambda _, *same: same,
                           travelling, total, sums)
    return (following, total, shifted(sums)), None

  carry, _ = lax.scan(body, (shifted(travelling), total, shifted(sums)),
                      jnp.arange(1, parts))
  return carry[1:]


def _attend_earlier(part, q, k, v, segments):
  """Outputs and logarithms of queries over keys that all come before.

  Kernels are causal: what they hide so, they find where both are reversed.
  """
  found = [part(q, k, v, segment_ids=segments)]
  if q.shape[1] > 1:
    q, k, v, segments = _reversed(q, k, v, segments)
    o, lse = part(q, k, v, segment_ids=segments)
    found.append((_back(o), _back(lse, axis=2, value=NOTHING)))
  return found


def _earlier_gradients(part, q, k, v, o, lse, do, segments):
  """The same, of gradients: dq, dk, dv, float32."""
  found = [part(q, k, v, o, lse, do, segment_ids=segments)]
  if q.shape[1] > 1:
    o, do = (_reverse(x, last=1) for x in (o, do))
    lse = _reverse(lse, last=1, axis=2)
    q, k, v, segments = _reversed(q, k, v, segments)
    dq, dk, dv = part(q, k, v, o, lse, do, segment_ids=segments)
    found.append((_back(dq), _back(dk, first=1), _back(dv, first=1)))
  return [sum(x.astype(jnp.float32) for x in xs) for xs in zip(*found)]


def _reversed(q, k, v, segments):
  """So that a query comes after the keys that came after it, not its own."""
  if segments is not None:
    segments = _reverse(segments[0], last=1), _reverse(segments[1], first=1)
  return _reverse(q, last=1), _reverse(k, first=1), _reverse(v, first=1), (
      segments)


def _reverse(x, first=0, last=0, axis=1):
  """Backwards, without so many at its ends."""
  return jnp.flip(lax.slice_in_dim(x, first, x.shape[axis] - last, axis=axis),
                  axis)


def _back(x, first=0, axis=1, value=0):
  """Forwards again, one more at its start, if so, or at its end."""
  pad = [(0, 0)] * x.ndim
  pad[axis] = first, 1 - first
  return jnp.pad(jnp.flip(x, axis), pad, constant_values=value)


def _pair(q_segments, k_segments):
  return None if q_segments is None else (q_segments, k_segments)


def _weighed(o_BTNH, log_BNT):
  return o_BTNH * jnp.exp(log_BNT).swapaxes(1, 2)[..., None]
