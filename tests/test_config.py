import dataclasses
import json
import re

from hypothesis import given
from hypothesis import strategies as st
import pytest

from jaxlm.config import (AttentionConfig, LayerKind, LinearScaling,
                          Llama3Scaling, MLAConfig, MLPConfig, ModelConfig,
                          MoEConfig, NormConfig, RopeConfig, RouterConfig,
                          YarnScaling, stacks)
from jaxlm.config_dict import from_dict, to_dict

ATTENTION = AttentionConfig(
    num_heads=6, num_kv_heads=2, head_dim=10, sliding_window=7,
    rope_full=RopeConfig(150000.0, YarnScaling()),
    rope_sliding=RopeConfig(scaling=LinearScaling(8.0)),
    biases=("q", "o"), sinks=True, scale=0.3)
MOE = MoEConfig(5, 2, MLPConfig(24, "clamped_swiglu", interleaved=True),
                RouterConfig("topk_softmax", bias=True), shared=MLPConfig(16))
GROUPED = MoEConfig(12, 4, MLPConfig(24), RouterConfig(
    "sigmoid_topk", renormalize=True, balance_bias=True, num_groups=4,
    groups_per_token=2, weight_scale=2.5))
LATENT = MLAConfig(6, 11, 7, 4, 9, q_rank=8, rope=RopeConfig(
    scaling=YarnScaling(mscale=0.7, mscale_all_dim=1.3), interleaved=True))
MODEL = ModelConfig(
    vocab_size=61, d_model=14, num_layers=9, attention=ATTENTION,
    mlp=MLPConfig(32), moe=MOE, num_dense_layers=2,
    layer_pattern=("sliding", "full", "full"),
    norm=NormConfig("layernorm", 1e-5), dropout=0.1)


def with_scaling(scaling):
  return dataclasses.replace(MODEL, attention=dataclasses.replace(
      ATTENTION, rope_full=RopeConfig(1e6, scaling)))


@pytest.mark.parametrize("config", [
    MODEL, with_scaling(None), with_scaling(LinearScaling(2.0)),
    with_scaling(Llama3Scaling(factor=4.0)),
    with_scaling(YarnScaling(truncate=True)),
    ModelConfig(61, 14, 3, AttentionConfig(2, 1, 4), mlp=MLPConfig(8)),
    ModelConfig(61, 14, 3, LATENT, moe=GROUPED),
])
def test_a_config_survives_json(config):
  assert from_dict(ModelConfig, json.loads(json.dumps(to_dict(config)))) == (
      config)


def changed(**changes):
  """MODEL as a dict, with `a__b=value` for the field b of a."""
  values = to_dict(MODEL)
  for path, value in changes.items():
    *parents, name = path.split("__")
    where = values
    for parent in parents:
      where = where[parent]
    where[name] = value
  return values


@pytest.mark.parametrize("changes, message", [
    (dict(d_modle=3), "ModelConfig has no field 'd_modle': did you mean "
     "'d_model'?"),
    (dict(attention__head_size=3), "ModelConfig.attention has no field "
     "'head_size': did you mean 'head_dim'?"),
    (dict(zzz=3), "ModelConfig has no field 'zzz': its fields are vocab_size"),
    (dict(num_layers=True), "ModelConfig.num_layers=True: expected int, got "
     "bool"),
    (dict(num_layers="9"), "ModelConfig.num_layers='9': expected int, got str"),
    (dict(num_layers=9.0), "expected int, got float"),
    (dict(num_layers=None), "expected int, got NoneType"),
    (dict(dropout=True), "expected float, got bool"),
    (dict(dropout="0.1"), "expected float, got str"),
    (dict(tie_embeddings=1), "expected bool, got int"),
    (dict(final_soft_cap="x"), "ModelConfig.final_soft_cap='x': expected "),
    (dict(layer_pattern="full"), "ModelConfig.layer_pattern='full': expected"),
    (dict(layer_pattern=["full", 3]), "layer_pattern[1]=3: expected str, got"),
    (dict(attention=5), "ModelConfig.attention=5: expected a mapping of the "
     "fields of AttentionConfig or MLAConfig"),
    (dict(attention=None), "ModelConfig.attention=None: expected a mapping"),
    (dict(norm__eps=[1]), "ModelConfig.norm.eps=[1]: expected float, got list"),
    (dict(moe__expert__d_ff="1"), "ModelConfig.moe.expert.d_ff='1': expected"),
    (dict(attention__rope_full__scaling__type="NtkScaling"),
     "ModelConfig.attention.rope_full.scaling.type='NtkScaling': use one of "
     "['LinearScaling', 'Llama3Scaling', 'YarnScaling']"),
    (dict(attention__rope_full__scaling={"factor": 2.0}), "scaling.type=None"),
    (dict(attention__type="MQAConfig"), "ModelConfig.attention.type="
     "'MQAConfig': use one of ['AttentionConfig', 'MLAConfig']"),
    (dict(attention__type="MLAConfig"), "ModelConfig.attention has no field "
     "'num_kv_heads': did you mean 'num_heads'?"),
    (dict(norm__type="MLAConfig"), "ModelConfig.norm.type='MLAConfig': use "
     "'NormConfig'"),
    (dict(type="MLPConfig"), "ModelConfig.type='MLPConfig'"),
])
def test_bad_input_is_refused_by_name(changes, message):
  with pytest.raises(ValueError, match=re.escape(message)):
    from_dict(ModelConfig, changed(**changes))


