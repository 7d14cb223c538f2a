"""A checkpoint of any format: what it is of, and its tensors, unread."""
import dataclasses
import functools
import re

import jax

from jaxlm.config import ModelConfig
from jaxlm.convert.tensors import Tensor
from jaxlm.model.transformer import init_params, per_layer
from pallas_kernels.quant import KINDS, MXFP4


@dataclasses.dataclass(frozen=True)
class Checkpoint:
  """Tensors by path in the per-layer parameters, in the order of the layers.

  `about` holds what the config does not and Hugging Face's config.json does
  (special tokens, context length); `files` the tokenizer's files.
  """
  config: ModelConfig
  tensors: dict[str, Tensor]
  about: dict = dataclasses.field(default_factory=dict)
  files: dict[str, bytes] = dataclasses.field(default_factory=dict)

  @property
  def nbytes(self) -> int:
    return sum(tensor.nbytes for tensor in self.tensors.values())

  @property
  def dtype(self) -> str:
    """That of most values which are floats."""
    sizes = {}
    for path, tensor in self.tensors.items():
      if path.rpartition("/")[2] not in KINDS:
        name = str(tensor.dtype)
        sizes[name] = sizes.get(name, 0) + tensor.nbytes
    return max(sizes, key=sizes.get)


def leaf_shapes(config: ModelConfig,
                quantized: dict | None = None) -> dict[str, tuple[int, ...]]:
  """Shapes of the leaves of the per-layer parameters, by path.

  Args:
    quantized: the kinds of leaves that are, by path (`quantized_leaves`); in
      place of each there are its parts.

  Raises:
    ValueError: the sizes are absurd; tracing such a model would not end.
  """
  shapes, quantized = {}, quantized or {}
  for path, shape in _dense_shapes(config).items():
    if path not in quantized:
      shapes[path] = shape
      continue
    kind = quantized[path]
    for name, part in zip(kind.PARTS, kind.part_shapes(shape), strict=True):
      shapes[f"{path}/{name}"] = part
  return shapes


@functools.lru_cache(maxsize=16)
def _dense_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
  experts = config.moe.num_experts if config.moe else 0
  largest = max(config.vocab_size, config.d_model, experts)
  if config.num_layers > 1024 or largest > 2 ** 20:
    raise ValueError(
        f"a config of {config.num_layers} layers and {experts} experts, width "
        f"{config.d_model} and vocabulary {config.vocab_size} is of no model")
  tree = jax.eval_shape(lambda key: per_layer(config, init_params(config, key)),
                        jax.random.key(0))
  return {path: leaf.shape for path, leaf
          in sorted(named_leaves(tree).items(), key=_in_order)}


def packed_leaves(config: ModelConfig, rules, theirs) -> dict:
  """The leaves that a format's tensors hold in MXFP4, with that kind."""
  packed = {}
  for rule in rules:
    path, _, part = rule.ours[0].rpartition("/")
    if part == "blocks":
      packed |= {path.format(layer=i): MXFP4 for i in range(config.num_layers)
                 if rule.theirs[0].format(layer=i) in theirs}
  return packed


def named_leaves(tree) -> dict:
  """Leaves by path, such as layers/0/mlp/down."""
  return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf
          for path, leaf in jax.tree.leaves_with_path(tree)}


def _in_order(item):
  """Layers by number, between what comes before and after them."""
  path = item[0]
  outer = path.split("/")[0]
  place = _ORDER.index(outer) if outer in _ORDER else len(_ORDER)
  return place, [int(part) if part.isdigit() else part
                 for part in re.split(r"(\d+)", path)]


_ORDER = ("embed", "layers", "final_norm", "unembedding")
