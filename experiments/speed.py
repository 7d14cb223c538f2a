"""What an arm costs to run: prefill, decode, memory and cache.

Timed with initial parameters, whose router sends tokens everywhere: the worst
case for an expert layer. One stream, so that a batch hides nothing.
"""
import collections
from collections.abc import Callable
import dataclasses
import math
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from experiments.results import Speed
from jaxlm.config import ModelConfig
from jaxlm.decode import Sampling, decode, prefill, start
from jaxlm.model import costs
from jaxlm.model.transformer import per_layer
from jaxlm.train import TrainConfig
from jaxlm.train.programs import Programs


def measure(models: dict[str, ModelConfig],
            train_configs: dict[str, TrainConfig], *, prompt_tokens: int,
            new_tokens: int, repeats: int, seconds: float,
            on_arm: Callable[[str], None] = lambda arm: None,
            ) -> dict[str, Speed]:
  """Measures all arms, in turn within each repeat.

  So that whatever slows the machine down for a while slows all of them.

  Args:
    seconds: each timing lasts so long or longer, by as many runs as it takes.
    on_arm: told which arm is being prepared or timed.
  """
  probes, memory = {}, {}
  for arm, model in models.items():
    on_arm(f"{arm}: compiling")
    programs = Programs(model, train_configs[arm], (0,))
    memory[arm] = programs.peak_memory_bytes
    params = jax.jit(per_layer, static_argnums=0)(
        model, programs.init().params)
    # What is simulated computes more than the real thing would.
    execution = dataclasses.replace(train_configs[arm].execution,
                                    simulate="none")
    probes[arm] = _probes(model, params, execution, prompt_tokens, new_tokens,
                          seconds)
  found = collections.defaultdict(lambda: collections.defaultdict(list))
  for repeat in range(repeats):
    for arm, kinds in probes.items():
      on_arm(f"{arm}: {repeat + 1}/{repeats}")
      for kind, probe in kinds.items():
        found[arm][kind].append(probe())
  return {
      arm: Speed(**found[arm], peak_memory_bytes=memory[arm],
                 kv_bytes_per_token=costs.kv_bytes_per_token(
                     model, train_configs[arm].seq_len))
      for arm, model in models.items()}


def _probes(model, params, execution, prompt_tokens, new_tokens, seconds):
  """Functions that time once, by the field of Speed they belong to."""
  prompt = np.random.default_rng(0).integers(
      0, model.vocab_size, (1, prompt_tokens)).astype(np.int32)
  lengths = np.array([prompt_tokens], np.int32)

  def read():
    return prefill(model, params, prompt, lengths, execution=execution,
                   max_length=prompt_tokens + new_tokens)

  greedy, stop = Sampling().checked(), np.zeros(0, np.int32)
  logits, cache = read()
  state = start(model, cache, logits, prompt, lengths, jax.random.key(0),
                greedy, stop)

  def write():
    # From a copy: the state is given away.
    return decode(model, params, jax.tree.map(jnp.copy, state), greedy, stop,
                  new_tokens - 1, most=new_tokens - 1, execution=execution)

  # The first of the new tokens comes from the prompt's logits.
  return {
      "prefill_tokens_per_second": _Probe(read, prompt_tokens, seconds),
      "decode_tokens_per_second": _Probe(write, new_tokens - 1, seconds)}


class _Probe:
  """Times enough runs of a function to fill some seconds."""

  def __init__(self, function, tokens, seconds):
    self._function, self._tokens, self._runs = function, tokens, 1
    self()  # compiles
    once = statistics.median(tokens / self() for _ in range(3))
    self._runs = max(1, math.ceil(seconds / once))

  def __call__(self) -> float:
    """Tokens a second."""
    start = time.perf_counter()
    for _ in range(self._runs):
      jax.block_until_ready(self._function())
    return self._tokens * self._runs / (time.perf_counter() - start)