def test_missing_fields_are_named():
  values = to_dict(MODEL)
  del values["vocab_size"], values["attention"]["head_dim"]
  with pytest.raises(ValueError, match="ModelConfig lacks vocab_size"):
    from_dict(ModelConfig, values)
  with pytest.raises(ValueError, match="ModelConfig.attention lacks head_dim"):
    from_dict(ModelConfig, values | {"vocab_size": 3})


def test_a_whole_number_is_a_float_and_a_config_is_itself():
  config = from_dict(ModelConfig, changed(final_soft_cap=30, norm__eps=1))
  assert config.final_soft_cap == 30.0
  assert isinstance(config.final_soft_cap, float)
  assert isinstance(config.norm.eps, float)
  assert from_dict(ModelConfig, changed(attention=ATTENTION)) == MODEL


@pytest.mark.parametrize("config, changes, message", [
    (MOE, dict(num_experts=10, experts_per_token=12),
     "experts_per_token=12 exceeds num_experts=10"),
    (MOE, dict(num_experts=0), "MoEConfig.num_experts=0: must be positive"),
    (MODEL, dict(d_model=-3), "ModelConfig.d_model=-3: must be positive"),
    (MODEL, dict(layer_pattern=()), "layer_pattern is empty: use kinds from"),
    (MODEL, dict(layer_pattern=("local",)), "unknown kind 'local', use ('f"),
    (MODEL, dict(attention=dataclasses.replace(ATTENTION, sliding_window=None)),
     "needs attention.sliding_window"),
    (MODEL, dict(mlp=None, moe=None), "neither mlp nor moe is given"),
    (MODEL, dict(num_dense_layers=10), "num_dense_layers=10 is not between 0 "
     "and num_layers=9"),
    (MODEL, dict(num_dense_layers=-1), "num_dense_layers=-1 is not between"),
    (MODEL, dict(moe=None), "leave it 0 without moe"),
    (MODEL, dict(mlp=None), "num_dense_layers=2 with mlp=None"),
    (MODEL, dict(num_dense_layers=0), "num_dense_layers=0 with mlp=given"),
    (MODEL, dict(max_positions=-1), "max_positions=-1: must not be negative"),
    (MODEL, dict(dropout=1.0), "dropout=1.0: must be in [0, 1)"),
    (MODEL, dict(final_soft_cap=0.0), "final_soft_cap=0.0: must be positive"),
    (ATTENTION, dict(num_kv_heads=4), "num_heads=6 is not a multiple of "
     "num_kv_heads=4"),
    (ATTENTION, dict(sliding_window=0), "sliding_window=0: must be positive"),
    (ATTENTION, dict(soft_cap=-1.0), "soft_cap=-1.0: must be positive"),
    (ATTENTION, dict(scale=float("nan")), "scale=nan: must be positive"),
    (ATTENTION, dict(biases=("q", "x")), "biases=('q', 'x'): use some of"),
    (ATTENTION, dict(head_dim=9), "head_dim=9: rotary positions need an even"),
    (MOE.expert, dict(d_ff=0), "MLPConfig.d_ff=0: must be positive"),
    (MOE.expert, dict(activation="swish"), "MLPConfig.activation='swish': use "
     "one of ('gelu'"),
    (MOE.expert, dict(gated=False), "interleaved=True needs gated=True"),
    (MOE.expert, dict(gated=False, interleaved=False),
     "activation='clamped_swiglu' needs gated=True"),
    (MOE.router, dict(kind="top_k"), "RouterConfig.kind='top_k': use one of"),
    (MOE.router, dict(renormalize=True), "renormalize=True has no meaning for "
     "kind='topk_softmax'"),
    (MOE.router, dict(kind="expert_choice", balance_bias=True),
     "balance_bias=True has no meaning for kind='expert_choice'"),
    (MOE.router, dict(kind="noisy_topk", num_groups=3, bias=False),
     "num_groups=3 has no meaning for kind='noisy_topk'"),
    (MOE.router, dict(kind="expert_choice", weight_scale=2.0),
     "weight_scale=2.0 has no meaning for kind='expert_choice'"),
    (GROUPED.router, dict(groups_per_token=5), "groups_per_token=5 exceeds "
     "num_groups=4"),
    (GROUPED, dict(num_experts=10), "num_experts=10 is not a multiple of "
     "router.num_groups=4"),
    (GROUPED, dict(experts_per_token=7), "experts_per_token=7 exceeds the 6 "
     "experts of groups_per_token=2 of 4 groups"),
    (MODEL, dict(attention=LATENT), "latent attention is full, use ('full',)"),
    (LATENT, dict(rope_head_dim=5), "rope_head_dim=5: rotary positions need"),
    (LATENT, dict(kv_rank=0), "MLAConfig.kv_rank=0: must be positive"),
    (LATENT, dict(q_rank=0), "MLAConfig.q_rank=0: must be positive"),
    (MODEL.norm, dict(kind="batchnorm"), "NormConfig.kind='batchnorm': use"),
    (MODEL.norm, dict(placement="both"), "NormConfig.placement='both': use"),
    (MODEL.norm, dict(eps=0.0), "NormConfig.eps=0.0: must be positive"),
    (RopeConfig(), dict(theta=0.0), "RopeConfig.theta=0.0: must be positive"),
    (LinearScaling(2.0), dict(factor=0.0), "factor=0.0: must be positive"),
    (Llama3Scaling(), dict(high_freq_factor=1.0), "high_freq_factor=1.0: must "
     "exceed low_freq_factor=1.0"),
    (YarnScaling(), dict(factor=0.5), "factor=0.5: must be at least 1"),
    (YarnScaling(), dict(mscale=-1.0), "mscale=-1.0: must not be negative"),
    (YarnScaling(), dict(beta_fast=1.0), "beta_fast=1.0: must exceed "
     "beta_slow=1.0"),
])
def test_impossible_values_are_refused_by_name(config, changes, message):
  with pytest.raises(ValueError, match=re.escape(message)):
    dataclasses.replace(config, **changes)


