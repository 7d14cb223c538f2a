"""What an expert matmul means, in plain jnp: every expert on every row."""
import jax.numpy as jnp


def expert_matmul(x_MD, weights_EDF, group_sizes_E, bias_EF=None):
  """Row m times its expert's weights; zero past the last group."""
  row_M = jnp.arange(x_MD.shape[0])
  end_E = jnp.cumsum(group_sizes_E)
  mine_EM = ((row_M >= (end_E - group_sizes_E)[:, None])
             & (row_M < end_E[:, None]))
  y_EMF = jnp.einsum("MD,EDF->EMF", x_MD, weights_EDF,
                     preferred_element_type=jnp.float32)
  if bias_EF is not None:
    y_EMF += bias_EF[:, None].astype(jnp.float32)
  return jnp.sum(jnp.where(mine_EM[..., None], y_EMF, 0), 0).astype(x_MD.dtype)
