"""Arms of the experiment on precision."""
import pytest

from experiments import plan
from experiments.configs import precision


@pytest.mark.parametrize("budget", ["laptop", "gpu"])
def test_arms_are_one_model_in_several_precisions(budget):
  config = precision.get_config(budget)
  found = precision.get_design(config)
  assert len(set(found.models.values())) == 1
  trained = {
      arm: (own.train.dtype, own.train.simulate, own.train.eval_simulate)
      for arm, own in plan.arm_configs(config, found).items()}
  assert trained == {
      "float32": ("float32", "none", None),
      "bfloat16": ("bfloat16", "none", None),
      "mxfp4_after": ("float32", "none", "mxfp4_experts"),
      "mxfp4_aware": ("float32", "mxfp4_experts", None),
      "fp8": ("float32", "fp8", None)}
  assert found.baseline == "float32"


def test_the_aware_arm_is_set_against_rounding_afterwards():
  found = precision.get_design(precision.get_config())
  assert [claim.arms for claim in found.claims if claim.kind == "less"] == [
      ("mxfp4_aware", "mxfp4_after")]


@pytest.mark.parametrize("name", ["d_model", "d_expert"])
def test_dimensions_are_whole_blocks(name):
  config = precision.get_config("minute")
  config.model[name] = 48
  with pytest.raises(ValueError, match=f"{name}=48: MXFP4 needs a multiple"):
    precision.get_design(config)
