"""Cycles of the TPU kernels as libtpu estimates them, without a TPU.

  python -m experiments.benchmarks.kernels_tpu [--kernels NAME ...]
      [--generations v5e v5p v6e 7x] [--write]

Needs libtpu. Prints one JSON line per kernel and generation: the time,
max(cycles / clock, bytes / bandwidth), the time that its roofline allows, and
the share of this in that; then what others' kernels take for the same shapes,
where an estimate holds for them. Estimates of static schedules are meant for
comparison with each other (tpu_static.py says what they leave out). --write
puts what was measured in kernels_tpu.json, which tests compare with.
"""
import argparse
import dataclasses
import importlib.metadata
import importlib.util
import json
import math
import pathlib

import jax
import jax.numpy as jnp

from experiments.benchmarks import tpu_static

TABLE = pathlib.Path(__file__).with_suffix(".json")


def _shapes(*arrays):
  """(shape, dtype)s as what can be compiled for."""
  return [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in arrays]


def attention(heads, kv_heads, head_dim, length, window, sinks, backward=False,
              blocks=None):
  """The forward or the backward kernel alone, arrays as it wants them."""
  from pallas_kernels.windowed_attention import tpu_backward, tpu_forward
  from pallas_kernels.windowed_attention.options import Options
  options = Options(window, head_dim ** -0.5)
  bf16 = jnp.bfloat16
  q, k, lse = _shapes(((1, heads, head_dim, length), bf16),
                      ((1, kv_heads, head_dim, length), bf16),
                      ((1, heads, length), jnp.float32))
  sink, = _shapes(((heads,), jnp.float32))
  if backward:
    def run(q, k, v, o, lse, do, sink):
      return tpu_backward.backward(q, k, v, sink if sinks else None, None, o,
                                   lse, do, options, blocks)[:3]
    return run, q, k, k, q, lse, q, sink
  def run(q, k, v, sink):
    return tpu_forward.forward(q, k, v, sink if sinks else None, None, options,
                               blocks)
  return run, q, k, k, sink


def splash(heads, head_dim, length, block):
  """tokamax's splash attention, of all pairs of blocks: what it does in a
  window depends on data, where an estimate does not hold."""
  from tokamax._src.ops.experimental.tpu.splash_attention import (
      splash_attention_kernel, splash_attention_mask)
  config = dataclasses.replace(
      splash_attention_kernel.SplashConfig.get_default(), block_q=block,
      block_kv=block, block_kv_compute=block)
  run = splash_attention_kernel.make_splash_mha_single_device(
      splash_attention_mask.FullMask((length, length)), config=config)
  return run, *_shapes(*[((heads, length, head_dim), jnp.bfloat16)] * 3)


def megablox(experts, rows, dim_in, dim_out, tiling):
  from jax.experimental.pallas.ops.tpu.megablox import gmm
  def run(x, w, sizes):
    return gmm(x, w, sizes, preferred_element_type=jnp.bfloat16,
               tiling=tuple(tiling))
  return run, *_shapes(((experts * rows, dim_in), jnp.bfloat16),
                       ((experts, dim_in, dim_out), jnp.bfloat16),
                       ((experts,), jnp.int32))


@dataclasses.dataclass(frozen=True)
class Case:
  """A kernel at a shape. job: the function above and its arguments. roofline:
  "HBM" or "MXU". bytes, flops: needed, whatever the kernel does. goals: shares
  of the roofline, in percent, by generation."""
  job: str
  options: dict
  roofline: str
  bytes: int
  flops: int
  goals: dict[str, float]


def _goals(*percent):
  return dict(zip(tpu_static.GENERATIONS, percent))


def _attention_case(roofline, goals, **options):
  o = options
  scores = o["heads"] * sum(min(t + 1, o["window"] or t + 1)
                            for t in range(o["length"]))
  row = o["length"] * o["head_dim"] * 2
  q, k, lse = o["heads"] * row, o["kv_heads"] * row, o["heads"] * o["length"] * 4
  backward = o.get("backward", False)
  return Case(
      "attention", options, roofline,
      4 * q + 4 * k + 2 * lse if backward else 2 * q + 2 * k + lse,
      (10 if backward else 4) * scores * o["head_dim"], goals)


GPT_OSS = dict(heads=16, kv_heads=2, head_dim=64, length=4096, window=128,
               sinks=True)
GEMMA = dict(heads=4, kv_heads=2, head_dim=256, length=4096, window=1024,
             sinks=False)
CASES = {
    "window 128, forward": _attention_case(
        "HBM", _goals(62, 42, 68, 42), **GPT_OSS),
    "window 128, backward": _attention_case(
        "HBM", _goals(50, 36, 50, 30), **GPT_OSS, backward=True),
    "window 1024, head_dim 256, forward": _attention_case(
        "MXU", _goals(72, 65, 55, 55), **GEMMA),
    "window 1024, head_dim 256, backward": _attention_case(
        "MXU", {}, **GEMMA, backward=True),
}


def figure(name: str, generation: str, cycles: int) -> dict:
  """What an estimate says of a case, as it stands in the table."""
  case, device = CASES[name], tpu_static.GENERATIONS[generation]
  least = {"HBM": case.bytes / device.bandwidth,
           "MXU": case.flops / device.flops}
  time = max(cycles / device.clock, least["HBM"])
  return {"kernel": name, "generation": generation, "cycles": cycles,
          "microseconds": round(1e6 * time, 2), "roofline": case.roofline,
          "percent": round(100 * least[case.roofline] / time, 1),
          "goal": case.goals.get(generation)}


def measure(names: list[str], generation: str) -> list[dict]:
  """For each case its figure, or the error that there is instead."""
  jobs = [(f"experiments.benchmarks.kernels_tpu:{CASES[name].job}",
           CASES[name].options) for name in names]
  return [figure(name, generation, sum(result["cycles"].values()))
          if "cycles" in result else
          {"kernel": name, "generation": generation, **result}
          for name, result in zip(names, tpu_static.estimate(generation, jobs))]


def versions() -> dict[str, str]:
  return {name: importlib.metadata.version(name) for name in ("jax", "libtpu")}


def _write(figures):
  """Into the table, in place of what it has for the same cases."""
  rows = json.loads(TABLE.read_text())["figures"] if TABLE.exists() else []
  rows = {(row["kernel"], row["generation"]): row for row in rows + figures}
  lines = ",\n".join("  " + json.dumps(rows[name, generation])
                     for name in CASES for generation in tpu_static.GENERATIONS
                     if (name, generation) in rows)
  TABLE.write_text(f'{{"versions": {json.dumps(versions())},\n'
                   f' "figures": [\n{lines}]}}\n')


def main():
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--kernels", nargs="+", choices=CASES, default=[*CASES],
                      metavar="NAME", help=", ".join(CASES))
  parser.add_argument("--generations", nargs="+", metavar="NAME",
                      choices=tpu_static.GENERATIONS,
                      default=[*tpu_static.GENERATIONS],
                      help=", ".join(tpu_static.GENERATIONS))
  parser.add_argument("--write", action="store_true",
                      help=f"put the figures in {TABLE.name}")
  arguments = parser.parse_args()
  failed = []
  for generation in arguments.generations:
    figures = measure(arguments.kernels, generation)
    failed += [row for row in figures if "error" in row]
    for row in figures:
      print(json.dumps(row), flush=True)
    if arguments.write:
      _write([row for row in figures if "error" not in row])
    for row in peers(generation):
      print(json.dumps(row), flush=True)
  raise SystemExit(bool(failed))


if __name__ == "__main__":
  main()
