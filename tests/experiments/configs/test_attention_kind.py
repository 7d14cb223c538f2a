"""Arms of the experiment on kinds of attention."""
import pytest

from experiments.configs import attention_kind
from jaxlm.config import MLAConfig
from jaxlm.model import costs


def kept(model):
  """Values a layer keeps for each token."""
  return costs.cache_bytes(model, 1, 1) / model.num_layers


def test_arms_are_equal_in_parameters_and_four_of_them_in_cache():
  found = attention_kind.get_design(attention_kind.get_config())
  assert {arm: kept(model) for arm, model in found.models.items()} == {
      "mha": 96, "gqa": 32, "mqa": 16, "mla": 16, "mla_equal_cache": 32,
      "mha_equal_cache": 32, "mqa_equal_cache": 32}
  assert {arm for arm, solution in found.solutions.items()
          if "kv_bytes_per_token" in solution.targets} == set(
              attention_kind.EQUAL_CACHE)
  assert all(set(model.layer_pattern) == {"full"}
             for model in found.models.values())


@pytest.mark.parametrize("budget", ["laptop", "gpu"])
def test_arms_are_what_their_names_say(budget):
  models = attention_kind.get_design(
      attention_kind.get_config(budget)).models
  mla = {arm for arm, model in models.items()
         if isinstance(model.attention, MLAConfig)}
  assert mla == {"mla", "mla_equal_cache"}
  for arm in mla:
    attention = models[arm].attention
    assert attention.kv_rank < models[arm].d_model
    assert attention.rope_head_dim * 2 == attention.nope_head_dim
  heads = {arm: (model.attention.num_heads, model.attention.num_kv_heads)
           for arm, model in models.items() if arm not in mla}
  assert heads == {"mha": (6, 6), "gqa": (6, 2), "mqa": (6, 1),
                   "mha_equal_cache": (2, 2), "mqa_equal_cache": (3, 1)}
  assert not any(models[arm].attention.sinks or models[arm].attention.biases
                 for arm in heads)


def test_heads_are_set_by_the_config():
  config = attention_kind.get_config("minute")
  config.model.num_kv_heads = 3
  models = attention_kind.get_design(config).models
  assert models["gqa"].attention.num_kv_heads == 3
  assert kept(models["mla_equal_cache"]) == kept(models["gqa"]) == 48
  config.model.arms = ("gqa", "mlp")
  with pytest.raises(ValueError, match=r"\['mlp'\]: use some of"):
    attention_kind.get_design(config)
