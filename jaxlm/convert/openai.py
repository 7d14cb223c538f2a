"""OpenAI's original layout of gpt-oss: config.json and safetensors."""
import pathlib
from collections.abc import Callable

from jaxlm.config import (PROJECTIONS, AttentionConfig, MLPConfig, MoEConfig,
                          ModelConfig, NormConfig, RopeConfig, RouterConfig,
                          YarnScaling)
from jaxlm.convert import files, shards
from jaxlm.convert.checkpoint import Checkpoint, leaf_shapes, packed_leaves
from jaxlm.convert.rules import Rule, bind, to_ours, to_theirs
from jaxlm.families import same_function
from jaxlm.families.hf_config import Fields

_ATTENTION = ("layers/{layer}/attention/", "block.{layer}.attn.")
_MOE = ("layers/{layer}/moe/", "block.{layer}.mlp.")
_QKV = tuple(_ATTENTION[0] + name for name in "qkv")

RULES = (
    Rule("embed/embedding", "embedding.weight", "V D -> V D"),
    Rule("final_norm/scale", "norm.scale", "D -> D"),
    Rule("unembedding", "unembedding.weight", "V D -> D V"),
    Rule("layers/{layer}/attention_norm/scale", "block.{layer}.attn.norm.scale",
         "D -> D"),
    Rule("layers/{layer}/mlp_norm/scale", "block.{layer}.mlp.norm.scale",
         "D -> D"),
    Rule(tuple(f"{path}_proj" for path in _QKV),
         "block.{layer}.attn.qkv.weight", "(N H) D -> D N H", axis=0),
    Rule(tuple(f"{path}_bias" for path in _QKV), "block.{layer}.attn.qkv.bias",
         "(N H) -> N H", axis=0),
    *(Rule(_ATTENTION[0] + ours, _ATTENTION[1] + theirs, pattern)
      for ours, theirs, pattern in (
          ("o_proj", "out.weight", "D (N H) -> N H D"),
          ("o_bias", "out.bias", "D -> D"),
          ("sinks", "sinks", "N -> N"))),
    *(Rule(_MOE[0] + ours, _MOE[1] + theirs, pattern)
      for ours, theirs, pattern in (
          ("router", "gate.weight", "E D -> D E"),
          ("router_bias", "gate.bias", "E -> E"),
          ("gate_up", "mlp1_weight", "E F D -> E D F"),
          ("gate_up_bias", "mlp1_bias", "E F -> E F"),
          ("down", "mlp2_weight", "E D F -> E F D"),
          ("down_bias", "mlp2_bias", "E D -> E D"),
          ("gate_up/blocks", "mlp1_weight.blocks", "E F J B -> E F J B"),
          ("gate_up/scales", "mlp1_weight.scales", "E F J -> E F J"),
          ("down/blocks", "mlp2_weight.blocks", "E D J B -> E D J B"),
          ("down/scales", "mlp2_weight.scales", "E D J -> E D J"))))

DEFAULTS = dict(head_dim=64, sliding_window=128, initial_context_length=4096,
                rope_theta=150000.0, rope_scaling_factor=32.0,
                rope_ntk_alpha=1.0, rope_ntk_beta=32.0, swiglu_limit=7.0)


def from_config(values: dict) -> ModelConfig:
  """The architecture; what the layout does not say is gpt-oss's.

  Raises:
    ValueError: a field is missing, wrong or unknown.
  """
  fields = Fields(values, DEFAULTS)
  scaling = None
  if fields("rope_scaling_factor", float) > 1:
    scaling = YarnScaling(
        fields("rope_scaling_factor", float), fields("initial_context_length"),
        beta_fast=fields("rope_ntk_beta", float),
        beta_slow=fields("rope_ntk_alpha", float), truncate=False)
  fields.ignore("initial_context_length", "rope_ntk_alpha", "rope_ntk_beta")
  rope = RopeConfig(fields("rope_theta", float), scaling)
  expert = MLPConfig(fields("intermediate_size"), "clamped_swiglu", bias=True,
                     interleaved=True,
                     swiglu_limit=fields("swiglu_limit", float))
  config = ModelConfig(
      vocab_size=fields("vocab_size"), d_model=fields("hidden_size"),
      num_layers=fields("num_hidden_layers"),
      attention=AttentionConfig(
          fields("num_attention_heads"), fields("num_key_value_heads"),
          fields("head_dim"), rope_full=rope, rope_sliding=rope,
          sliding_window=fields("sliding_window"), biases=PROJECTIONS,
          sinks=True),
      moe=MoEConfig(fields("num_experts"), fields("experts_per_token"), expert,
                    RouterConfig("topk_softmax", bias=True)),
      layer_pattern=("sliding", "full"), norm=NormConfig(eps=1e-5))
  fields.finish()
  return config


def to_config(config: ModelConfig) -> dict:
  """The inverse.

  Raises:
    ValueError: the layout cannot say this architecture.
  """
  attention, moe = config.attention, config.moe
  rope = getattr(attention, "rope_full", None)
  if moe is not None and rope is not None:
    scaling = rope.scaling or YarnScaling(factor=1.0)
    values = dict(
        num_hidden_layers=config.num_layers, num_experts=moe.num_experts,
        experts_per_token=moe.experts_per_token, vocab_size=config.vocab_size,
        hidden_size=config.d_model, intermediate_size=moe.expert.d_ff,
        swiglu_limit=moe.expert.swiglu_limit, head_dim=attention.head_dim,
        num_attention_heads=attention.num_heads,
        num_key_value_heads=attention.num_kv_heads,
        sliding_window=attention.sliding_window or 128)
    if isinstance(scaling, YarnScaling):
      values |= dict(initial_context_length=scaling.original_context,
                     rope_theta=rope.theta, rope_scaling_factor=scaling.factor,
                     rope_ntk_alpha=scaling.beta_slow,
                     rope_ntk_beta=scaling.beta_fast)
    if same_function(from_config(values), config):
      return values
  raise ValueError("OpenAI's layout is of gpt-oss alone and cannot say this "
                   f"architecture: {config}. Use another format")


def recognizes(path: pathlib.Path) -> bool:
  config = path / "config.json"
  if not config.is_file():
    return False
  values = files.read_json(config)
  return "model_type" not in values and "experts_per_token" in values


def read(directory: pathlib.Path) -> Checkpoint:
  """The checkpoint in a directory, its tensors not read yet.

  Raises:
    ValueError: something is missing, damaged, unknown or does not fit.
  """
  config = from_config(files.read_json(directory / "config.json"))
  tensors = shards.read_directory(directory)
  shapes = leaf_shapes(config, packed_leaves(config, RULES, tensors))
  return Checkpoint(config, to_ours(bind(RULES, shapes), tensors,
                                    str(directory)),
                    files=files.text_files(directory))


def write(checkpoint: Checkpoint, directory: pathlib.Path,
          progress: Callable[[int], None] = lambda nbytes: None) -> None:
  """Writes what OpenAI's own code reads.

  Raises:
    ValueError: the model is no gpt-oss.
  """
  files.write_json(directory / "config.json", to_config(checkpoint.config))
  units = bind(RULES, {path: tensor.shape for path, tensor
                       in checkpoint.tensors.items()})
  shards.write_directory(directory, to_theirs(units, checkpoint.tensors),
                         progress)
