"""A training step on the CPU against a large matmul and against torch.

  python -m experiments.benchmarks.train_step [--experts 32|128] [--no-peer]

A gpt-oss-like model (d_model 512, 8 layers, sequence 512, batch 4, vocabulary
32000, AdamW, clipping, float32) takes a few steps, then transformers + torch
on the same model. Each is measured in two processes of its own: one that gives
freed memory back, as malloc does and torch comes, and one that keeps it
(`jaxlm.train.memory`), as the experiments do. Prints one JSON line per figure:
the rate of a 2048^3 float32 matmul, measured around each; tokens per second;
model FLOPs (forward times 3, nothing computed twice counted) as a fraction of
that rate; and the ratios.
"""
import argparse
import concurrent.futures
import functools
import gc
import json
import multiprocessing
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.config import (AttentionConfig, MLPConfig, ModelConfig, MoEConfig,
                          NormConfig, RopeConfig, RouterConfig, YarnScaling)
from jaxlm.model.costs import flops_per_token
from jaxlm.model.transformer import Execution
from jaxlm.train.memory import keep_freed_memory
from jaxlm.train.optimizer import OptimizerConfig
from jaxlm.train.step import TrainConfig, init_state, train_step

BATCH, SEQUENCE, VOCABULARY = 4, 512, 32000
# Experts, each of what width, and how many a token visits.
SHAPES = {32: (512, 4), 128: (128, 8)}


def model(num_experts: int) -> ModelConfig:
  d_expert, per_token = SHAPES[num_experts]
  rope = RopeConfig(150000.0, YarnScaling())
  return ModelConfig(
      vocab_size=VOCABULARY, d_model=512, num_layers=8,
      attention=AttentionConfig(
          num_heads=8, num_kv_heads=2, head_dim=64, rope_full=rope,
          rope_sliding=rope, sliding_window=128,
          biases=("q", "k", "v", "o"), sinks=True),
      moe=MoEConfig(num_experts, per_token,
                    MLPConfig(d_expert, "clamped_swiglu", bias=True,
                              interleaved=True),
                    RouterConfig("topk_softmax", bias=True)),
      layer_pattern=("sliding", "full"), norm=NormConfig(eps=1e-5))


def seconds(run, repeats: int) -> float:
  """The median time of a call, after one that is not counted."""
  run()
  times = []
  for _ in range(repeats):
    start = time.perf_counter()
    run()
    times.append(time.perf_counter() - start)
  return statistics.median(times)


def matmul_rate() -> float:
  """FLOPs per second of a 2048^3 float32 matmul."""
  x = jax.random.normal(jax.random.key(0), (2048, 2048))
  multiply = jax.jit(jnp.dot)
  return 2 * 2048 ** 3 / seconds(
      lambda: multiply(x, x).block_until_ready(), 15)


def batch() -> dict:
  tokens = np.random.default_rng(0).integers(
      0, VOCABULARY, (BATCH, SEQUENCE + 1), dtype=np.int32)
  ones = np.ones((BATCH, SEQUENCE), np.int32)
  return {"tokens": tokens[:, :-1], "targets": tokens[:, 1:],
          "segment_ids": ones, "mask": ones.astype(bool)}


def ours(config: ModelConfig, repeats: int) -> float:
  train = TrainConfig(
      steps=1000, batch_size=BATCH, seq_len=SEQUENCE,
      optimizer=OptimizerConfig(learning_rate=1e-4),
      execution=Execution(scan_layers=False))
  state = jax.jit(functools.partial(init_state, config, train))(0)
  step = jax.jit(functools.partial(train_step, config, train),
                 donate_argnums=0)
  data = batch()

  def run():
    nonlocal state
    state, metrics = step(state, data, 0)
    jax.block_until_ready((state, metrics))

  return seconds(run, repeats)


