"""Few large or many small experts, at equal total and active parameters?

An arm NofK has N experts of which each token goes through K. From 8of1 to
128of16 experts are cut into ever smaller ones and nothing else changes; 32of4 is
gpt-oss-20b in miniature, 128of8 Qwen3-30B-A3B. In an arm NofK_shared, one of
the K experts is the same for all tokens.
"""
from experiments import budget as solver
from experiments import design
from experiments.claims import Claim
from experiments.scaling import Trend

MODEL = {
    "arms": ("8of1", "16of2", "32of4", "64of8", "128of16", "128of8",
             "32of4_shared", "64of8_shared"),
    "baseline": "32of4",
    "total_params": 410e3, "active_params": 75e3, "num_layers": 2,
    "vocab_size": 260, "head_dim": 16, "num_heads": 3, "num_kv_heads": 1,
    "sliding_window": 128,
    # Where the search for dimensions begins; d_expert is that of 8 experts.
    "d_model": 48, "d_expert": 160, "dimension_step": 1,
    # How far total and active parameters may move to suit all arms.
    "slack": 0.05,
}
BUDGETS = {
    "minute": {"model": {"arms": ("8of1", "16of2", "16of2_shared"),
                         "baseline": "16of2"}},
    "laptop": {},
    "gpu": {"model": {
        "arms": ("8of1", "16of2", "32of4", "64of8", "128of16", "128of8",
                 "32of4_shared", "64of8_shared"),
        "total_params": 20e6, "active_params": 3.6e6, "num_layers": 8,
        "head_dim": 32, "num_heads": 8, "num_kv_heads": 2, "d_model": 224,
        "d_expert": 420, "dimension_step": 4}},
}


def get_config(budget="laptop"):
  return design.make_config(MODEL, BUDGETS, budget)


def get_design(config) -> design.Design:
  model, seq_len = config.model, config.train.seq_len
  kinds = {name: _parse(name) for name in model.arms}
  arms = {name: _arm(config, kinds, name) for name in kinds}
  targets = solver.common_targets(
      arms, {"total_params": model.total_params,
             "active_params": model.active_params},
      model.slack, seq_len=seq_len)
  return design.Design(
      "At equal total and active parameters, are many small experts better "
      "than few large ones, and does a shared expert help?",
      model.baseline,
      solver.solve_arms(arms, targets=targets, seq_len=seq_len),
      {name: _describe(kinds, name) for name in kinds}, _claims(kinds), {
          "attention_params": "a router over more experts takes its "
          "parameters from the other parts"}, trend=_granularity(kinds))


def _parse(name):
  """32of4_shared: (32, 4, True)."""
  numbers, _, suffix = name.partition("_")
  total, of, active = numbers.partition("of")
  if (not of or not total.isdecimal() or not active.isdecimal()
      or suffix not in ("", "shared")):
    raise ValueError(f"model.arms names {name!r}: use names such as '32of4' "
                     "or '32of4_shared'")
  return int(total), int(active), suffix == "shared"


def _arm(config, kinds, name):
  model, (num_experts, experts_per_token, shared) = config.model, kinds[name]
  def make(d_model, d_expert, num_heads):
    return design.decoder(
        config, model.num_layers, d_model, num_heads, moe=design.experts(
            num_experts, experts_per_token, d_expert, shared))
  def prefer(found):
    return (solver.apart(found.d_model, model.d_model)
            + solver.apart(found.attention.num_heads, model.num_heads))
  # Attention is much the same in all arms but those of another sparsity, in
  # which it has to make up for fewer active experts.
  alike = _sparsity(kinds[name]) == _sparsity(next(iter(kinds.values())))
  heads = design.heads_up_to(config, (1.5 if alike else 3) * model.num_heads)
  return {
      "make": make, "prefer": prefer,
      "free": {
          "d_model": design.around(model.d_model, model.dimension_step,
                                   0.7, 1.8),
          "d_expert": design.around(model.d_expert * 8 / num_experts,
                                    low=0.4),
          "num_heads": [n for n in heads if n >= 0.6 * model.num_heads]}}


def _granularity(kinds):
  """The law's G: into how many experts one of the coarsest arm is cut."""
  fine = _fine(kinds)
  if len(fine) < 3:
    return None
  coarsest = kinds[fine[0]][0]
  return Trend("granularity", {name: kinds[name][0] / coarsest
                               for name in fine}, 0.58,
               "Krajewski et al. 2024, arXiv 2402.07871")


def _fine(kinds):
  """Arms that differ in nothing but how finely experts are cut."""
  first = next(iter(kinds))
  return sorted((name for name, kind in kinds.items()
                 if _sparsity(kind) == _sparsity(kinds[first])
                 and not kind[2]), key=lambda name: kinds[name][0])


def _sparsity(kind):
  num_experts, experts_per_token, _ = kind
  return num_experts / experts_per_token


def _describe(kinds, name):
  num_experts, experts_per_token, shared = kinds[name]
  text = f"{num_experts} experts of which {experts_per_token}"
  if shared:
    text += ", one of them for all tokens"
  first = next(iter(kinds))
  if _sparsity(kinds[name]) != _sparsity(kinds[first]):
    text += (f"; another share of the experts than in {first}, so that "
             "d_model has to differ too")
  return text


def _claims(kinds):
  """Of arms that differ in nothing else."""
  fine, claims = _fine(kinds), []
  if len(fine) > 1:
    claims.append(Claim(
        "The finer the experts, the better",
        "DeepSeekMoE (arXiv 2401.06066), Fig. 3; OLMoE (arXiv 2409.02060)",
        "better at every step; OLMoE: 8 to 32 experts +10 %, 32 to 64 1-2 %",
        "monotone", tuple(fine), "eval_loss",
        remark="with diminishing returns"))
  for name, kind in kinds.items():
    plain = name.removesuffix("_shared")
    if kind[2] and plain in kinds:
      claims += [
          Claim("A shared expert helps", "DeepSeekMoE (arXiv 2401.06066)",
                "better", "less", (name, plain), "eval_loss",
                remark="published results contradict each other"),
          Claim("A shared expert hurts slightly", "OLMoE (arXiv 2409.02060)",
                "slightly worse", "greater", (name, plain), "eval_loss",
                remark="published results contradict each other")]
  return tuple(claims)
