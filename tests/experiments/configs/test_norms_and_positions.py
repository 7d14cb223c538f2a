"""Arms of the experiment on norms and positions."""
from experiments.configs import norms_and_positions


def test_each_arm_differs_in_what_it_is_named_for():
  config = norms_and_positions.get_config()
  found = norms_and_positions.get_design(config)
  base = found.models["rope"]
  assert (base.norm.kind, base.norm.placement) == ("rmsnorm", "pre")
  assert base.attention.rope_full and base.attention.rope_sliding
  norms = {arm: (model.norm.kind, model.norm.placement)
           for arm, model in found.models.items() if model.norm != base.norm}
  assert norms == {"layernorm": ("layernorm", "pre"),
                   "post": ("rmsnorm", "post"),
                   "pre_and_post": ("rmsnorm", "pre_and_post")}
  positions = {
      arm: (model.attention.rope_full is not None,
            model.attention.rope_sliding is not None, model.max_positions)
      for arm, model in found.models.items()
      if model.norm == base.norm and model != base}
  assert positions == {
      "learned": (False, False, 4 * config.train.seq_len),
      "nope_full": (False, True, 0), "nope": (False, False, 0)}


def test_length_is_measured_and_warm_up_short():
  config = norms_and_positions.get_config()
  found = norms_and_positions.get_design(config)
  assert set(found.measurements) == {"by_position", "long"}
  assert {claim.arms for claim in found.claims
          if claim.metric == "long_loss"} == {
              ("rope", "learned"), ("nope_full", "rope"), ("nope", "rope")}
  assert config.optimizer.warmup_steps <= config.train.steps // 20


def test_learned_positions_reach_as_far_as_longer_rows():
  config = norms_and_positions.get_config("minute")
  config.train.seq_len = 48
  found = norms_and_positions.get_design(config)
  assert found.models["learned"].max_positions == 192
