"""How is the load of experts best balanced, and what does that cost?

All arms are one mixture, and differ in what evens its load out. An arm
KIND_NUMBER has a number of its kind:

  none                             nothing
  cv_importance, switch, sequence  the router's loss of that name, by weight
  sign, proportional               the loss-free bias, moved at that rate
  noisy_topk                       learned noise and Shazeer et al.'s two
                                   losses, each by that weight
  expert_choice                    experts choose tokens, an equal number each
"""
import dataclasses

from experiments import budget as solver
from experiments import design
from experiments.claims import Claim
from jaxlm.config import RouterConfig

MODEL = {
    "arms": ("none", "cv_importance_0.1", "switch_0.001", "switch_0.01",
             "switch_0.1", "sequence_0.01", "sign_0.001", "sign_0.01",
             "proportional_0.01", "noisy_topk_0.1", "expert_choice"),
    "baseline": "switch_0.01",
    # The one that loss-free claims are of.
    "loss_free": "sign_0.01",
    "total_params": 104e3, "num_layers": 2, "d_model": 32, "num_heads": 2,
    "num_experts": 8, "experts_per_token": 2,
    "vocab_size": 260, "head_dim": 16, "num_kv_heads": 1,
    "sliding_window": 128,
    # Where the search begins, and how far the size may move.
    "d_expert": 58, "slack": 0.02,
}
BUDGETS = {
    "minute": {"model": {"arms": ("none", "switch_0.01", "sign_0.01")}},
    "laptop": {},
    # In so many steps the published rate can move a bias by 0.7.
    "gpu": {"train": {"steps": 700, "eval_every": 140}, "model": {
        "total_params": 20e6, "num_layers": 8, "d_model": 224, "num_heads": 8,
        "num_experts": 32, "experts_per_token": 4, "head_dim": 32,
        "num_kv_heads": 2, "d_expert": 105, "loss_free": "sign_0.001"}},
}
# What a kind has for its number, and its description.
KINDS = {
    "none": ((), "nothing balances"),
    "cv_importance": (("cv_importance",),
                      "squared variation of the experts' summed weights"),
    "switch": (("switch",), "Switch's loss, over the whole batch"),
    "sequence": (("sequence",), "Switch's loss of each sequence alone"),
    "sign": (("bias_rate",), "loss-free bias, one step a batch"),
    "proportional": (("bias_rate",),
                     "loss-free bias, by how much load is missing"),
    "noisy_topk": (("cv_importance", "cv_load"),
                   "learned noise, losses of importance and of load"),
    "expert_choice": ((), "experts choose; not causal, as it sees the whole "
                      "batch: its loss is not comparable"),
}
BIAS_RULES = ("sign", "proportional")


def get_config(budget="laptop"):
  return design.make_config(MODEL, BUDGETS, budget)


def get_design(config) -> design.Design:
  model = config.model
  kinds = {arm: _parse(arm) for arm in model.arms}
  solutions = _solutions(config, kinds)
  return design.Design(
      "What balances the load of experts best, and what does balancing cost "
      "in loss?", model.baseline, solutions,
      {arm: _describe(*kind) for arm, kind in kinds.items()},
      tuple(claim for claim in _claims(model.baseline, model.loss_free)
            if set(claim.arms) <= set(kinds)),
      {"active_params": "noisy top-k has a matrix for its noise in each "
       "layer"},
      {arm: {"balancing": _balancing(*kind)} for arm, kind in kinds.items()})


def _parse(name):
  """switch_0.01: ("switch", 0.01)."""
  kind, number = name, ""
  if name not in KINDS:
    kind, _, number = name.rpartition("_")
  numbers, _ = KINDS.get(kind, ((), ""))
  try:
    if bool(numbers) == bool(number) and kind in KINDS:
      return kind, float(number or 0)
  except ValueError:
    pass
  raise ValueError(f"model.arms names {name!r}: use 'none', 'expert_choice' or "
                   "a kind and its number, such as 'switch_0.01'; kinds are "
                   f"{', '.join(KINDS)}")


def _balancing(kind, number):
  """What the config says of it counts in no arm, but for router_z."""
  names, _ = KINDS[kind]
  off = dict.fromkeys(("switch", "sequence", "cv_importance", "cv_load"), 0.0)
  return off | dict.fromkeys(names, number) | {
      "bias_rule": kind if kind in BIAS_RULES else None}


