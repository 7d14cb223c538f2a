"""Reading a prompt and writing one answer on the CPU, against torch.

  python -m experiments.benchmarks.decode [--smollm2 FILE.gguf] [--no-peer]

The gpt-oss-like model of train_step with random weights and, if its GGUF is
given, SmolLM2-135M, each in float32 and bfloat16: jaxlm, then transformers +
torch with the same weights' shapes. Prints one JSON line per figure: tokens per
second of the prompt and of decoding, and the bytes of weights and cache that
decoding reads as a fraction of the rate at which a large array is read.
"""
import argparse
import functools
import gc
import json
import pathlib
import statistics
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np

import jaxlm
from experiments.benchmarks import train_step
from jaxlm.decode import Sampling, decode, prefill, start
from jaxlm.model.costs import cache_bytes, parameter_counts
from jaxlm.model.transformer import Execution, init_params, per_layer
from jaxlm.train.memory import keep_freed_memory

PROMPT, NEW = 512, 64
BYTES = {"float32": 4, "bfloat16": 2}


def read_rate() -> float:
  """Bytes per second at which a 1 GiB array is read, at best."""
  x = jnp.ones(1 << 28, jnp.float32)
  read = jax.jit(jnp.max)
  read(x).block_until_ready()
  times = []
  for _ in range(7):
    begin = time.perf_counter()
    read(x).block_until_ready()
    times.append(time.perf_counter() - begin)
  return x.nbytes / min(times)


def bytes_read(config, dtype: str) -> float:
  """Of weights and cache for a token, in the middle of the answer."""
  return BYTES[dtype] * parameter_counts(config).active + cache_bytes(
      config, PROMPT + NEW // 2, BYTES[dtype])


def prompt(config) -> np.ndarray:
  return np.random.default_rng(0).integers(
      0, config.vocab_size, (1, PROMPT), dtype=np.int32)


def timed(config, params, tokens_BT, new: int, execution: Execution,
          repeats: int) -> tuple[list[float], list[float]]:
  """Seconds of each reading of the prompts, and of each decoding of `new` - 1
  tokens after the first; what compiles is left out."""
  lengths = np.full(len(tokens_BT), tokens_BT.shape[1], np.int32)
  greedy, stop = Sampling().checked(), np.zeros(0, np.int32)
  prompt_times, decode_times = [], []
  for _ in range(repeats + 1):
    begin = time.perf_counter()
    logits, cache = jax.block_until_ready(prefill(
        config, params, tokens_BT, lengths,
        max_length=tokens_BT.shape[1] + new, execution=execution))
    prompt_times.append(time.perf_counter() - begin)
    state = start(config, cache, logits, tokens_BT, lengths,
                  jax.random.key(0), greedy, stop)
    jax.block_until_ready(state)
    begin = time.perf_counter()
    jax.block_until_ready(decode(
        config, params, state, greedy, stop, np.int32(new - 1), most=new - 1,
        execution=execution))
    decode_times.append(time.perf_counter() - begin)
  return prompt_times[1:], decode_times[1:]


def ours(config, params, dtype: str, repeats: int):
  """Tokens per second of the prompt and of decoding."""
  return _rates(*timed(config, params, prompt(config), NEW,
                       Execution(dtype=dtype, scan_layers=False), repeats))


def peer(net, config, repeats: int):
  """The same of a transformers model, as it comes, greedily."""
  import torch
  tokens = torch.from_numpy(prompt(config).astype(np.int64))
  prompt_times, decode_times = [], []
  with torch.inference_mode():
    for _ in range(repeats + 1):
      begin = time.perf_counter()
      out = net(input_ids=tokens, use_cache=True, logits_to_keep=1)
      prompt_times.append(time.perf_counter() - begin)
      begin = time.perf_counter()
      for _ in range(NEW - 1):
        token = out.logits[:, -1:].argmax(-1)
        out = net(input_ids=token, past_key_values=out.past_key_values,
                  use_cache=True)
      decode_times.append(time.perf_counter() - begin)
  return _rates(prompt_times[1:], decode_times[1:])  # without warming up


def _rates(prompt_times, decode_times):
  return (PROMPT / statistics.median(prompt_times),
          (NEW - 1) / statistics.median(decode_times))


def gpt_oss_like(dtype: str):
  """Its config, our parameters, and a function that makes the peer's."""
  config = train_step.model(32)

  @jax.jit
  def params():
    return jax.tree.map(
        lambda x: x.astype(dtype),
        per_layer(config, init_params(config, jax.random.key(0))))

  def theirs():
    import torch
    return train_step.peer_model(config).to(getattr(torch, dtype)).eval()

  return config, params(), theirs


def smollm2(path: pathlib.Path, dtype: str):
  lm = jaxlm.load(path, dtype)

  def theirs():
    import torch
    import transformers
    with tempfile.TemporaryDirectory() as folder:
      jaxlm.save(lm, f"{folder}/hf", "hf")
      return transformers.AutoModelForCausalLM.from_pretrained(
          f"{folder}/hf", dtype=getattr(torch, dtype)).eval()

  return lm.config, lm.params, theirs


def main():
  parser = argparse.ArgumentParser(
      description=__doc__.split("\n")[0],
      formatter_class=argparse.ArgumentDefaultsHelpFormatter)
  parser.add_argument("--smollm2", type=pathlib.Path, metavar="FILE",
                      help="SmolLM2-135M's GGUF")
  parser.add_argument("--dtype", nargs="+", choices=BYTES,
                      default=list(BYTES))
  parser.add_argument("--repeats", type=int, default=3, help="answers timed")
  parser.add_argument("--no-peer", action="store_true",
                      help="leave transformers + torch out")
  flags = parser.parse_args()
  keep_freed_memory()
  models = {"gpt-oss-like": gpt_oss_like}
  if flags.smollm2:
    models["SmolLM2-135M"] = functools.partial(smollm2, flags.smollm2)
  for name, make in models.items():
    for dtype in flags.dtype:
      compare(name, dtype, make(dtype), flags)
      gc.collect()


def compare(name: str, dtype: str, made, flags):
  config, params, theirs = made
  limit = read_rate()
  found = {"jaxlm": ours(config, params, dtype, flags.repeats)}
  limit = max(limit, read_rate())
  del params, made
  gc.collect()
  if not flags.no_peer:
    found["transformers + torch"] = peer(theirs(), config, flags.repeats)
  needed = bytes_read(config, dtype)
  for by, (prompt_rate, decode_rate) in found.items():
    print(json.dumps({
        "figure": "decode", "model": name, "dtype": dtype, "by": by,
        "prompt_tokens_per_second": round(prompt_rate, 1),
        "tokens_per_second": round(decode_rate, 2),
        "read_gb_per_second": round(limit / 1e9, 1),
        "of_read_rate": round(decode_rate * needed / limit, 3)}), flush=True)
  if len(found) > 1:
    (p, d), (p2, d2) = found.values()
    print(json.dumps({
        "figure": "jaxlm over transformers + torch", "model": name,
        "dtype": dtype, "prompt": round(p / p2, 2), "decode": round(d / d2, 2),
    }), flush=True)


if __name__ == "__main__":
  main()
