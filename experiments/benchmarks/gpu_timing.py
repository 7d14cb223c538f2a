"""Times on a GPU, and the rate of a copy to hold them against."""
import json
import statistics
import time

import jax
import jax.numpy as jnp


def seconds(run, repeats: int, wait=jax.block_until_ready) -> float:
  """The median time of a call, of as many as fill 50 ms, all enqueued before
  the first has ended: so the host's own time for them is not counted."""
  def loop(times):
    start = time.perf_counter()
    for _ in range(times):
      result = run()
    wait(result)
    return (time.perf_counter() - start) / times
  loop(2)  # compiles
  times = max(3, min(500, round(0.05 / loop(3))))
  return statistics.median(loop(times) for _ in range(repeats))


def copy_rate(repeats: int) -> float:
  """Bytes read and written per second where 1 GiB is negated."""
  x = jnp.ones(1 << 29, jnp.bfloat16)
  negate = jax.jit(jnp.negative)
  return 2 * x.nbytes / seconds(lambda: negate(x), repeats)


def report(**figure):
  print(json.dumps(figure), flush=True)
