"""Arms of the experiment on windows."""
import pytest

from experiments.configs import window


def sliding(model):
  return sum(kind.attention == "sliding" for kind in model.layers)


def test_ratios_are_exact_and_all_else_is_equal():
  found = window.get_design(window.get_config())
  assert {arm: (sliding(model), model.attention.sliding_window)
          for arm, model in found.models.items()} == {
              "full": (0, 128), "1to1": (6, 128), "3to1": (9, 128),
              "5to1": (10, 128), "window_16": (6, 16), "window_64": (6, 64),
              "window_512": (6, 512)}
  assert len({(model.d_model, model.num_layers, model.mlp)
              for model in found.models.values()}) == 1
  assert found.descriptions["5to1"] == "10 of 12 layers see 128 tokens"
  assert found.measurements == ("by_position",)


def test_caches_are_as_large_as_windows_make_them():
  found = window.get_design(window.get_config())
  size = {arm: solution.achieved["kv_bytes_per_token"]
          for arm, solution in found.solutions.items()}
  assert size["3to1"] / size["full"] == (9 * 128 / 1024 + 3) / 12
  assert size["window_16"] / size["full"] == (6 * 16 / 1024 + 6) / 12


def test_claims_are_of_the_arms_there_are():
  config = window.get_config("minute")
  config.model.arms = ("window_16", "5to1", "full", "window_64", "2to1")
  claims = window.get_design(config).claims
  assert [claim.arms for claim in claims if claim.kind == "equal"] == [
      ("2to1", "full"), ("5to1", "full"), ("window_16", "window_64")]
  assert [claim.arms for claim in claims if claim.kind == "monotone"] == [
      ("full", "2to1", "5to1"), ("window_64", "window_16")]


def test_the_window_is_set_by_the_config():
  config = window.get_config("minute")
  config.model.sliding_window = 40
  models = window.get_design(config).models
  assert models["1to1"].attention.sliding_window == 40
  assert models["window_16"].attention.sliding_window == 16


@pytest.mark.parametrize("name", ["window_", "3to", "full_1", "ato1"])
def test_a_misspelt_arm_is_refused(name):
  config = window.get_config("minute")
  config.model.arms = ("full", name)
  with pytest.raises(ValueError, match=f"'{name}': use 'full'"):
    window.get_design(config)
