"""A page of real text that shows where a model's routers send each token.

  python -m experiments.routing_report MODEL [--arm ARM] [--seed N]
      [--text FILE | --source SOURCE] [--tokens N] [--out FILE.html]

MODEL is the workdir of an ablation that kept its checkpoints
(--config.keep_checkpoints=True), or any checkpoint with experts that
`jaxlm.load` takes. The page stands alone: one file, no network.
"""
import argparse
import base64
import json
import pathlib
import shlex
import sys

import jax
import numpy as np
import rich.console

from experiments import plots
from experiments import report
from experiments import results
from experiments import routing
from experiments import routing_model
from experiments import routing_plots
from experiments import routing_text
from experiments.routing_model import Subject
from jaxlm.data.tokenizers import cache_dir

SHOWN = 2000  # tokens of the text that are on the page
KIND, PLACE = "its kind", "its place in the row"


def write_page(subject: Subject, path, *, num_tokens: int = 8192,
               command: str = "") -> pathlib.Path:
  """Writes the page; the same model and text give the same page.

  Raises:
    ValueError: the model has no experts, or the text no tokens.
  """
  if subject.config.moe is None:
    raise ValueError(f"{subject.name} is dense: it has no experts and no "
                     "routing to look at; give a model that has (--arm names "
                     "another of an ablation's)")
  sample = routing.take(subject.documents, subject.tokenizer, subject.seq_len,
                        num_tokens, subject.beginning)
  seen = routing.observe(subject.config, subject.params, sample,
                         subject.execution)
  page = report.environment().get_template("routing.html").render(
      **_content(subject, seen, command))
  results.write_bytes(path, page.encode())
  return pathlib.Path(path)


def main(arguments=None) -> int:
  args = _parser().parse_args(arguments)
  arguments = sys.argv[1:] if arguments is None else arguments
  command = f"python -m experiments.routing_report {shlex.join(arguments)}"
  jax.config.update("jax_compilation_cache_dir", str(cache_dir() / "compiled"))
  console = rich.console.Console(stderr=True)
  try:
    with console.status("reading the model and the text"):
      subject = routing_model.read(
          args.model, arm=args.arm, seed=args.seed, source=args.source,
          text=args.text, tokenizer=args.tokenizer)
    with console.status("following tokens to their experts"):
      path = write_page(subject, args.out or _default(args.model),
                        num_tokens=args.tokens, command=command)
  except (ValueError, OSError, NotImplementedError) as error:
    print(f"error: {error}", file=sys.stderr)
    return 1
  print(path)
  return 0


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
      prog="python -m experiments.routing_report",
      description="Writes a page that shows where a model sends each token: "
      "text coloured by expert, load, co-activation, specialisation.")
  parser.add_argument("model", metavar="MODEL",
                      help="an ablation's workdir, or a checkpoint")
  parser.add_argument("--arm", help="of an ablation (default: the baseline)")
  parser.add_argument("--seed", type=int, help="of an ablation (default: the "
                      "first)")
  text = parser.add_mutually_exclusive_group()
  text.add_argument("--text", metavar="FILE", help="the text to read")
  text.add_argument("--source", help="or a source, as in data.source (default: "
                    "an ablation's held-out files, else python-stdlib)")
  parser.add_argument("--tokens", type=int, default=8192, metavar="N",
                      help=f"how many tokens are counted (default: 8192; the "
                      f"page shows the first {SHOWN})")
  parser.add_argument("--tokenizer", help="of a checkpoint that comes without: "
                      "bytes, json:PATH or tiktoken:NAME")
  parser.add_argument("--out", metavar="FILE", help="the page (default: "
                      "routing.html, in the workdir of an ablation)")
  return parser


def _default(model) -> pathlib.Path:
  is_ablation = results.ablation_path(model).is_file()
  return (pathlib.Path(model) if is_ablation else pathlib.Path()) / (
      "routing.html")


def _content(subject, seen, command) -> dict:
  """The variables of the template."""
  names = [f"layer {i}" for i, kind in enumerate(subject.config.layers)
           if kind.moe]
  layers = range(seen.num_layers)
  kinds = [routing.specialisation(seen, layer) for layer in layers]
  places = [routing.specialisation(seen, layer,
                                   *routing.positions(seen.sample))
            for layer in layers]
  load_LE = routing.load(seen)
  moe = subject.config.moe
  return {
      "subject": subject, "command": command, "MISSING": report.MISSING,
      "num_layers": seen.num_layers, "layer_names": names,
      "per_token": f"{moe.num_experts} experts, {moe.experts_per_token} a "
                   "token",
      "colours": routing_text.colours(seen.num_experts),
      "tint": routing_text.TINT, "shuffles": routing.SHUFFLES,
      "answer": _answer(KIND, names, kinds),
      "place_answer": _answer(PLACE, names, places),
      "text": _text(seen), "data": _data(seen, names),
      "kinds": seen.sample.kinds,
      "layers": [_layer(subject, seen, layer, name, kinds[layer],
                        places[layer], load_LE[layer])
                 for layer, name in enumerate(names)],
      "load_plot": _plot(
          "load", routing_plots.load(load_LE, names),
          "Load of each expert over an even share, on this text."),
      "information_plot": _plot(
          "information", routing_plots.information(
              {"kind": kinds, "place": places}, names),
          "What a token's expert tells of its kind and of its place in the "
          "row: dots; bars reach from the least to the most that "
          f"{routing.SHUFFLES} shuffles gave."),
      "training_plot": _training_plot(subject, names),
      "methods": _methods(subject, seen)}