def layers_of(runs):
  return tuple(kind for run in runs for _ in range(run.repeats)
               for kind in run.kinds)


PATTERNS = st.lists(st.sampled_from(["sliding", "full"]), min_size=1,
                    max_size=7)


@given(PATTERNS, st.integers(1, 40), st.integers(0, 40))
def test_stacks_are_the_layers_in_order(pattern, num_layers, dense):
  dense = min(dense, num_layers)
  config = dataclasses.replace(
      MODEL, num_layers=num_layers, layer_pattern=tuple(pattern),
      num_dense_layers=dense, mlp=MODEL.mlp if dense else None)
  runs = stacks(config)
  assert layers_of(runs) == config.layers
  assert len(config.layers) == num_layers
  for i, kind in enumerate(config.layers):
    assert kind == LayerKind(pattern[i % len(pattern)], i >= dense)
  starts = [0]
  for run in runs:
    assert run.start == starts[-1] and run.repeats > 0
    starts.append(run.start + run.repeats * len(run.kinds))
  # A whole run and a remainder, of dense layers and of experts.
  assert len(runs) <= 4


@pytest.mark.parametrize("pattern, layers, dense, expected", [
    (("sliding", "full"), 24, 0, [(2, 12, 0)]),  # gpt-oss
    (("sliding",) * 5 + ("full",), 26, 0, [(6, 4, 0), (2, 1, 24)]),  # Gemma 3
    (("full",), 61, 3, [(1, 3, 0), (1, 58, 3)]),  # DeepSeek-V3
    (("sliding", "full"), 7, 3,
     [(2, 1, 0), (1, 1, 2), (2, 2, 3)]),
])
def test_stacks_of_published_patterns(pattern, layers, dense, expected):
  config = dataclasses.replace(
      MODEL, num_layers=layers, layer_pattern=pattern, num_dense_layers=dense,
      mlp=MODEL.mlp if dense else None)
  assert [(len(run.kinds), run.repeats, run.start)
          for run in stacks(config)] == expected
