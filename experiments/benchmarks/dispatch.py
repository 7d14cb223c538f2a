"""What one expert layer of gpt-oss-20b takes on a TPU slice, by scheme.

  python -m experiments.benchmarks.dispatch [SLICE [TOKENS]]

Compiles forward and backward pass ahead of time for the slice (v5e:2x4 by
default), experts over all of it, TOKENS (2048) tokens of bfloat16 a chip.
Prints a JSON line for each scheme: temporaries, and what a chip receives while
experts are balanced, in MiB. Static: nothing is run.
"""
import json
import sys
import time

import flax.linen as nn
import jax
import jax.numpy as jnp

import jaxlm
from jaxlm.model.moe import MoE
from jaxlm.parallel import mesh as mesh_lib
from jaxlm.parallel.schemes import SCHEMES
from jaxlm.plan import hlo
from jaxlm.plan.devices import parse_slice
from jaxlm.plan.programs import topology_mesh

MIB = 2 ** 20


def lower(mesh, scheme: str, tokens: int):
  config = jaxlm.preset("gpt-oss-20b")

  def struct(shape, axes, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=jax.NamedSharding(
        mesh, mesh_lib.spec(*axes)))

  module = MoE(config.moe, 1.0, "auto", scheme)
  abstract = jax.eval_shape(lambda key: module.init(
      key, jnp.zeros((1, 1, config.d_model))), jax.random.key(0))["params"]
  params = jax.tree.map(
      lambda x, axes: struct(x.shape, axes), nn.unbox(abstract),
      nn.get_partition_spec(abstract))
  x = struct((mesh.size, tokens, config.d_model), ("batch", "length", None))

  def both_ways(params, x, dy):
    y, vjp = jax.vjp(lambda params, x: module.apply({"params": params}, x)[0],
                     params, x)
    return y, vjp(dy)

  with jax.set_mesh(mesh):
    return jax.jit(both_ways).lower(params, x, x)


def main():
  slice_ = parse_slice(sys.argv[1] if len(sys.argv) > 1 else "v5e:2x4")
  tokens = int(sys.argv[2]) if len(sys.argv) > 2 else 2048
  sizes = {"expert": slice_.size}
  mesh = topology_mesh(slice_, sizes)
  for scheme in SCHEMES:
    start = time.perf_counter()
    program = lower(mesh, scheme, tokens).compile()
    figure = {
        "figure": "an expert layer of gpt-oss-20b, forward and backward",
        "slice": slice_.name, "tokens": tokens, "scheme": scheme,
        "temporary_mib": round(
            program.memory_analysis().temp_size_in_bytes / MIB),
        "compile_seconds": round(time.perf_counter() - start)}
    try:
      figure["received_mib"] = round(sum(
          one.wire * one.times for one in
          hlo.collectives(program.as_text(), dict(mesh.shape))) / MIB)
    except jax.errors.JaxRuntimeError:
      # XLA cannot print programs of v5p.
      figure["received_mib"] = None
    print(json.dumps(figure), flush=True)


if __name__ == "__main__":
  main()