def peer_model(config: ModelConfig):
  """transformers' GptOssForCausalLM of those sizes, as it comes."""
  import torch
  import transformers
  attention, moe, yarn = (config.attention, config.moe,
                          config.attention.rope_full.scaling)
  torch.manual_seed(0)
  return transformers.GptOssForCausalLM(transformers.GptOssConfig(
      vocab_size=config.vocab_size, hidden_size=config.d_model,
      intermediate_size=moe.expert.d_ff, num_hidden_layers=config.num_layers,
      num_attention_heads=attention.num_heads,
      num_key_value_heads=attention.num_kv_heads,
      head_dim=attention.head_dim, num_local_experts=moe.num_experts,
      num_experts_per_tok=moe.experts_per_token,
      sliding_window=attention.sliding_window, output_router_logits=False,
      rope_parameters={
          "rope_type": "yarn", "rope_theta": attention.rope_full.theta,
          "factor": yarn.factor, "beta_fast": yarn.beta_fast,
          "beta_slow": yarn.beta_slow, "truncate": False,
          "original_max_position_embeddings": yarn.original_context},
  ))


def peer(config: ModelConfig, repeats: int) -> float:
  """transformers' model with torch's AdamW."""
  import torch
  net = peer_model(config).train()
  optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4)
  data = {name: torch.from_numpy(value.astype(np.int64))
          for name, value in batch().items()}

  def run():
    logits = net(input_ids=data["tokens"], use_cache=False).logits
    loss = torch.nn.functional.cross_entropy(
        logits.reshape(-1, VOCABULARY), data["targets"].reshape(-1))
    loss.backward()
    torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()

  return seconds(run, repeats)


SUBJECTS = {"jaxlm": ours, "transformers + torch": peer}


def measure(name: str, num_experts: int, repeats: int, keep: bool) -> dict:
  """A subject's figure."""
  if keep:
    keep_freed_memory()
  config = model(num_experts)
  work = BATCH * SEQUENCE * flops_per_token(config, SEQUENCE).total
  before = matmul_rate()
  time_ = SUBJECTS[name](config, repeats)
  gc.collect()
  rate = (before + matmul_rate()) / 2
  return {
      "figure": "training step", "by": name, "experts": num_experts,
      "freed_memory": "kept" if keep else "given back",
      "tokens_per_second": round(BATCH * SEQUENCE / time_, 1),
      "matmul_gflops_per_second": round(rate / 1e9, 1),
      "of_matmul_rate": round(work / time_ / rate, 3)}


def measure_apart(*arguments) -> dict:
  """In a process of its own: what malloc was told cannot be unsaid."""
  with concurrent.futures.ProcessPoolExecutor(
      1, multiprocessing.get_context("spawn")) as pool:
    return pool.submit(measure, *arguments).result()


def main():
  parser = argparse.ArgumentParser(
      description=__doc__.split("\n")[0],
      formatter_class=argparse.ArgumentDefaultsHelpFormatter)
  parser.add_argument("--experts", type=int, nargs="+", choices=SHAPES,
                      default=list(SHAPES))
  parser.add_argument("--repeats", type=int, default=5, help="steps timed")
  parser.add_argument("--no-peer", action="store_true",
                      help="leave transformers + torch out")
  flags = parser.parse_args()
  for num_experts in flags.experts:
    speeds = {}
    for name in list(SUBJECTS)[:1 if flags.no_peer else None]:
      for keep in (True, False):
        found = measure_apart(name, num_experts, flags.repeats, keep)
        print(json.dumps(found), flush=True)
        speeds[name, keep] = found["tokens_per_second"]
    if not flags.no_peer:
      ratio = lambda ours, theirs: round(
          speeds["jaxlm", ours] / speeds["transformers + torch", theirs], 2)
      print(json.dumps({
          "figure": "jaxlm over transformers + torch", "experts": num_experts,
          "each_as_it_comes": ratio(True, False),
          "both_keep_memory": ratio(True, True),
          "both_give_back": ratio(False, False)}), flush=True)


if __name__ == "__main__":
  main()
