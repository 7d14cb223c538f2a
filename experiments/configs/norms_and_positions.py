"""Norms, where they stand, and how a model knows positions.

Each arm differs from the baseline (RMSNorm before each sub-layer, RoPE) in
one thing. Losses are also taken by position and in rows four times as long as
those of training. Warm-up is short, so that a placement which needs more of
it shows.
"""
from experiments import design
from experiments.claims import Claim
from experiments.measurements import LONGER
from jaxlm.config import NormConfig, RopeConfig

# By arm what is otherwise than in the baseline.
DESCRIPTIONS = {
    "rope": "RMSNorm before each sub-layer, RoPE on all layers",
    "layernorm": "LayerNorm in place of RMSNorm",
    "post": "norms after each residual sum, none before",
    "pre_and_post": "norms before each sub-layer and on what it writes",
    "learned": "learned positions in place of RoPE",
    "nope_full": "RoPE on sliding layers alone, none on full ones",
    "nope": "no positions at all",
}
MODEL = {
    "arms": tuple(DESCRIPTIONS), "active_params": 100e3, "num_layers": 4,
    "vocab_size": 260, "d_model": 48, "num_heads": 3, "head_dim": 16,
    "num_kv_heads": 1, "sliding_window": 64,
    # Where the search for d_ff begins.
    "d_ff": 112, "dimension_step": 1,
    # How far the parameters may move to suit all arms.
    "slack": 0.02,
}
BUDGETS = {
    "minute": {"model": {"arms": ("rope", "learned", "nope_full"),
                         "num_layers": 2, "active_params": 55e3}},
    "laptop": {"optimizer": {"warmup_steps": 5}},
    "gpu": {"model": {
        "active_params": 4e6, "num_layers": 8, "d_model": 224, "num_heads": 8,
        "head_dim": 32, "num_kv_heads": 2, "sliding_window": 128, "d_ff": 528,
        "dimension_step": 2},
            "optimizer": {"warmup_steps": 20}},
}


def get_config(budget="laptop"):
  return design.make_config(MODEL, BUDGETS, budget)


def get_design(config) -> design.Design:
  model = config.model
  if unknown := set(model.arms) - set(DESCRIPTIONS):
    raise ValueError(f"model.arms names {sorted(unknown)}: use some of "
                     f"{tuple(DESCRIPTIONS)}")
  solutions = design.solve(
      config, {name: _arm(config, name) for name in model.arms},
      active_params=model.active_params)
  return design.Design(
      "Do the kind and the place of norms matter, and which positions serve "
      "sequences longer than those of training?",
      model.arms[0], solutions,
      {name: DESCRIPTIONS[name] for name in model.arms},
      tuple(claim for claim in CLAIMS if set(claim.arms) <= set(model.arms)),
      {"total_params": "the table of learned positions is only looked up, and "
       f"all of it past seq_len, {LONGER - 1} of {LONGER} rows, is untrained"},
      measurements=("by_position", "long"))


def _changes(arm, seq_len):
  """The arguments of design.decoder that differ from the baseline's."""
  if arm == "layernorm":
    return {"norm": NormConfig("layernorm", eps=1e-5)}
  if arm in ("post", "pre_and_post"):
    return {"norm": NormConfig(eps=1e-5, placement=arm)}
  if arm == "rope":
    return {}
  sliding = RopeConfig() if arm == "nope_full" else None
  return {"attention": {"rope_full": None, "rope_sliding": sliding},
          "max_positions": LONGER * seq_len if arm == "learned" else 0}


def _arm(config, name):
  model, changes = config.model, _changes(name, config.train.seq_len)
  def make(d_ff):
    return design.decoder(
        config, model.num_layers, model.d_model, model.num_heads,
        mlp=design.feed_forward(d_ff), **changes)
  return {"make": make,
          "free": {"d_ff": design.around(model.d_ff, model.dimension_step)}}


_ALIBI = "Press et al. (arXiv 2108.12409), Fig. 1"
_RMSNORM = "Zhang and Sennrich (arXiv 1910.07467)"
CLAIMS = (
    Claim("RMSNorm is as good as LayerNorm", _RMSNORM,
          "comparable on every task", "equal", ("rope", "layernorm"),
          "eval_loss", margin=0.025,
          remark="no number says comparable: the margin is about 1 % of the "
          "loss"),
    Claim("RMSNorm is faster than LayerNorm", _RMSNORM,
          "7 % to 64 % less time", "greater", ("rope", "layernorm"),
          "tokens_per_second",
          remark="compiled, both norms are a small part of a step"),
    Claim("With a short warm-up, norms before sub-layers train better than "
          "norms after the sum", "Xiong et al. (arXiv 2002.04745)",
          "norms before train as well without a warm-up as those after with "
          "one", "less", ("rope", "post"), "eval_loss",
          remark="the gradients that need the warm-up grow with depth"),
    Claim("RoPE is better than learned positions",
          "EleutherAI, Rotary Embeddings: A Relative Revolution (2021)",
          "125M, OpenWebText2: loss 2.759 against 2.809", "less",
          ("rope", "learned"), "eval_loss"),
    Claim("RoPE extrapolates better than learned positions", _ALIBI,
          "RoPE better than absolute positions past the length of training; "
          "learned ones have none there", "less", ("rope", "learned"),
          "long_loss", remark="learned positions past the length of training "
          "are as they were initialised"),
    Claim("With RoPE on sliding layers alone, the loss past the length of "
          "training is lower than with RoPE on all",
          "Yang et al. (arXiv 2501.18795), RNoPE-SWA",
          "better at long contexts, equal at short ones", "less",
          ("nope_full", "rope"), "long_loss"),
    Claim("RoPE on sliding layers alone costs nothing at the length of "
          "training", "Yang et al. (arXiv 2501.18795), RNoPE-SWA",
          "equal at short contexts", "equal", ("nope_full", "rope"),
          "eval_loss", margin=0.025,
          remark="the margin is about 1 % of the loss"),
    Claim("Without positions a decoder extrapolates better than with RoPE",
          "Kazemnejad et al. (arXiv 2305.19466)",
          "better on reasoning tasks longer than in training", "less",
          ("nope", "rope"), "long_loss",
          remark="shown on tasks, not on the loss of text, and with full "
          "attention on all layers"),
)
