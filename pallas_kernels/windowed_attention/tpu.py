"""Windowed attention on TPU, in Pallas: layouts and what is supported.

Inside, the sequence is the minor axis: q, o and do are [B, N, H, T], k and v
[B, K, H, S], the logarithm of the denominator (natural, float32) [B, N, T].
A minor head_dim of 64 would be padded to 128 in HBM, twice the bytes; and with
the sequence on the lanes the softmax reduces over sublanes, elementwise, with
one statistic per lane. XLA lets the matmul that makes q, k or v write this
layout, so the transposes here need cost nothing.
"""
import jax.numpy as jnp

from pallas_kernels.windowed_attention import tpu_backward, tpu_forward
from pallas_kernels.windowed_attention.options import Options
from pallas_kernels.windowed_attention.tpu_blocks import Blocks


def unsupported(q_BTNH, k_BSKH, v_BSKH, segment_ids,
                options: Options) -> str | None:
  """Why these cannot be done, and what to do; None if they can."""
  head_dim = q_BTNH.shape[3]
  if v_BSKH.shape[3] != head_dim:
    return (f"the values' head_dim {v_BSKH.shape[3]} differs from the keys' "
            f"{head_dim}: pad the smaller with zeros")
  if head_dim % 16:
    return (f"head_dim={head_dim} is not a multiple of 16: pad q, k and v "
            "with zeros")
  dtypes = {x.dtype for x in (q_BTNH, k_BSKH, v_BSKH)}
  if len(dtypes) > 1 or not dtypes <= {jnp.dtype("float32"),
                                       jnp.dtype("bfloat16")}:
    return (f"q, k, v are {q_BTNH.dtype}, {k_BSKH.dtype}, {v_BSKH.dtype}: "
            "cast all to bfloat16 or all to float32")
  return None


def sequence_minor(x_BTNH):
  """[B, T, N, H] as [B, N, H, T]."""
  return x_BTNH.transpose(0, 2, 3, 1)


def sequence_major(x_BNHT):
  """[B, N, H, T] as [B, T, N, H]."""
  return x_BNHT.transpose(0, 3, 1, 2)


def _blocks(options: Options) -> Blocks:
  blocks = Blocks() if options.blocks is None else options.blocks
  if not isinstance(blocks, Blocks):
    raise ValueError(f"blocks={blocks!r}: use "
                     "windowed_attention.tpu_blocks.Blocks")
  return blocks


def forward(q_BTNH, k_BSKH, v_BSKH, sinks_N, segment_ids, options: Options):
  """The output [B, T, N, H] and log of the denominator, float32 [B, N, T]."""
  o_BNHT, lse_BNT = tpu_forward.forward(
      *map(sequence_minor, (q_BTNH, k_BSKH, v_BSKH)), sinks_N, segment_ids,
      options, _blocks(options).forward)
  return sequence_major(o_BNHT), lse_BNT


def backward(q_BTNH, k_BSKH, v_BSKH, sinks_N, segment_ids, o_BTNH, lse_BNT,
             do_BTNH, options: Options):
  """Gradients of q, k, v and (float32) the sinks, or None without sinks."""
  q, k, v, o, do = map(sequence_minor,
                       (q_BTNH, k_BSKH, v_BSKH, o_BTNH, do_BTNH))
  *gradients, dsinks_N = tpu_backward.backward(
      q, k, v, sinks_N, segment_ids, o, lse_BNT, do, options,
      _blocks(options).backward)
  return *map(sequence_major, gradients), dsinks_N
