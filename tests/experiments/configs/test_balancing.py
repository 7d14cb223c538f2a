"""Arms of the experiment on balancing."""
import pytest

from experiments import plan
from experiments.configs import balancing


def test_each_arm_has_what_its_name_says():
  config = balancing.get_config()
  found = balancing.get_design(config)
  sections = {arm: own.balancing for arm, own
              in plan.arm_configs(config, found).items()}
  weights = {arm: {name: own[name] for name in (
      "switch", "sequence", "cv_importance", "cv_load") if own[name]}
      for arm, own in sections.items()}
  assert weights == {
      "none": {}, "cv_importance_0.1": {"cv_importance": 0.1},
      "switch_0.001": {"switch": 0.001}, "switch_0.01": {"switch": 0.01},
      "switch_0.1": {"switch": 0.1}, "sequence_0.01": {"sequence": 0.01},
      "sign_0.001": {}, "sign_0.01": {}, "proportional_0.01": {},
      "noisy_topk_0.1": {"cv_importance": 0.1, "cv_load": 0.1},
      "expert_choice": {}}
  rules = {arm: (own.bias_rule, own.bias_rate)
           for arm, own in sections.items() if own.bias_rule}
  assert rules == {"sign_0.001": ("sign", 0.001), "sign_0.01": ("sign", 0.01),
                   "proportional_0.01": ("proportional", 0.01)}


def test_only_routers_differ():
  found = balancing.get_design(balancing.get_config())
  kinds = {arm: model.moe.router.kind for arm, model in found.models.items()}
  assert kinds.pop("noisy_topk_0.1") == "noisy_topk"
  assert kinds.pop("expert_choice") == "expert_choice"
  assert set(kinds.values()) == {"topk_softmax"}
  assert {arm for arm, model in found.models.items()
          if model.moe.router.balance_bias} == {
              "sign_0.001", "sign_0.01", "proportional_0.01"}
  assert len({(model.d_model, model.attention, model.moe.expert)
              for model in found.models.values()}) == 1
  assert "not causal" in found.descriptions["expert_choice"]


def test_arms_and_whom_claims_are_of_are_set_by_the_config():
  config = balancing.get_config("minute")
  config.model.arms = ("none", "switch_0.03", "sign_0.02")
  config.model.baseline, config.model.loss_free = "switch_0.03", "sign_0.02"
  found = balancing.get_design(config)
  claims = {(claim.kind, claim.metric): claim.arms for claim in found.claims}
  assert claims["less", "eval_loss"] == ("sign_0.02", "switch_0.03")
  assert claims["equal", "eval_loss"] == ("sign_0.02", "switch_0.03")
  assert claims["less", "max_vio"] == ("switch_0.03", "none")


@pytest.mark.parametrize("name", ["switch", "none_1", "sign_x", "swich_0.1"])
def test_a_misspelt_arm_is_refused(name):
  config = balancing.get_config("minute")
  config.model.arms = ("none", name)
  with pytest.raises(ValueError, match=f"'{name}': use 'none'"):
    balancing.get_design(config)
