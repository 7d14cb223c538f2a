"""The table of what fits where.

  python -m jaxlm.plan.slices

writes SLICES.md beside this file: of each published model the smallest slice
that trains and serves it, by the estimate; what figures.json has compiled is
marked.
"""
import json
import pathlib

from jaxlm import families
from jaxlm.model.costs import parameter_counts
from jaxlm.plan import figures
from jaxlm.plan.devices import GIB, SLICES, parse_slice
from jaxlm.plan.job import LENGTHS
from jaxlm.plan.plan import Plan
from jaxlm.plan.search import search

PATH = pathlib.Path(__file__).with_name("SLICES.md")
GENERATIONS = ("v5e", "v5p", "v6e", "v7x")
# Bytes a parameter that no layout can do without.
LEAST = {("train", None): 12, ("decode", "bf16"): 2, ("decode", "mxfp4"): 0.5}
TEXT = """# The smallest slice that holds each model

Made by `python -m jaxlm.plan.slices`, by arithmetic (`jaxlm plan --estimate`);
what is **bold** was compiled for that slice and layout and fits as well.
Training: float32 parameters and AdamW moments, bfloat16 activations, whole
layers computed again (remat), one sequence of {train} tokens a device.
Decoding: bfloat16 weights, or MXFP4 experts and the rest in bfloat16; 32
sequences (one a device, if that is more) over a cache of {decode} tokens, or
of as many as the model has positions. Each cell: the slice, the layout whose
bound is best, and its HBM a device.
"""


def smallest(model: str, generation: str, task: str,
             weights: str | None) -> Plan | None:
  """The best layout of the smallest slice that holds a model."""
  config = families.preset(model)
  seq = min(LENGTHS[task], config.max_positions or LENGTHS[task])
  total = parameter_counts(config).total * LEAST[task, weights]
  for shape in SLICES[generation]:
    slice_ = parse_slice(f"{generation}:{shape}")
    if total > slice_.size * slice_.device.hbm:
      continue
    found = search(model, config, task, slice_, seq=seq, weights=weights)
    if found.plans:
      return found.plans[0]
  return None


def rows():
  """(model, task, weights) of each line."""
  seen = set()
  for model in families.presets():
    config = families.preset(model)
    if config in seen:
      continue
    seen.add(config)
    for task, weights in LEAST:
      if weights != "mxfp4" or config.moe is not None:
        yield model, task, weights


def main():
  compiled = {(p["model"], p["task"], p["slice"], p["weights"], p["layout"])
              for p in json.loads(figures.PATH.read_text()).values()
              if p["fits"]}
  lines = [TEXT.format(**LENGTHS), "| model | task | "
           + " | ".join(GENERATIONS) + " |", "|:--|:--|" + ":--|" * len(
               GENERATIONS)]
  for model, task, weights in rows():
    cells = []
    for generation in GENERATIONS:
      plan = smallest(model, generation, task, weights)
      cells.append(_cell(plan, compiled))
    what = f"{task} {weights}" if weights else task
    lines.append(f"| {model} | {what} | {' | '.join(cells)} |")
    print(lines[-1], flush=True)
  PATH.write_text("\n".join(lines) + "\n")


def _cell(plan: Plan | None, compiled) -> str:
  if plan is None:
    return "none offered"
  text = f"{plan.slice.partition(':')[2]}, {plan.layout}, "
  text += f"{plan.total / GIB:.1f} GiB"
  key = plan.model, plan.task, plan.slice, plan.weights, plan.layout
  return f"**{text}**" if key in compiled else text


if __name__ == "__main__":
  main()
