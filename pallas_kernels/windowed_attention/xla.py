"""Windowed attention in chunks of queries, by XLA on any platform.

A chunk of C queries reads only the C + W - 1 keys its window can reach, so the
work is proportional to the band. Without a window the chunks form up to eight
spans, each of which reads the keys up to its own end: at most 1/16 more than
causal attention needs, in a program whose size does not depend on T. A chunk
sees all its keys at once, so its softmax is a single pass, and nothing larger
than a chunk's scores is ever stored; the backward pass recomputes them from
the logarithm of the softmax's denominator.

Inside, arrays are B K G T H: one matmul serves all query heads of a key head.
"""
import functools
import typing

import jax.numpy as jnp
from jax import lax

from pallas_kernels import vma
from pallas_kernels.windowed_attention import reference
from pallas_kernels.windowed_attention.options import Options

MAX_SPANS = 8


class Span(typing.NamedTuple):
  """Chunks `first` to `last` (not included), which read `keys` keys each."""
  first: int
  last: int
  keys: int


def chunk_rows(num_queries: int, window: int | None) -> int:
  """Queries of a chunk: half the window, or the length of a span; 64 to 256."""
  rows = num_queries // MAX_SPANS if window is None else window // 2
  return min(num_queries, max(64, min(256, rows)))


