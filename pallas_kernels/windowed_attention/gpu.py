"""Windowed attention on NVIDIA GPUs, Hopper first, by Pallas and Triton.

The kernels are in gpu_forward.py and gpu_backward.py; here is what they can
do, and with which tiles. Arrays are read where they lie, [B, T, N, H]: there
is no transpose and no copy, and nothing is stored but the outputs, lse and
delta = sum(o do), float32 [B, N, T].
"""
import dataclasses
import functools
import re

import jax
import jax.numpy as jnp

from pallas_kernels import platforms
from pallas_kernels.windowed_attention import gpu_backward, gpu_forward
from pallas_kernels.windowed_attention.gpu_tiles import Problem, Tile, padded
from pallas_kernels.windowed_attention.options import Options

DTYPES = (jnp.bfloat16, jnp.float16, jnp.float32)
MAX_HEAD_DIM = 256
MAX_ELEMENTS = 2 ** 31  # of one sequence: offsets in it are int32
MAX_BATCH = 65535  # the second dimension of a grid


@dataclasses.dataclass(frozen=True)
class Blocks:
  """The tiles of the forward kernel and of those for dq and for dk and dv."""
  forward: Tile
  dq: Tile
  dkv: Tile


def is_hopper() -> bool:
  """Whether what is compiled for has Hopper's shared memory, or more."""
  return bool(re.search(r"\b(G?H|G?B)(100|200|300|800|20)\b",
                        platforms.device_kind()))


def default_blocks(head_dim: int, v_head_dim: int, dtype, options: Options,
                   hopper: bool) -> Blocks:
  """Tiles by how many registers (at most 255 a thread) and how much shared
  memory (227 KB a multiprocessor on Hopper, elsewhere as little as 99) the
  compiler was seen to need.

  On Hopper none spills, every 16-bit matmul is an asynchronous wgmma, and
  where the head_dim is 64 two or three programs fit a multiprocessor, of which
  one multiplies while another takes its softmax. Small windows want small key
  blocks: those on the band's edges are half wasted. Float32 multiplies
  without tensor cores, its operands in registers.
  """
  dim = max(padded(head_dim), padded(v_head_dim))
  if jnp.dtype(dtype).itemsize == 4:
    tile = Tile(32, 32, 4, 2) if dim <= 64 else Tile(32, 32, 8, 1)
    if dim > 128 and not hopper:
      tile = Tile(16, 16, 8, 1)
    return Blocks(tile, tile, tile)
  if not hopper:
    if dim <= 64:
      return Blocks(Tile(128, 32, 4, 3), Tile(64, 32, 4, 2),
                    Tile(32, 64, 4, 2))
    if dim <= 128:
      return Blocks(Tile(128, 32, 8, 2), Tile(64, 32, 8, 2),
                    Tile(32, 64, 8, 2))
    return Blocks(Tile(64, 32, 8, 1), Tile(32, 32, 8, 1), Tile(16, 64, 8, 1))
  if dim <= 64:
    if options.window is not None and options.window <= 256:
      return Blocks(Tile(128, 32, 4, 3), Tile(128, 32, 4, 3),
                    Tile(64, 64, 4, 2))
    return Blocks(Tile(128, 64, 4, 3), Tile(128, 64, 4, 2),
                  Tile(64, 128, 8, 2))
  if dim <= 128:
    rows = 64 if options.soft_cap is None else 32
    return Blocks(Tile(128, 64, 8, 3), Tile(128, 64, 8, 2),
                  Tile(rows, 128, 8, 2))
  return Blocks(Tile(128, 64, 8, 2), Tile(128, 32, 8, 2), Tile(32, 128, 8, 2))


def _capability() -> float | None:
  """The GPU's, where one is at hand."""
  if jax.sharding.get_abstract_mesh().abstract_device is not None:
    return None
  capability = getattr(jax.devices()[0], "compute_capability", None)
  return None if capability is None else float(capability)


