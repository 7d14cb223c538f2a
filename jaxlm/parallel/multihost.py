"""Several processes that run one program, each with its own devices."""
import json

import jax
from jax.experimental import multihost_utils
import numpy as np


def is_main() -> bool:
  """Whether this process is the one that writes what all have to say."""
  return jax.process_index() == 0


def everyone(value) -> list:
  """What each process passes, a JSON-able value, in their order.

  All have to call it, and none returns before all did.
  """
  if jax.process_count() == 1:
    return [value]
  content = np.frombuffer(json.dumps(value).encode(), np.uint8)
  sizes = multihost_utils.process_allgather(np.int32(content.size))
  # Few lengths, as each is a program of its own.
  padded = np.zeros(2 ** max(8, int(max(sizes) - 1).bit_length()), np.uint8)
  padded[:content.size] = content
  return [json.loads(part[:size].tobytes()) for part, size in
          zip(multihost_utils.process_allgather(padded), sizes)]
