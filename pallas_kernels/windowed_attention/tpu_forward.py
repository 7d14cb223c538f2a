"""The forward pass of windowed attention on TPU."""


def forward(q_BNHT, k_BKHS, v_BKHS, sinks_N, segment_ids_BS, options, blocks):
  """The output [B, N, H, T] and log of the denominator, float32 [B, N, T]."""
  raise NotImplementedError