def unsupported(q_BTNH, k_BSKH, v_BSKH, segment_ids,
                options: Options) -> str | None:
  """Why these kernels cannot do this; None if they can."""
  blocks = options.blocks
  if blocks is not None and not isinstance(blocks, Blocks):
    raise ValueError(f"blocks={blocks}: expected "
                     "pallas_kernels.windowed_attention.gpu.Blocks")
  if (capability := _capability()) and capability < 8:
    return (f"compute capability {capability} of "
            f"{platforms.device_kind()}: Triton's matmuls ask for 8.0")
  dtypes = [x.dtype for x in (q_BTNH, k_BSKH, v_BSKH)]
  if dtypes[0] not in DTYPES or len(set(dtypes)) > 1:
    return (f"q, k and v are {', '.join(map(str, dtypes))}: give all three as "
            "bfloat16, float16 or float32")
  head_dim = max(q_BTNH.shape[3], v_BSKH.shape[3])
  if head_dim > MAX_HEAD_DIM:
    return (f"a head_dim of {head_dim} is more than registers hold: at most "
            f"{MAX_HEAD_DIM}")
  if q_BTNH.shape[0] > MAX_BATCH:
    return f"a batch of {q_BTNH.shape[0]} is more than {MAX_BATCH}: split it"
  for x in (q_BTNH, k_BSKH, v_BSKH):
    if x.size // x.shape[0] >= MAX_ELEMENTS:
      return (f"a sequence of {x.shape[1:]} has 2^31 elements or more: split "
              "its heads")
  return None


def _problem(q_BTNH, k_BSKH, v_BSKH, segment_ids, options, kernel):
  blocks = options.blocks or default_blocks(
      q_BTNH.shape[3], v_BSKH.shape[3], q_BTNH.dtype, options,
      is_hopper())
  return Problem(
      num_queries=q_BTNH.shape[1], num_keys=k_BSKH.shape[1],
      num_heads=q_BTNH.shape[2], num_kv_heads=k_BSKH.shape[2],
      head_dim=q_BTNH.shape[3], v_head_dim=v_BSKH.shape[3],
      dtype=q_BTNH.dtype, segmented=segment_ids is not None,
      options=options, tile=getattr(blocks, kernel))


def _flat(x):
  return None if x is None else x.reshape(x.shape[0], -1)


def _inside(sinks_N, segment_ids):
  return (None if sinks_N is None else sinks_N.astype(jnp.float32),
          [None if x is None else x.astype(jnp.int32)
           for x in segment_ids or (None, None)])


def forward(q_BTNH, k_BSKH, v_BSKH, sinks_N, segment_ids, options: Options):
  """The output [B, T, N, H] and log of the denominator, float32 [B, N, T]."""
  problem = _problem(q_BTNH, k_BSKH, v_BSKH, segment_ids, options,
                     "forward")
  sinks_N, segment_ids = _inside(sinks_N, segment_ids)
  o, lse = gpu_forward.forward(_flat(q_BTNH), _flat(k_BSKH), _flat(v_BSKH),
                               sinks_N, segment_ids, problem)
  batch, num_queries, num_heads, _ = q_BTNH.shape
  return (o.reshape(batch, num_queries, num_heads, -1),
          lse.reshape(batch, num_heads, num_queries))


def backward(q_BTNH, k_BSKH, v_BSKH, sinks_N, segment_ids, o_BTNH, lse_BNT,
             do_BTNH, options: Options):
  """Gradients of q, k, v and (float32) the sinks, or None without sinks."""
  problem = functools.partial(_problem, q_BTNH, k_BSKH, v_BSKH,
                              segment_ids, options)
  sinks_N, segment_ids = _inside(sinks_N, segment_ids)
  q, k, v, o, lse, do = map(_flat, (q_BTNH, k_BSKH, v_BSKH, o_BTNH, lse_BNT,
                                    do_BTNH.astype(q_BTNH.dtype)))
  dq, delta = gpu_backward.dq_and_delta(q, k, v, segment_ids, o, lse, do,
                                        problem("dq"))
  dk, dv = gpu_backward.dk_and_dv(q, k, v, segment_ids, lse, delta, do,
                                  problem("dkv"))
  dsinks_N = None
  if sinks_N is not None:
    dsinks_N = -jnp.sum(jnp.exp(sinks_N[:, None] - lse_BNT)
                        * delta.reshape(lse_BNT.shape), (0, 2))
  return (dq.reshape(q_BTNH.shape), dk.reshape(k_BSKH.shape),
          dv.reshape(v_BSKH.shape), dsinks_N)