def _spans(num_queries, num_keys, chunk, options) -> list[Span]:
  num_chunks = -(-num_queries // chunk)
  if options.window is not None:
    return [Span(0, num_chunks, min(num_keys, chunk + options.window - 1))]
  edges = sorted({-(-num_chunks * i // MAX_SPANS)
                  for i in range(MAX_SPANS + 1)})
  return [Span(first, last, max(1, min(num_keys,
                                       options.q_offset + last * chunk)))
          for first, last in zip(edges, edges[1:])]


def _scan(body, carry, span: Span):
  return lax.scan(lambda c, i: (body(c, i), None), carry,
                  jnp.arange(span.first, span.last))[0]


def _slice(x, start, size, axis):
  return lax.dynamic_slice_in_dim(x, start, size, axis)


def _put(x, part, start, axis):
  return lax.dynamic_update_slice_in_dim(x, part.astype(x.dtype), start, axis)


def _starts(i, span, chunk, num_queries, num_keys, options):
  """First query and first key of chunk i, kept inside the arrays."""
  q_start = jnp.minimum(i * chunk, num_queries - chunk)
  if options.window is None:
    return q_start, 0
  k_start = q_start + options.q_offset - options.window + 1
  return q_start, jnp.clip(k_start, 0, num_keys - span.keys)


def _scores(q, k, segment_ids, q_start, k_start, options):
  """Masked scores [B, K, G, C, keys] and tanh(scores / cap), float32."""
  chunk, keys = q.shape[3], k.shape[2]
  s = options.scale * jnp.einsum("BKGCH,BKSH->BKGCS", q, k,
                                 preferred_element_type=jnp.float32)
  tanh = None
  if options.soft_cap is not None:
    tanh = jnp.tanh(s / options.soft_cap)
    s = options.soft_cap * tanh
  q_position = q_start + options.q_offset
  seen = reference.visible(q_position + jnp.arange(chunk),
                           k_start + jnp.arange(keys), options.window)
  if segment_ids is not None:
    q_segment = _slice(segment_ids[0], q_start, chunk, 1)
    k_segment = _slice(segment_ids[1], k_start, keys, 1)
    seen = seen & (q_segment[:, :, None] == k_segment[:, None])
    seen = seen[:, None, None]
  return jnp.where(seen, s, -jnp.inf), tanh


def _forward(q, k, v, sinks_KG, segment_ids, options: Options):
  """The output [B, K, G, T, H] and log of the denominator [B, K, G, T]."""
  *_, num_queries, _ = q.shape
  num_keys = k.shape[2]
  chunk = chunk_rows(num_queries, options.window)

  def chunk_forward(span, carry, i):
    o, lse = carry
    q_start, k_start = _starts(i, span, chunk, num_queries, num_keys, options)
    k_chunk = _slice(k, k_start, span.keys, 2)
    v_chunk = _slice(v, k_start, span.keys, 2)
    s, _ = _scores(_slice(q, q_start, chunk, 3), k_chunk, segment_ids,
                   q_start, k_start, options)
    top = jnp.max(s, -1)
    if sinks_KG is not None:
      top = jnp.maximum(top, sinks_KG[..., None])
    top = jnp.where(jnp.isfinite(top), top, 0)
    p = jnp.exp(s - top[..., None])
    total = jnp.sum(p, -1)
    if sinks_KG is not None:
      total += jnp.exp(sinks_KG[..., None] - top)
    total = jnp.where(total == 0, 1, total)
    o_chunk = jnp.einsum("BKGCS,BKSH->BKGCH", p.astype(v.dtype), v_chunk,
                         preferred_element_type=jnp.float32)
    return (_put(o, o_chunk / total[..., None], q_start, 3),
            _put(lse, top + jnp.log(total), q_start, 3))

  carry = (vma.zeros((*q.shape[:-1], v.shape[-1]), q.dtype, q),
           vma.zeros(q.shape[:-1], jnp.float32, q))
  for span in _spans(num_queries, num_keys, chunk, options):
    carry = _scan(functools.partial(chunk_forward, span), carry, span)
  return carry


def _backward(q, k, v, sinks_KG, segment_ids, o, lse, do,
              options: Options):
  """Gradients of q, k, v and the sinks."""
  num_queries, num_keys = q.shape[3], k.shape[2]
  chunk = chunk_rows(num_queries, options.window)
  delta = jnp.sum(o.astype(jnp.float32) * do.astype(jnp.float32), -1)

  def chunk_backward(span, carry, i):
    dq, dk, dv = carry
    q_start, k_start = _starts(i, span, chunk, num_queries, num_keys, options)
    q_chunk, do_chunk = (_slice(x, q_start, chunk, 3) for x in (q, do))
    k_chunk, v_chunk = (_slice(x, k_start, span.keys, 2) for x in (k, v))
    s, tanh = _scores(q_chunk, k_chunk, segment_ids, q_start, k_start,
                      options)
    # The last chunk may begin in rows that the one before has done.
    new = q_start + jnp.arange(chunk) >= i * chunk
    p = jnp.exp(s - _slice(lse, q_start, chunk, 3)[..., None])
    p = jnp.where(new[:, None], p, 0)
    dp = jnp.einsum("BKGCH,BKSH->BKGCS", do_chunk, v_chunk,
                    preferred_element_type=jnp.float32)
    ds = p * (dp - _slice(delta, q_start, chunk, 3)[..., None])
    if tanh is not None:
      ds *= 1 - tanh ** 2
    ds = (options.scale * ds).astype(q.dtype)
    einsum = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    dq_chunk = einsum("BKGCS,BKSH->BKGCH", ds, k_chunk)
    dq_chunk = jnp.where(new[:, None], dq_chunk,
                         _slice(dq, q_start, chunk, 3))
    dk_chunk = einsum("BKGCS,BKGCH->BKSH", ds, q_chunk)
    dv_chunk = einsum("BKGCS,BKGCH->BKSH", p.astype(do.dtype), do_chunk)
    return (_put(dq, dq_chunk, q_start, 3),
            _put(dk, _slice(dk, k_start, span.keys, 2) + dk_chunk, k_start, 2),
            _put(dv, _slice(dv, k_start, span.keys, 2) + dv_chunk, k_start, 2))

  carry = tuple(vma.zeros(x.shape, jnp.float32, x) for x in (q, k, v))
  for span in _spans(num_queries, num_keys, chunk, options):
    carry = _scan(functools.partial(chunk_backward, span), carry, span)
  dq, dk, dv = (dx.astype(x.dtype) for dx, x in zip(carry, (q, k, v)))
  if sinks_KG is None:
    return dq, dk, dv, None
  dsinks_KG = -jnp.sum(jnp.exp(sinks_KG[..., None] - lse) * delta, (0, 3))
  return dq, dk, dv, dsinks_KG


def _grouped(x_BTNH, num_kv_heads):
  """[B, T, N, H] as [B, K, G, T, H]."""
  batch, length, _, head_dim = x_BTNH.shape
  x = x_BTNH.reshape(batch, length, num_kv_heads, -1, head_dim)
  return x.transpose(0, 2, 3, 1, 4)


def _ungrouped(x):
  """[B, K, G, T, H] as [B, T, N, H]."""
  batch, _, _, length, head_dim = x.shape
  return x.transpose(0, 3, 1, 2, 4).reshape(batch, length, -1, head_dim)


def _inside(q_BTNH, k_BSKH, v_BSKH, sinks_N):
  num_kv_heads = k_BSKH.shape[2]
  if sinks_N is not None:
    sinks_N = sinks_N.astype(jnp.float32).reshape(num_kv_heads, -1)
  return (_grouped(q_BTNH, num_kv_heads), k_BSKH.transpose(0, 2, 1, 3),
          v_BSKH.transpose(0, 2, 1, 3), sinks_N)


def unsupported(*_) -> str | None:
  return None


def forward(q_BTNH, k_BSKH, v_BSKH, sinks_N, segment_ids, options: Options):
  """The output [B, T, N, H] and log of the denominator, float32 [B, N, T]."""
  o, lse = _forward(*_inside(q_BTNH, k_BSKH, v_BSKH, sinks_N), segment_ids,
                    options)
  return _ungrouped(o), lse.reshape(lse.shape[0], -1, lse.shape[-1])


def backward(q_BTNH, k_BSKH, v_BSKH, sinks_N, segment_ids, o_BTNH, lse_BNT,
             do_BTNH, options: Options):
  """Gradients of q, k, v and (float32) the sinks, or None without sinks."""
  q, k, v, sinks_KG = _inside(q_BTNH, k_BSKH, v_BSKH, sinks_N)
  o, do = (_grouped(x, k.shape[1]) for x in (o_BTNH, do_BTNH))
  dq, dk, dv, dsinks = _backward(q, k, v, sinks_KG, segment_ids, o,
                                 lse_BNT.reshape(q.shape[:-1]), do, options)
  if dsinks is not None:
    dsinks = dsinks.reshape(-1)
  return (_ungrouped(dq), dk.transpose(0, 2, 1, 3), dv.transpose(0, 2, 1, 3),
          dsinks)
