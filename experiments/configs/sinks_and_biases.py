"""What do learned sinks and attention's biases do?

gpt_oss has sinks and all four biases, and each arm takes some of that away:
no_sinks the sinks; first_token too, but every row of its text begins with a
real token that has no meaning. no_biases has sinks and no biases, q_bias and
so on one of them.
"""
from experiments import budget as solver
from experiments import design
from experiments.claims import Claim

MODEL = {
    "arms": ("gpt_oss", "no_sinks", "first_token", "no_biases", "q_bias",
             "k_bias", "v_bias", "o_bias"),
    "baseline": "gpt_oss",
    "total_params": 54e3, "num_layers": 2, "d_model": 48, "num_heads": 3,
    "vocab_size": 260, "head_dim": 16, "num_kv_heads": 1,
    "sliding_window": 128,
    "d_ff": 96, "slack": 0.02,
}
BUDGETS = {
    "minute": {"model": {"arms": ("gpt_oss", "no_sinks", "no_biases")}},
    "laptop": {},
    "gpu": {"model": {
        "total_params": 4e6, "num_layers": 8, "d_model": 192, "num_heads": 6,
        "head_dim": 32, "num_kv_heads": 2, "d_ff": 560}},
}
# By arm: what it is, and how its attention differs from gpt-oss's.
ARMS = {
    "gpt_oss": ("sinks; biases of q, k, v and o", {}),
    "no_sinks": ("no sinks", {"sinks": False}),
    "first_token": ("no sinks; every row begins with an end-of-document",
                    {"sinks": False}),
    "no_biases": ("sinks, no bias", {"biases": ()}),
    **{f"{name}_bias": (f"sinks, {name}'s bias alone", {"biases": (name,)})
       for name in "qkvo"},
}


def get_config(budget="laptop"):
  return design.make_config(MODEL, BUDGETS, budget)


def get_design(config) -> design.Design:
  model = config.model
  if unknown := set(model.arms) - set(ARMS):
    raise ValueError(f"model.arms names {sorted(unknown)}: use some of "
                     f"{list(ARMS)}")
  arms = {name: ARMS[name] for name in model.arms}
  return design.Design(
      "Do sinks keep attention stable where the context is long, and which "
      "biases of attention matter?", model.baseline,
      design.solve(config, {name: _arm(config, changes)
                            for name, (_, changes) in arms.items()},
                   total_params=model.total_params),
      {name: description for name, (description, _) in arms.items()},
      tuple(claim for claim in _claims() if set(claim.arms) <= set(arms)),
      overrides={"first_token": {"data": {"first_token": True}}}
      if "first_token" in arms else {},
      measurements=("by_position", "long", "first_token"))


def _arm(config, changes):
  model = config.model
  def make(d_ff):
    return design.decoder(
        config, model.num_layers, model.d_model, model.num_heads,
        attention=changes, mlp=design.feed_forward(d_ff))
  def prefer(found):
    return solver.apart(found.mlp.d_ff, model.d_ff)
  return {"make": make, "prefer": prefer,
          "free": {"d_ff": design.around(model.d_ff)}}


def _claims():
  card = "gpt-oss model card (arXiv 2508.10925)"
  streaming = "StreamingLLM (arXiv 2309.17453)"
  emerges = "When Attention Sink Emerges (arXiv 2410.10781)"
  biases = "Role of Bias Terms (arXiv 2302.08626)"
  margin = ("the margin is what a few percent more training bring at this "
            "size")
  return (
      Claim("Sinks keep long contexts stable", f"{card}; {streaming}",
            "no number for learned sinks", "less", ("gpt_oss", "no_sinks"),
            "long_loss", remark="in rows four times as long as in training"),
      Claim("With sinks, the first token draws less attention", emerges,
            "sinks gone when attention need not sum to one", "less",
            ("gpt_oss", "no_sinks"), "first_token_mass",
            remark="the first token's role takes long to emerge in training"),
      Claim("A real first token draws attention as no other does", streaming,
            "all models have sinks at the first tokens", "greater",
            ("first_token", "no_sinks"), "first_token_mass"),
      Claim("A real first token is as good as a sink", streaming,
            "one sink token from the beginning of training suffices", "equal",
            ("first_token", "gpt_oss"), "long_loss", 0.02,
            f"{margin}; its rows have one token less of text"),
      Claim("The bias of the keys is redundant", biases,
            "exactly none, without rotary positions", "equal",
            ("k_bias", "no_biases"), "eval_loss", 0.02,
            f"rotary positions and sinks give it a meaning; {margin}"),
      Claim("The bias of the values does more than that of the queries",
            biases, "as argued there", "less", ("v_bias", "q_bias"),
            "eval_loss", remark="expect little at a small size"),
      Claim("Attention needs no biases",
            "S. Raschka, From GPT-2 to gpt-oss (2025)", "no number", "equal",
            ("no_biases", "gpt_oss"), "eval_loss", 0.02, margin),
  )
