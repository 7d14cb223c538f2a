"""Dropout where no text is seen twice, and where all of it is seen many times.

One model and as many steps everywhere. The one_ arms see less than one epoch
of the text; the many_ arms have so little of it that they see it `epochs`
times. The held-out text is the same. After the underscore: the dropout.
"""

from experiments import budget as solver
from experiments import design
from experiments.claims import Claim

MODEL = {
    "rates": (0.0, 0.1, 0.2), "epochs": 20,
    "num_layers": 2, "vocab_size": 260, "d_model": 64, "num_heads": 4,
    "head_dim": 16, "num_kv_heads": 1, "sliding_window": 128, "d_ff": 192,
}
BUDGETS = {
    "minute": {"model": {"rates": (0.0, 0.1)}},
    "laptop": {},
    "gpu": {"model": {
        "num_layers": 8, "d_model": 224, "num_heads": 8, "head_dim": 32,
        "num_kv_heads": 2, "d_ff": 528}},
}


def get_config(budget="laptop"):
  return design.make_config(MODEL, BUDGETS, budget)


def get_design(config) -> design.Design:
  model, train = config.model, config.train
  solutions, descriptions, overrides = {}, {}, {}
  seen = train.steps * train.batch_size * train.seq_len * train.accumulate
  for epochs, text in (("one", "less than one epoch"),
                       ("many", f"{model.epochs} epochs of little text")):
    for rate in model.rates:
      name = f"{epochs}_{rate:g}"
      solutions[name] = solver.fixed(_model(config, rate), train.seq_len)
      descriptions[name] = (
          f"{f'dropout {rate:g}' if rate else 'no dropout'}, {text}")
      if epochs == "many":
        overrides[name] = {"data": {"train_tokens": seen // model.epochs}}
  return design.Design(
      "Does dropout hurt where no text is seen twice, and help where all of "
      "it is seen many times?",
      f"one_{model.rates[0]:g}", solutions, descriptions,
      _claims(model.rates), overrides=overrides)


def _model(config, rate):
  model = config.model
  return design.decoder(
      config, model.num_layers, model.d_model, model.num_heads,
      mlp=design.feed_forward(model.d_ff), dropout=rate)


def _claims(rates):
  """Of the first rate, which is none, against the others."""
  none, *others = (f"{rate:g}" for rate in rates)
  once = "Liu, Bauer and Manning (arXiv 2505.24788)"
  claims = [
      Claim(f"In one epoch dropout {rate} hurts", once,
            "Pythia 160M and 1.4B: better without, in language modelling and "
            "downstream", "greater", (f"one_{rate}", f"one_{none}"),
            "eval_loss") for rate in others]
  repeated = "Xue et al. (arXiv 2305.13230), section 4"
  claims += [
      Claim(f"In many epochs dropout {rate} helps", repeated,
            "T5: takes away much of what repeated text costs", "less",
            (f"many_{rate}", f"many_{none}"), "eval_loss",
            remark="if the model has learnt the text by heart")
      for rate in others]
  return (*claims, Claim(
      "Repeated text is worth less than new text", repeated,
      "worse with every repetition", "greater",
      (f"many_{none}", f"one_{none}"), "eval_loss"))
