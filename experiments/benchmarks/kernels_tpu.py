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
import pathlib

import jax
import jax.numpy as jnp

from experiments.benchmarks import tpu_static

TABLE = pathlib.Path(__file__).with_suffix(".json")


def _struct(*shape, dtype=jnp.bfloat16):
  return jax.ShapeDtypeStruct(shape, dtype)


def attention(heads, kv_heads, head_dim, length, window, sinks, blocks=None):
  """The forward kernels of attention, arrays as they want them."""
  from pallas_kernels.windowed_attention import tpu_blocks, tpu_forward
  from pallas_kernels.windowed_attention.options import Options
  if blocks is not None:
    kind = "FoldBlocks" if "lead" in blocks else "RunningBlocks"
    blocks = getattr(tpu_blocks, kind)(**blocks)
  def run(q, k, v, sinks_N):
    return tpu_forward.forward(q, k, v, sinks_N if sinks else None, None,
                               Options(window, head_dim ** -0.5), blocks)
  k = _struct(1, kv_heads, head_dim, length)
  return (run, _struct(1, heads, head_dim, length), k, k,
          _struct(heads, dtype=jnp.float32))


def attention_backward(heads, kv_heads, head_dim, length, window, sinks,
                       blocks=None):
  """The backward kernels, and what XLA does before them."""
  from pallas_kernels.windowed_attention import tpu_backward, tpu_blocks
  from pallas_kernels.windowed_attention.options import Options
  if blocks is not None:
    blocks = tpu_blocks.BackwardBlocks(**blocks)
  def run(q, k, v, o, lse, do):
    # The gradient of sinks is XLA's: a sum that training can fuse.
    return tpu_backward.backward(q, k, v, None, None, o, lse, do,
                                 Options(window, head_dim ** -0.5), blocks)[:3]
  q = _struct(1, heads, head_dim, length)
  k = _struct(1, kv_heads, head_dim, length)
  return run, q, k, k, q, _struct(1, heads, length, dtype=jnp.float32), q


def decode(batch, heads, kv_heads, head_dim, slots, blocks=None):
  """The kernel of attention over a cache, one query a sequence."""
  from pallas_kernels.windowed_attention import decode_tpu
  from pallas_kernels.windowed_attention.options import CacheOptions
  blocks = decode_tpu.Blocks(
      **{"sequences": 8, "slots": slots, "skip": False} | (blocks or {}))
  q = _struct(batch, 1, heads, head_dim)
  own = _struct(batch, 1, kv_heads, head_dim)
  cached = _struct(batch, slots, kv_heads, head_dim)
  plan = decode_tpu.make_plan(q, cached, cached, CacheOptions(
      slots, head_dim ** -0.5, blocks=blocks))
  operands = jax.eval_shape(
      lambda *arrays: decode_tpu.prepare(plan, *arrays, window=slots),
      q, own, own, cached, cached, _struct(batch, 1, dtype=jnp.int32),
      _struct(batch, slots, dtype=jnp.int32), _struct(heads))
  return (lambda *operands: decode_tpu.call(plan, False, *operands)), *operands


def experts(experts, rows, dim_in, dim_out, packed, blocks=None):
  """Expert matmuls of as many rows each, weights in MXFP4 or in bfloat16."""
  from pallas_kernels.expert_matmul import expert_matmul, tpu
  from pallas_kernels.quant import MXFP4, MXFP4Pairs
  weights = _struct(experts, dim_in, dim_out)
  if packed:
    weights = jax.eval_shape(MXFP4Pairs.from_mxfp4, MXFP4(*(
        _struct(*shape, dtype=jnp.uint8)
        for shape in MXFP4.part_shapes(weights.shape))))
  def run(x, weights, sizes):
    tile = tpu.default_tile(x, weights, transposed=False, fused=False)
    tile = dataclasses.replace(tile, **{"rows": rows} | (blocks or {}))
    return expert_matmul(
        x, weights, sizes, implementation="pallas-tpu",
        blocks=tpu.TPUBlocks(matmul=tile, static_schedule=True))
  return (run, _struct(experts * rows, dim_in), weights,
          _struct(experts, dtype=jnp.int32))


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
  return run, *[_struct(heads, length, head_dim)] * 3


def dense(experts, rows, dim_in, dim_out):
  """XLA's matmuls of as many rows an expert: of megablox and `ragged_dot`
  there is no estimate, as the size of their grids depends on data."""
  def run(x, weights):
    return jnp.einsum("EMD,EDF->EMF", x, weights,
                      preferred_element_type=jnp.bfloat16)
  return (run, _struct(experts, rows, dim_in),
          _struct(experts, dim_in, dim_out))


@dataclasses.dataclass(frozen=True)
class Case:
  """A kernel at a shape. job: the function above and its arguments. roofline:
  "HBM" or "MXU". bytes, flops: needed, whatever the kernel does. goals: shares
  of the roofline, in percent, by generation. counted: the start of the names
  of what counts; XLA's preparations for a matmul of many experts do not.
  grown: an option, two values of it that are estimated, and one to which these
  are extended in a straight line: estimates of large grids take hours."""
  job: str
  options: dict
  roofline: str
  bytes: int
  flops: int
  goals: dict[str, float]
  counted: str = ""
  grown: tuple[str, int, int, int] | None = None


def _goals(*percent):
  return dict(zip(tpu_static.GENERATIONS, percent))


