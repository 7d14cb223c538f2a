"""Arms of the dropout experiment."""
from experiments import plan
from experiments.configs import dropout_one_epoch


def test_arms_are_one_model_with_dropout_on_little_or_much_text():
  config = dropout_one_epoch.get_config()
  found = dropout_one_epoch.get_design(config)
  assert {arm: model.dropout for arm, model in found.models.items()} == {
      "one_0": 0, "one_0.1": 0.1, "one_0.2": 0.2,
      "many_0": 0, "many_0.1": 0.1, "many_0.2": 0.2}
  assert found.baseline == "one_0"
  text = {arm: own.data.train_tokens
          for arm, own in plan.arm_configs(config, found).items()}
  train = config.train
  seen = train.steps * train.batch_size * train.seq_len
  assert text == {arm: 0 if arm.startswith("one") else seen // 20
                  for arm in found.models}


def test_claims_compare_arms_of_the_same_text():
  found = dropout_one_epoch.get_design(dropout_one_epoch.get_config())
  assert [(claim.kind, claim.arms) for claim in found.claims] == [
      ("greater", ("one_0.1", "one_0")), ("greater", ("one_0.2", "one_0")),
      ("less", ("many_0.1", "many_0")), ("less", ("many_0.2", "many_0")),
      ("greater", ("many_0", "one_0"))]


def test_rates_and_epochs_are_set_by_the_config():
  config = dropout_one_epoch.get_config("minute")
  config.model.rates = (0.0, 0.3)
  config.model.epochs = 5
  found = dropout_one_epoch.get_design(config)
  assert list(found.models) == ["one_0", "one_0.3", "many_0", "many_0.3"]
  assert found.overrides["many_0.3"]["data"]["train_tokens"] == (
      30 * 4 * 256 // 5)
