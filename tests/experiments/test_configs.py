"""Every experiment at every budget: arms solved, equal, and trainable."""
import collections
import dataclasses
import json

import pytest

from experiments import budget as solver
from experiments import design as design_lib
from experiments import measured
from experiments import measurements
from experiments import plan
from experiments import suite
from jaxlm.train.step import check_together

BUDGETS = ("minute", "laptop", "gpu")
EXPERIMENTS = sorted(suite.experiments())


def load(name):
  return measured.load_config(suite.experiments()[name])


@pytest.fixture(scope="module", params=EXPERIMENTS)
def experiment(request):
  return load(request.param)


@pytest.fixture(scope="module", params=BUDGETS)
def config_and_design(request, experiment):
  config = experiment.get_config(request.param)
  return config, experiment.get_design(config)


def test_the_suite_names_all_experiments():
  assert set(suite.ORDER) == set(EXPERIMENTS) == set(suite.experiments())


def test_the_default_budget_is_a_laptops(experiment):
  assert experiment.get_config() == experiment.get_config("laptop")
  with pytest.raises(ValueError, match="'hour': use one of minute, laptop"):
    experiment.get_config("hour")


def test_arms_are_equal_within_half_a_percent(config_and_design):
  """Those with the same targets; and no arm is without a target."""
  config, design = config_and_design
  assert len(design.models) >= 2
  by_target = collections.defaultdict(list)
  for found in design.solutions.values():
    assert found.targets
    measured = solver.measure(found.config, config.train.seq_len)
    assert measured == found.achieved
    for quantity, target in found.targets.items():
      by_target[quantity, target].append(measured[quantity])
  for values in by_target.values():
    assert max(values) / min(values) - 1 <= 0.005
  # Most arms share a target with another.
  assert max(map(len, by_target.values())) >= len(design.models) / 2


def test_an_ablation_can_be_planned(config_and_design):
  config, design = config_and_design
  plan.check(config)
  measurements.check(design.measurements)
  configs = plan.arm_configs(config, design)
  rates = plan.rule(configs, design.models)
  for arm, model in design.models.items():
    found = plan.train_config(configs[arm], model, rates[arm])
    check_together(model, found)
    assert found.optimizer.learning_rate == rates[arm]
  ablation = plan.ablation(config, design, "name", rates, "data", "command")
  assert ablation.claims and ablation.baseline in design.models
  assert len(ablation.seeds) >= 2
  identity = plan.identity(config, design)
  assert json.loads(json.dumps(identity)) == identity
  # No two arms are the same: each can tell another its own.
  assert len({arm.identity for arm in ablation.arms}) == len(ablation.arms)


def test_an_arms_identity_is_all_that_decides_its_results():
  module = load("width_vs_depth")
  config = module.get_config("minute")
  def identities(config, **changes):
    design = dataclasses.replace(module.get_design(config), **changes)
    return plan.arm_identities(config, design)
  before = identities(config)
  same = config.copy_and_resolve_references()
  same.seeds, same.together, same.speed.repeats = (5, 6), True, 2
  assert identities(same) == before
  after = identities(config, overrides={"moe_2": {"train": {"steps": 31}}})
  assert [arm for arm in before if after[arm] != before[arm]] == ["moe_2"]
  config.balancing.switch = 0.5  # is nothing to a dense arm
  after = identities(config)
  assert [arm for arm in before if after[arm] == before[arm]] == ["dense_2"]


@pytest.mark.parametrize("overrides, message", [
    ({"moe_3": {}}, r"overrides of \['moe_3'\], which are no arms"),
    ({"moe_2": {"seeds": (1,)}}, "arms may differ in"),
    ({"moe_2": {"train": {"stepz": 1}}}, "arm 'moe_2'.*stepz"),
])
def test_overrides_with_a_typo_are_refused(overrides, message):
  module = load("width_vs_depth")
  config = module.get_config("minute")
  with pytest.raises(ValueError, match=message):
    plan.arm_configs(config, dataclasses.replace(
        module.get_design(config), overrides=overrides))


