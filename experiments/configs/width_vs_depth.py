"""Wide or deep? Depth varies at equal total and active parameters.

Mixtures of experts have equal total and equal active parameters; dense arms
have as many parameters in all as the mixtures have active.
"""
from experiments import budget as solver
from experiments import design
from experiments.claims import Claim

MODEL = {
    "moe_depths": (1, 2, 3, 4, 6), "dense_depths": (1, 2, 3, 4, 6),
    "total_params": 375e3, "active_params": 122e3,
    "num_experts": 8, "experts_per_token": 2,
    "vocab_size": 260, "head_dim": 16, "num_kv_heads": 1,
    "sliding_window": 128,
    # Where the search for each depth's dimensions begins: the shape at
    # reference_depth, others in proportion to depth ** -0.5.
    "reference_depth": 4, "d_model": 48, "d_expert": 72, "dimension_step": 1,
    # How far total and active parameters may move to suit all arms.
    "slack": 0.05,
}
BUDGETS = {
    "minute": {"model": {"moe_depths": (2, 4), "dense_depths": (2,)}},
    "laptop": {},
    "gpu": {"model": {
        "moe_depths": (2, 3, 4, 8, 16), "dense_depths": (2, 4, 8, 16),
        "total_params": 20e6, "active_params": 3.6e6, "num_experts": 32,
        "experts_per_token": 4, "head_dim": 32, "num_kv_heads": 2,
        "reference_depth": 8, "d_model": 224, "d_expert": 110,
        "dimension_step": 4, "slack": 0.02}},
}


def get_config(budget="laptop"):
  return design.make_config(MODEL, BUDGETS, budget)


def get_design(config) -> design.Design:
  model, seq_len = config.model, config.train.seq_len
  mixtures = {f"moe_{depth}": _mixture(config, depth)
              for depth in model.moe_depths}
  dense = {f"dense_{depth}": _dense(config, depth)
           for depth in model.dense_depths}
  targets = solver.common_targets(
      mixtures, {"total_params": model.total_params,
                 "active_params": model.active_params},
      model.slack, seq_len=seq_len)
  solutions = solver.solve_arms(mixtures, targets=targets, seq_len=seq_len)
  solutions |= solver.solve_arms(
      dense, targets={"active_params": targets["active_params"]},
      seq_len=seq_len)
  descriptions = {
      name: (f"{_layers(found.config.num_layers)}, " + (
          f"{model.num_experts} experts of which {model.experts_per_token}"
          if found.config.moe else "dense"))
      for name, found in solutions.items()}
  return design.Design(
      "At equal total and active parameters, is a wide, shallow model better "
      "than a narrow, deep one, and what does it cost?",
      f"moe_{min(model.moe_depths)}", solutions, descriptions,
      _claims(model), {
          "flops_per_token": "attention over the context grows with depth, "
          "parameters do not",
          "kv_bytes_per_token": "every layer has its own cache: depth costs "
          "memory"})


def _layers(number: int) -> str:
  return f"{number} layer" + "s" * (number > 1)


def _mixture(config, depth):
  model = config.model
  ratio = (model.reference_depth / depth) ** 0.5
  def make(d_model, d_expert, num_heads):
    return design.decoder(config, depth, d_model, num_heads, moe=design.experts(
        model.num_experts, model.experts_per_token, d_expert))
  return {
      "make": make, "prefer": design.attention_width_apart,
      "free": {
          "d_model": design.around(model.d_model * ratio,
                                   model.dimension_step),
          "d_expert": design.around(model.d_expert * ratio),
          "num_heads": design.heads_up_to(
              config, 2 * model.d_model * ratio / model.head_dim)}}


def _dense(config, depth):
  model = config.model
  d_model = model.d_model * (model.reference_depth / depth) ** 0.5
  def make(d_model, d_ff, num_heads):
    return design.decoder(config, depth, d_model, num_heads,
                          mlp=design.feed_forward(d_ff))
  def prefer(found):
    return (design.attention_width_apart(found)
            + solver.apart(found.mlp.d_ff, 3 * found.d_model))
  return {
      "make": make, "prefer": prefer,
      "free": {
          "d_model": design.around(d_model, model.dimension_step),
          "d_ff": design.around(3 * d_model, 2 * model.dimension_step),
          "num_heads": design.heads_up_to(
              config, 2 * d_model / model.head_dim)}}


def _claims(model):
  """Of the mixtures; those of the deepest and the shallowest."""
  wide, deep = (f"moe_{depth}" for depth in (
      min(model.moe_depths), max(model.moe_depths)))
  if wide == deep:
    return ()
  source = "Gemma 2 (arXiv 2408.00118), Table 9"
  said = "S. Raschka, From GPT-2 to gpt-oss (2025)"
  return (
      Claim("At equal parameters, deeper is slightly better", source,
            "9B, mean of 4 benchmarks: deep 52.0, wide 50.8", "less",
            (deep, wide), "eval_loss",
            remark="one seed at 9B; expect little at a small size"),
      Claim("Wider is faster to train", said, "no number", "greater",
            (wide, deep), "tokens_per_second"),
      Claim("Wider is faster to run", said, "no number", "greater",
            (wide, deep), "decode_tokens_per_second"),
      Claim("Wider needs more memory", said, "no number", "greater",
            (wide, deep), "peak_memory_bytes",
            remark="of a training step, without recomputation"),
      Claim("Wider needs more memory for the cache", said, "no number",
            "greater", (wide, deep), "kv_bytes_per_token",
            remark="the number of layers counts, if heads stay the same"),
  )