def _solutions(config, kinds):
  """Solved once; the arms' routers in the same model."""
  seq_len, plain = config.train.seq_len, "topk_softmax"
  found = design.solve(config, {"arms": _arm(config)},
                       total_params=config.model.total_params)["arms"]
  routers = {kind: RouterConfig(kind if kind in ("noisy_topk", "expert_choice")
                                else plain, bias=True,
                                balance_bias=kind in BIAS_RULES)
             for kind in KINDS}
  def with_router(router):
    moe = dataclasses.replace(found.config.moe, router=router)
    own = dataclasses.replace(found.config, moe=moe)
    achieved = solver.measure(own, seq_len)
    return dataclasses.replace(
        found, config=own, achieved=achieved,
        deviations={name: achieved[name] / target - 1
                    for name, target in found.targets.items()})
  return {arm: with_router(routers[kind]) for arm, (kind, _) in kinds.items()}


def _arm(config):
  model = config.model
  def make(d_expert):
    return design.decoder(
        config, model.num_layers, model.d_model, model.num_heads,
        moe=design.experts(model.num_experts, model.experts_per_token,
                           d_expert))
  return {"make": make, "free": {"d_expert": design.around(model.d_expert)}}


def _describe(kind, number):
  names, text = KINDS[kind]
  if not names:
    return text
  return f"{text}; {'rate' if kind in BIAS_RULES else 'weight'} {number:g}"


def _claims(switch, loss_free):
  wang = "Loss-Free Balancing (arXiv 2408.15664)"
  v3 = "DeepSeek-V3 (arXiv 2412.19437), section 4.5.3"
  shazeer = "Shazeer et al. 2017 (arXiv 1701.06538), Table 6"
  few_steps = ("its rate is 0.001, over many thousand steps; so few steps "
               "need a greater one")
  def less(text, source, published, arms, metric, remark=""):
    return Claim(text, source, published, "less", arms, metric, remark=remark)
  return (
      less("Loss-free balancing evens loads out better than Switch's loss",
           wang, "1B: MaxVio 0.04 and 0.72", (loss_free, switch), "max_vio",
           few_steps),
      less("Loss-free balancing costs no loss, and gains some", wang,
           "1B: perplexity 9.50 and 9.56, 0.006 nats", (loss_free, switch),
           "eval_loss", few_steps),
      less("The proportional rule balances better than the sign's", wang,
           "slightly better balance, no better loss",
           ("proportional_0.01", "sign_0.01"), "max_vio"),
      Claim("The heavier Switch's loss, the more even the load", wang,
            "no number", "monotone",
            ("switch_0.001", "switch_0.01", "switch_0.1"), "max_vio"),
      Claim("A heavy Switch loss costs loss", wang, "no number", "greater",
            ("switch_0.1", "switch_0.001"), "eval_loss"),
      Claim("Loss-free balancing is as good as a loss over the batch", v3,
            "1B: 2.253 and 2.253", "equal", (loss_free, switch), "eval_loss",
            0.02, "the margin is four times the largest difference published "
            "there; seeds of small models differ by more than that"),
      Claim("A loss of each sequence is worse than loss-free balancing", v3,
            "1B: 2.258 and 2.253", "greater", ("sequence_0.01", loss_free),
            "eval_loss", remark="expect a difference below what seeds differ"),
      less("Noise and two losses even loads out", shazeer,
           "heaviest expert over the mean: 17.80 without losses, 1.14 with",
           ("noisy_topk_0.1", "none"), "max_vio"),
      less("Noise and two losses improve the model", shazeer,
           "perplexity 39.8 without losses, 35.6 with",
           ("noisy_topk_0.1", "none"), "eval_loss",
           "here the arm without losses has no noise either"),
      less("The loss of importance alone evens loads out", shazeer,
           "heaviest expert over the mean: 17.80 without, 1.47 with",
           ("cv_importance_0.1", "none"), "max_vio", "its weight was 0.2"),
      less("Switch's loss evens loads out",
           "Switch Transformers (arXiv 2101.03961), section 2.2", "no number",
           (switch, "none"), "max_vio"),
  )