def _plot(name, figure, caption):
  return {"svg": plots.svg(figure, name), "caption": caption}


def _training_plot(subject, names):
  if subject.load_curve is None:
    return None
  return _plot("training", routing_plots.over_training(
      *subject.load_curve, names), "The share of the routed tokens that each "
      "expert got as training went on, stacked.")


def _answer(what, names, found) -> str:
  """Of the layer whose experts tell most beyond chance."""
  best = max(range(len(found)), key=lambda i: found[i].bits
             - found[i].chance_S.max())
  if found[best].bits <= found[best].chance_S.max():
    return f"In no layer does a token's expert tell {what} beyond chance."
  return (f"In {names[best]}, where it tells most, a token's expert tells "
          f"{_finding(found[best], what)}.")


def _finding(told, what) -> str:
  return (f"{told.bits:.3f} of the {told.entropy:.2f} bits of {what} (by "
          f"chance {told.chance_S.min():.3f} to {told.chance_S.max():.3f})")


def _text(seen):
  pieces = routing_text.shown_pieces(seen, 0, SHOWN)
  def attributes(number, expert):
    newline = "\n" in pieces[number].text
    return (f'class="x{expert}{" n" if newline else ""}"'
            + (' data-n="1"' if newline else ""))
  return routing_text.spans(seen, 0, 0, SHOWN, attributes)


def _data(seen, names) -> str:
  """What the page's script needs, as JSON that may stand in HTML."""
  pieces = routing_text.shown_pieces(seen, 0, SHOWN)
  start_P = [piece.start for piece in pieces]
  chosen = [routing_text.of_tokens(seen, layer)
            for layer in range(seen.num_layers)]
  def packed(x):
    return base64.b64encode(np.stack(x).astype("<u2").tobytes()).decode()
  text = json.dumps({
      "num_experts": seen.num_experts, "choices": seen.expert_LBTA.shape[-1],
      "layers": names, "kinds": seen.sample.kinds,
      "kind": seen.sample.kind_N[start_P].tolist(),
      "pieces": [routing_text.visible(piece.text) for piece in pieces],
      "experts": packed([expert_NA[start_P] for expert_NA, _ in chosen]),
      "weights": packed([np.minimum(np.round(1000 * weight_NA[start_P]), 65535)
                         for _, weight_NA in chosen])})
  return text.replace("<", "\\u003c")


def _layer(subject, seen, layer, name, kinds, places, load_E):
  tokens = routing.characteristic(seen, layer)
  place_E = routing.mean_place(seen, layer)
  pairs = None
  if subject.config.moe.experts_per_token > 1:
    pairs = _plot(f"pairs{layer}", routing_plots.coactivation(
        *routing.coactivation(seen, layer)),
        f"{name}: how often two experts share a token, over what independent "
        "choices with the same loads would give. Crossed out: fewer than "
        f"{routing_plots.FEWEST} expected.")
  return {
      "name": name, "pairs": pairs,
      "finding": "A token's expert tells "
                 f"{_finding(kinds, KIND)} and {_finding(places, PLACE)}.",
      "rows": [{
          "load": f"{load_E[e] * seen.num_experts:.2f}",
          "lifts": [(report.MISSING if np.isnan(lift) else f"{lift:.2f}",
                     _tint(lift) if beyond else "")
                    for lift, beyond in zip(kinds.lift_KE[:, e],
                                            kinds.beyond_KE[:, e])],
          "place": (report.MISSING if np.isnan(place_E[e])
                    else f"{place_E[e]:.2f}"),
          "tokens": [{
              "text": routing_text.visible(subject.tokenizer.decode(
                  [found.token])),
              "title": f"{found.count} times, {found.lift:.1f} times as often "
                       "as expected"} for found in tokens[e]]}
               for e in range(seen.num_experts)]}


def _tint(lift: float) -> str:
  """Blue below 1, orange above, full at a quarter and at four times."""
  strength = np.clip(np.log2(max(lift, 1e-9)) / 2, -1, 1)
  colour = "213, 94, 0" if strength > 0 else "0, 114, 178"
  return f"rgba({colour}, {0.1 + 0.45 * abs(strength):.2f})"


def _methods(subject, seen):
  sample = seen.sample
  rows, length = sample.tokens_BT.shape
  python = "Python's own tokenizer" if "keyword" in sample.kinds else "letters"
  return [
      ("Text", f"{rows * length:,} tokens of {subject.text}, in {rows} rows of "
       f"{length}: the beginnings of {', '.join(sample.names.values())}. "
       "Attention stays within a document."),
      ("Kinds", f"Told by {python}; a token is of the kind of its first letter "
       "that is no blank."),
      ("What an expert tells", "The mutual information of a routed token's "
       "expert and its label, in bits; all of a token's experts count."),
      ("Chance", f"{routing.SHUFFLES} times, each row's experts are held "
       "against another row's tokens, turned round by a random number of "
       "places. Runs of one expert stay as they are, so long runs are not "
       "taken for specialisation."),
      ("Chosen together", "Expected is what independent choices give at the "
       "same loads, a token never choosing an expert twice "
       "(quasi-independence).")]


if __name__ == "__main__":
  sys.exit(main())