def test_depths_are_set_by_the_config():
  module = load("width_vs_depth")
  config = module.get_config("minute")
  config.model.moe_depths = (6, 3)
  config.model.dense_depths = (5,)
  design = module.get_design(config)
  assert {arm: model.num_layers for arm, model in design.models.items()} == {
      "moe_6": 6, "moe_3": 3, "dense_5": 5}
  assert design.baseline == "moe_3"
  claims = {claim.metric: claim.arms for claim in design.claims}
  assert claims["eval_loss"] == ("moe_6", "moe_3")
  assert claims["decode_tokens_per_second"] == ("moe_3", "moe_6")


def test_experts_are_set_by_the_config():
  module = load("few_vs_many_experts")
  config = module.get_config("minute")
  config.model.arms = ("32of4", "8of1", "16of2_shared", "32of2", "16of2")
  config.model.baseline = "8of1"
  design = module.get_design(config)
  shapes = {arm: (model.moe.num_experts, model.moe.experts_per_token,
                  model.moe.shared is not None)
            for arm, model in design.models.items()}
  assert shapes == {
      "32of4": (32, 4, False), "8of1": (8, 1, False),
      "16of2_shared": (15, 1, True), "32of2": (32, 2, False),
      "16of2": (16, 2, False)}
  shared = design.models["16of2_shared"].moe
  assert shared.shared == shared.expert
  monotone, better, worse = design.claims
  # Ordered by granularity, and only arms of one sparsity.
  assert monotone.arms == ("8of1", "16of2", "32of4")
  assert (better.arms, worse.arms) == (("16of2_shared", "16of2"),) * 2
  assert (better.kind, worse.kind) == ("less", "greater")
  assert "another share of the experts" in design.descriptions["32of2"]


@pytest.mark.parametrize("name", ["32", "32of", "of4", "32of4_sharde"])
def test_a_misspelt_arm_is_refused(name):
  module = load("few_vs_many_experts")
  config = module.get_config("minute")
  config.model.arms = ("8of1", name)
  with pytest.raises(ValueError, match=f"'{name}': use names such as"):
    module.get_design(config)


def test_a_target_out_of_reach_names_the_arm():
  module = load("width_vs_depth")
  config = module.get_config("minute")
  config.model.active_params = 5e3
  with pytest.raises(ValueError, match="arm 'moe_.'.*out of reach"):
    module.get_design(config)


def test_a_budget_with_a_typo_is_refused():
  with pytest.raises(KeyError, match="stepz"):
    design_lib.make_config({}, {"tiny": {"train": {"stepz": 1}}}, "tiny")


@pytest.mark.parametrize("section, values, message", [
    ("learning_rate", {"method": "guess"}, "method='guess': use 'rule'"),
    ("learning_rate", {"method": "grid", "grid": (1e-3, 0.0)}, "positive"),
    ("learning_rate", {"method": "grid", "seed": 1}, "not reported"),
    ("learning_rate", {"base": 0.0}, "must be positive"),
    ("speed", {"repeats": 0}, r"speed.repeats=0"),
])
def test_impossible_options_are_named(section, values, message):
  config = load(EXPERIMENTS[0]).get_config("minute")
  config[section].update(values)
  with pytest.raises(ValueError, match=message):
    plan.check(config)


def test_learning_rates_follow_the_stated_rule():
  config = load("width_vs_depth").get_config("minute")
  config.learning_rate.update({"base": 4e-3, "reference_d_model": 48,
                               "exponent": 0.5})
  make = lambda d_model: design_lib.decoder(
      config, 2, d_model, 3, mlp=design_lib.feed_forward(7))
  rates = plan.rule({"a": config, "b": config},
                    {"a": make(48), "b": make(192)})
  assert rates == pytest.approx({"a": 4e-3, "b": 2e-3})
  assert "0.004 \u00d7 (48 / d_model)^0.5" in plan.explain_rates(config, rates)
