"""The path from GPT-2 to gpt-oss."""
import pytest

from experiments.configs import gpt2_to_gpt_oss
from jaxlm.config import PROJECTIONS


def traits(model):
  """What the steps change, by name."""
  attention = model.attention
  ff = model.moe.expert if model.moe else model.mlp
  return {
      "dropout": model.dropout, "learned": model.max_positions > 0,
      "rope": attention.rope_full is not None, "activation": ff.activation,
      "moe": model.moe is not None,
      "grouped": attention.num_kv_heads < attention.num_heads,
      "pattern": model.layer_pattern, "norm": model.norm.kind,
      "sinks": attention.sinks}


@pytest.fixture(scope="module")
def design():
  return gpt2_to_gpt_oss.get_design(gpt2_to_gpt_oss.get_config())


def test_each_step_changes_one_thing(design):
  found = [traits(model) for model in design.models.values()]
  changed = [{name for name in now if now[name] != before[name]}
             for before, now in zip(found, found[1:])]
  assert changed == [
      {"dropout"}, {"learned", "rope"}, {"activation"}, {"moe"}, {"grouped"},
      {"pattern"}, {"norm"}, {"sinks"}]


def test_the_path_begins_at_gpt2_and_ends_at_gpt_oss(design):
  first, *_, last = design.models.values()
  assert traits(first) == {
      "dropout": 0.1, "learned": True, "rope": False,
      "activation": "gelu_tanh", "moe": False, "grouped": False,
      "pattern": ("full",), "norm": "layernorm", "sinks": False}
  assert traits(last) == {
      "dropout": 0.0, "learned": False, "rope": True,
      "activation": "clamped_swiglu", "moe": True, "grouped": True,
      "pattern": ("sliding", "full"), "norm": "rmsnorm", "sinks": True}
  for model in design.models.values():
    assert set(model.attention.biases) == set(PROJECTIONS)
  assert last.moe.router.bias and last.moe.expert.interleaved


def test_grouped_heads_have_as_many_parameters(design):
  before, after = (design.models[arm].attention for arm in ("moe", "gqa"))
  assert (before.num_heads + before.num_kv_heads
          == after.num_heads + after.num_kv_heads)


def test_claims_set_each_step_against_the_one_before(design):
  arms = list(design.models)
  steps = set(zip(arms[1:], arms))
  assert {claim.arms for claim in design.claims} == steps
  assert {claim.metric for claim in design.claims} == {
      "eval_loss", "kv_bytes_per_token"}


def test_steps_left_out_are_made_with_the_next():
  config = gpt2_to_gpt_oss.get_config("minute")
  config.model.arms = ("gqa", "rope")
  found = gpt2_to_gpt_oss.get_design(config)
  assert list(found.models) == ["rope", "gqa"] and not found.claims
  # The descriptions say so.
  assert found.descriptions["gqa"].split("; ") == [
      gpt2_to_gpt_oss.STEPS[step] for step in ("swiglu", "moe", "gqa")]
  config.model.arms = ("gpt2", "gpt3")
  with pytest.raises(ValueError, match=r"\['gpt3'\]: use some of"):
    gpt2_to_gpt_oss.get_design(config)
