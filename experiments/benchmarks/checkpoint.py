"""What a checkpoint's fingerprints cost beside the save itself.

  python -m experiments.benchmarks.checkpoint [--megabytes 400]
"""
import argparse
import json
import statistics
import tempfile
import time

import jax

from jaxlm.train.checkpoint import Checkpoints
from jaxlm.train.fingerprint import fingerprints

REPEATS = 5


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--megabytes", type=int, default=400)
  count = max(1, round(parser.parse_args().megabytes * 1e6 / 2**25))
  state = {str(i): jax.random.normal(jax.random.key(i), (2048, 4096))
           for i in range(count)}
  seconds = {"fingerprints": [], "save_call": [], "save": []}
  fingerprints(state)  # compiles
  with tempfile.TemporaryDirectory() as directory:
    checkpoints = Checkpoints(directory, keep=1)
    for step in range(REPEATS):
      clock = [time.perf_counter()]
      fingerprints(state)
      clock.append(time.perf_counter())
      checkpoints.save(step, state, {})
      clock.append(time.perf_counter())
      checkpoints.wait()
      clock.append(time.perf_counter())
      seconds["fingerprints"].append(clock[1] - clock[0])
      seconds["save_call"].append(clock[2] - clock[1])
      seconds["save"].append(clock[3] - clock[1])
    checkpoints.close()
  found = {name: statistics.median(taken) for name, taken in seconds.items()}
  nbytes = sum(x.nbytes for x in state.values())
  print(json.dumps({
      "platform": jax.default_backend(), "megabytes": nbytes / 1e6,
      **{f"{name}_seconds": taken for name, taken in found.items()},
      "fingerprint_gigabytes_per_second": nbytes / 1e9 / found["fingerprints"],
      "share_of_save": found["fingerprints"] / found["save"]}))


if __name__ == "__main__":
  main()