def _attention_case(job, roofline, goals, **options):
  heads, kv_heads, head_dim, length, window = (options[name] for name in (
      "heads", "kv_heads", "head_dim", "length", "window"))
  scores = heads * sum(min(t + 1, window) for t in range(length))
  row, statistic = 2 * length * head_dim, 4 * heads * length
  bytes, flops = {  # q, o; k, v; the gradients of these, o and do
      "attention": (2 * heads * row + 2 * kv_heads * row + statistic, 4),
      "attention_backward": (4 * heads * row + 4 * kv_heads * row + statistic,
                             10)}[job]
  return Case(job, options, roofline, bytes, flops * scores * head_dim, goals)


def _decode_case(goals, **options):
  o = options
  cache = 2 * o["batch"] * o["slots"] * o["kv_heads"] * o["head_dim"] * 2
  queries = 2 * o["batch"] * o["heads"] * o["head_dim"] * 2
  return Case("decode", options, "HBM", cache + queries, 0, goals)


def _experts_case(goals, *, roofline, grown=None, **options):
  o = options
  weights = (grown[-1] if grown else o["experts"]) * o["dim_in"] * o["dim_out"]
  return Case("experts", options, roofline,
              int(weights * (4.25 if o["packed"] else 16)) // 8,
              2 * o["rows"] * weights, goals, "expert_matmul", grown)


GPT_OSS = dict(heads=16, kv_heads=2, head_dim=64, length=8192, window=128,
               sinks=True)
GEMMA = dict(heads=8, kv_heads=4, head_dim=256, length=8192, window=1024,
             sinks=False)
GATE_UP = dict(experts=2, dim_in=2880, dim_out=5760)
CASES = {
    "window 128, forward": _attention_case(
        "attention", "HBM", _goals(62, 42, 68, 42), **GPT_OSS),
    "window 128, backward": _attention_case(
        "attention_backward", "HBM", _goals(50, 36, 50, 30), **GPT_OSS),
    "window 1024, head_dim 256, forward": _attention_case(
        "attention", "MXU", _goals(72, 65, 55, 55), **GEMMA),
    "ring of 128, decode": _decode_case(
        _goals(85, 65, 80, 60), batch=64, heads=64, kv_heads=8, head_dim=64,
        slots=128),
    "MXFP4 experts, 16 rows": _experts_case(
        _goals(80, 58, 70, 58), packed=True, roofline="HBM", rows=16,
        grown=("experts", 2, 4, 32), dim_in=2880, dim_out=5760),
    "MXFP4 experts, 512 rows": _experts_case(
        {}, packed=True, roofline="MXU", rows=512, **GATE_UP),
    "bfloat16 experts, 512 rows": _experts_case(
        {}, packed=False, roofline="MXU", rows=512, **GATE_UP),
}
# Of others' kernels, for the same work: the job, and how often it is done.
# Of splash 4 blocks of 512 by 512 are estimated, and 31 are in the band.
PEERS = {
    "tokamax splash, window 128, forward": (
        "splash", dict(heads=16, head_dim=64, length=1024, block=512), 31 / 4),
    "XLA, bfloat16 matmuls of 512 rows": (
        "dense", dict(**GATE_UP, rows=512), 1),
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


def cycles(result: dict, counted: str) -> int:
  return sum(count for name, count in result["cycles"].items()
             if name.startswith(counted))


def _job(name: str, options: dict):
  return f"experiments.benchmarks.kernels_tpu:{name}", options


def cycles_of(tried: list[tuple[str, dict | None]],
              generation: str) -> list[int | str]:
  """The cycles of each case with such blocks (None: the best known), or the
  error that there is instead."""
  jobs, parts = [], []
  for name, blocks in tried:
    case = CASES[name]
    options = case.options | ({"blocks": blocks} if blocks else {})
    option, *values = case.grown[:3] if case.grown else ("blocks",
                                                         options.get("blocks"))
    jobs += [_job(case.job, options | {option: value}) for value in values]
    parts.append(len(values))
  results, found = iter(tpu_static.estimate(generation, jobs)), []
  for (name, _), count in zip(tried, parts):
    case, mine = CASES[name], [next(results) for _ in range(count)]
    if errors := [x["error"] for x in mine if "error" in x]:
      found.append(errors[0])
      continue
    counts = [cycles(x, case.counted) for x in mine]
    if case.grown:
      _, small, large, last = case.grown
      slope = (counts[1] - counts[0]) / (large - small)
      counts = [round(counts[0] + slope * (last - small))]
    found.append(counts[0])
  return found


def measure(names: list[str], generation: str) -> list[dict]:
  """For each case its figure, or the error that there is instead."""
  return [{"kernel": name, "generation": generation, "error": found}
          if isinstance(found, str) else figure(name, generation, found)
          for name, found in zip(names, cycles_of(
              [(name, None) for name in names], generation))]


def peers(generation: str) -> list[dict]:
  """Cycles of others' kernels, where they are installed."""
  names = [name for name in PEERS if not name.startswith("tokamax")
           or importlib.util.find_spec("tokamax")]
  results = tpu_static.estimate(generation, [
      _job(*PEERS[name][:2]) for name in names])
  return [{"kernel": name, "generation": generation,
           "cycles": round(PEERS[name][2] * max(result["cycles"].values()))}
          if "cycles" in result else
          {"kernel": name, "generation": generation, **result}
          for name, result in zip(names, results)]


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
                      metavar="NAME", help="of " + ", ".join(CASES)
                      + "; all, and their peers, by default")
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
    if arguments.kernels == [*CASES]:
      for row in peers(generation):
        print(json.dumps(row), flush=True)
  raise SystemExit(bool(failed))


if __name__ == "__main__":
  main()
