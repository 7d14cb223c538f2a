"""Windowed attention on NVIDIA GPUs, Hopper first, by Pallas and Triton."""
import dataclasses
import functools

import jax
import jax.numpy as jnp

from pallas_kernels.windowed_attention import gpu_backward, gpu_forward
from pallas_kernels.windowed_attention.gpu_tiles import Problem, Tile, padded
from pallas_kernels.windowed_attention.options import Options


@dataclasses.dataclass(frozen=True)
class Blocks:
  """Tiles of the kernels of the forward and the backward pass."""
  forward: Tile
  dq: Tile
  dkv: Tile


def default_blocks(head_dim: int, v_head_dim: int, dtype) -> Blocks:
  t = Tile(128, 64, 4, 2)
  return Blocks(t, t, t)


def _problem(q_BTNH, k_BSKH, v_BSKH, segmented, options: Options, kernel):
  blocks = options.blocks or default_blocks(
      q_BTNH.shape[3], v_BSKH.shape[3], q_BTNH.dtype)
  return Problem(
      num_queries=q_BTNH.shape[1], num_keys=k_BSKH.shape[1],
      num_heads=q_BTNH.shape[2], num_kv_heads=k_BSKH.shape[2],
      head_dim=q_BTNH.shape[3], v_head_dim=v_BSKH.shape[3],
      dtype=q_BTNH.dtype, segmented=segmented, options=options,
      tile=getattr(blocks, kernel))


def _flat(x):
  return x.reshape(x.shape[0], -1)


def unsupported(*_):
  return None


def forward(q_BTNH, k_BSKH, v_BSKH, sinks_N, segment_ids_BS, options: Options):
  """The output [B, T, N, H] and log of the denominator, float32 [B, N, T]."""
  problem = _problem(q_BTNH, k_BSKH, v_BSKH, segment_ids_BS is not None,
                     options, "forward")
  if sinks_N is not None:
    sinks_N = sinks_N.astype(jnp.float32)
  if segment_ids_BS is not None:
    segment_ids_BS = segment_ids_BS.astype(jnp.int32)
  o, lse = gpu_forward.forward(_flat(q_BTNH), _flat(k_BSKH), _flat(v_BSKH),
                               sinks_N, segment_ids_BS, problem)
  batch, num_queries, num_heads, _ = q_BTNH.shape
  return (o.reshape(batch, num_queries, num_heads, -1),
          lse.reshape(batch, num_heads, num_queries))


def backward(q_BTNH, k_BSKH, v_BSKH, sinks_N, segment_ids_BS, o_BTNH, lse_BNT,
             do_BTNH, options: Options):
  """Gradients of q, k, v and (float32) the sinks, or None without sinks."""
  q, k, v, o, lse, do = (_flat(x) for x in (q_BTNH, k_BSKH, v_BSKH, o_BTNH,
                                            lse_BNT, do_BTNH))
  if segment_ids_BS is not None:
    segment_ids_BS = segment_ids_BS.astype(jnp.int32)
  problem = functools.partial(_problem, q_BTNH, k_BSKH, v_BSKH,
                              segment_ids_BS is not None, options)
  dq, delta = gpu_backward.dq_and_delta(q, k, v, segment_ids_BS, o, lse, do,
                                        problem("dq"))
  dk, dv = gpu_backward.dk_and_dv(q, k, v, segment_ids_BS, lse, delta, do,
                                  problem("dkv"))
  dsinks_N = None
  if sinks_N is not None:
    sinks_N1 = sinks_N.astype(jnp.float32)[:, None]
    dsinks_N = -jnp.sum(jnp.exp(sinks_N1 - lse_BNT)
                        * delta.reshape(lse_BNT.shape), (0, 2))
  return (dq.reshape(q_BTNH.shape), dk.reshape(k_BSKH.shape),
          dv.reshape(v_BSKH.shape), dsinks_N)
