"""Which feed-forward network, at equal parameters?

Dense models that differ in nothing but the activation: GELU without a gate,
SwiGLU, GeGLU, and gpt-oss's clamped SwiGLU. Without a gate there are two
matrices in place of three, so d_ff is half as large again.
"""
from experiments import design
from experiments.claims import Claim
from jaxlm.config import MLPConfig

# By arm the fields of MLPConfig, and how it is described.
FORMS = {
    "gelu": ({"activation": "gelu", "gated": False}, "GELU, no gate"),
    "swiglu": ({"activation": "silu"}, "SwiGLU: silu(gate) * up"),
    "geglu": ({"activation": "gelu"}, "GeGLU: gelu(gate) * up"),
    "clamped": ({"activation": "clamped_swiglu"},
                "gpt-oss's SwiGLU: gate and up clamped to 7, sigmoid of 1.702 "
                "gate, up + 1"),
}
MODEL = {
    "arms": tuple(FORMS), "total_params": 110e3, "num_layers": 4,
    "vocab_size": 260, "d_model": 48, "num_heads": 3, "head_dim": 16,
    "num_kv_heads": 1, "sliding_window": 128,
    # Where the search for a gated network's d_ff begins.
    "d_ff": 128, "dimension_step": 1,
    # How far the parameters may move to suit all arms.
    "slack": 0.02,
}
BUDGETS = {
    "minute": {"model": {"arms": ("gelu", "swiglu", "clamped")}},
    "laptop": {},
    "gpu": {"model": {
        "total_params": 5e6, "num_layers": 8, "d_model": 224,
        "num_heads": 8, "head_dim": 32, "num_kv_heads": 2, "d_ff": 640,
        "dimension_step": 4}},
}


def get_config(budget="laptop"):
  return design.make_config(MODEL, BUDGETS, budget)


def get_design(config) -> design.Design:
  model = config.model
  if unknown := set(model.arms) - set(FORMS):
    raise ValueError(f"model.arms names {sorted(unknown)}: use some of "
                     f"{tuple(FORMS)}")
  arms = {name: _arm(config, FORMS[name][0]) for name in model.arms}
  return design.Design(
      "At equal parameters, is a feed-forward network with a gate better than "
      "one without, and is gpt-oss's clamped form as good as plain SwiGLU?",
      model.arms[0],
      design.solve(config, arms, total_params=model.total_params),
      {name: FORMS[name][1] for name in model.arms},
      tuple(claim for claim in CLAIMS if set(claim.arms) <= set(model.arms)))


def _arm(config, form):
  model = config.model
  gated = form.get("gated", True)
  def make(d_ff):
    return design.decoder(
        config, model.num_layers, model.d_model, model.num_heads,
        mlp=MLPConfig(d_ff, bias=True, **form))
  return {"make": make, "free": {"d_ff": design.around(
      model.d_ff * (1 if gated else 1.5), model.dimension_step)}}


_SHAZEER = "Shazeer (arXiv 2002.05202), Table 1"
CLAIMS = (
    Claim("SwiGLU is better than GELU at equal size", _SHAZEER,
          "log-perplexity after 65,536 steps: 1.944 against 1.983", "less",
          ("swiglu", "gelu"), "eval_loss"),
    Claim("GeGLU is better than GELU at equal size", _SHAZEER,
          "log-perplexity after 65,536 steps: 1.942 against 1.983", "less",
          ("geglu", "gelu"), "eval_loss"),
    Claim("GeGLU and SwiGLU are equally good", _SHAZEER,
          "1.942 against 1.944, standard deviation 0.004 and 0.010", "equal",
          ("geglu", "swiglu"), "eval_loss", margin=0.025,
          remark="the margin is about 1 % of the loss, half of what the gate "
          "brings in that table"),
    Claim("gpt-oss's clamped form is as good as plain SwiGLU",
          "gpt-oss model card (arXiv 2508.10925), section 2.2",
          "no number", "equal", ("clamped", "swiglu"), "eval_loss",
          margin=0.025,
          remark="the clamp is for stability, which a small model does not "
          "lack; the margin is half of what the gate brings in Shazeer's "
          "Table 1"),
)
