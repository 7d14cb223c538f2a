"""Looking up embeddings and making logits, where the vocabulary is split."""
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from jaxlm.parallel import mesh


def lookup(table_VD, tokens_BT, dtype, fsdp: bool):
  """Rows of a table, [B, T, D] in `dtype`.

  Not the table moves but the tokens: each device looks up those of all that
  split the table's width with it, in its own columns, and they exchange what
  they found. So the table's gradient is summed in float32 where it lies.
  """
  if mesh.current() is None:
    return table_VD[tokens_BT].astype(dtype)
  axes = mesh.rules(fsdp)
  width, vocab, shared = axes["embed"] or (), axes["vocab"], _shared(fsdp)

  def local(table_VD, tokens_BT):
    tokens_T = tokens_BT.reshape(-1)
    if width + shared:
      tokens_T = lax.all_gather(tokens_T, width + shared, tiled=True)
    row_T = tokens_T - lax.axis_index(vocab) * len(table_VD)
    here_T = (0 <= row_T) & (row_T < len(table_VD))
    x_TD = table_VD.at[jnp.where(here_T, row_T, len(table_VD))].get(
        mode="fill", fill_value=0).astype(dtype)
    if width:
      x_TD = lax.all_to_all(x_TD, width, 0, 1, tiled=True)
    if shared:
      x_TD = lax.psum_scatter(x_TD, shared, tiled=True)
    x_TD = lax.psum(x_TD, tuple(n for n in vocab if n not in shared))
    return x_TD.reshape(*tokens_BT.shape, -1)

  tokens = ("batch", "length")
  return mesh.manual(
      local, (mesh.spec("vocab", "embed", fsdp=fsdp), mesh.spec(*tokens)),
      mesh.spec(*tokens, None))(table_VD, tokens_BT)


def project(hidden_BTD, table_DV, fsdp: bool):
  """Logits, float32 [..., V], of hidden states [B, T, D] or [B, D]."""
  if mesh.current() is None:
    return _matmul(hidden_BTD, table_DV)
  shared = _shared(fsdp)

  def local(hidden_BTD, table_DV):
    table_DV = mesh.gather(table_DV, 0, "embed", fsdp)
    if not shared:
      return _matmul(hidden_BTD, table_DV)
    # Few tokens go to all parts of the vocabulary, their logits back.
    hidden_BTD = lax.all_gather(hidden_BTD, shared, tiled=True)
    return lax.all_to_all(_matmul(hidden_BTD, table_DV), shared, 0,
                          hidden_BTD.ndim - 1, tiled=True)

  lead = mesh.spec("batch", *["length"][:hidden_BTD.ndim - 2])
  return mesh.manual(
      local, (P(*lead, None), mesh.spec("embed", "vocab", fsdp=fsdp)),
      P(*lead, tuple(n for n in mesh.rules(fsdp)["vocab"] if n not in shared))
  )(hidden_BTD, table_DV)


def _matmul(hidden, table_DV):
  return jnp.einsum("...D,DV->...V", hidden, table_DV,
                    preferred_element_type=jnp.float32)


def _shared(fsdp: bool) -> tuple[str, ...]:
  """The axes of the mesh that split the vocabulary and the batch too."""
  axes = mesh.rules(fsdp)
  return tuple(name for name in axes["vocab"] if name in axes["batch"])
