"""The forward pass of windowed attention on TPU: which kernel does it."""
from pallas_kernels import platforms
from pallas_kernels.windowed_attention import (tpu_blocks, tpu_fold,
                                               tpu_running)


def forward(q_BNHT, k_BKHS, v_BKHS, sinks_N, segment_ids, options, blocks):
  """The output [B, N, H, T] and log of the denominator, float32 [B, N, T].

  `blocks` chooses the kernel: `FoldBlocks` or `RunningBlocks`; None takes the
  better one's best.
  """
  shape = tpu_blocks.Shape(
      q_BNHT.shape[3], q_BNHT.shape[2], q_BNHT.shape[1] // k_BKHS.shape[1],
      options.window,
      options.soft_cap is None and segment_ids is None
      and options.q_offset == 0)
  if blocks is None:
    blocks = tpu_blocks.forward_blocks(shape, platforms.tpu_generation())
  if isinstance(blocks, tpu_blocks.FoldBlocks):
    if reason := blocks.unfit(shape):
      raise ValueError(f"{blocks}: {reason}")
    return tpu_fold.forward(q_BNHT, k_BKHS, v_BKHS, sinks_N, options, blocks)
  return tpu_running.forward(q_BNHT, k_BKHS, v_BKHS, sinks_N, segment_ids,
                             options, blocks)
