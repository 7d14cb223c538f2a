"""Arms of the experiment on sinks and biases."""
import pytest

from experiments import plan
from experiments.configs import sinks_and_biases


def test_each_arm_takes_something_away():
  config = sinks_and_biases.get_config()
  found = sinks_and_biases.get_design(config)
  assert {arm: (model.attention.sinks, "".join(model.attention.biases))
          for arm, model in found.models.items()} == {
              "gpt_oss": (True, "qkvo"), "no_sinks": (False, "qkvo"),
              "first_token": (False, "qkvo"), "no_biases": (True, ""),
              "q_bias": (True, "q"), "k_bias": (True, "k"),
              "v_bias": (True, "v"), "o_bias": (True, "o")}
  configs = plan.arm_configs(config, found)
  assert [arm for arm, own in configs.items() if own.data.first_token] == [
      "first_token"]
  # The bias of the keys is against a model of the same dimensions.
  assert found.models["k_bias"].mlp == found.models["no_biases"].mlp
  assert found.measurements == ("by_position", "long", "first_token")


def test_arms_are_chosen_by_the_config():
  config = sinks_and_biases.get_config("minute")
  config.model.arms = ("gpt_oss", "first_token")
  found = sinks_and_biases.get_design(config)
  assert [(claim.arms, claim.metric) for claim in found.claims] == [
      (("first_token", "gpt_oss"), "long_loss")]
  config.model.arms = ("gpt_oss", "p_bias")
  with pytest.raises(ValueError, match=r"\['p_bias'\]: use some of"):
    sinks_and_biases.get_design(config)
