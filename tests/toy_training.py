"""A run small in every dimension; as a script, one that can be killed.

python toy_training.py WORKDIR [LARGEST_FILE] saves at every step, prints each
as it is reported, and at the end a hash of the parameters. Without arguments
it does so in a fork for each WORKDIR on standard input, which need not import
all again; a fork says its process id first, and how it ended is said last.
"""
import dataclasses
import hashlib
import os
import resource
import sys

import jax
import numpy as np

from jaxlm.config import (AttentionConfig, MLPConfig, ModelConfig, MoEConfig,
                          RopeConfig, RouterConfig)
from jaxlm.data.bundle import DataBundle
from jaxlm.data.byte_tokenizer import ByteTokenizer
from jaxlm.data.packing import pack
from jaxlm.train import Interrupted, OptimizerConfig, TrainConfig, train

SEQ_LEN = 19

# Dropout, so that the random numbers of a step matter too.
DENSE = ModelConfig(
    vocab_size=260, d_model=12, num_layers=1, mlp=MLPConfig(7),
    attention=AttentionConfig(3, 1, 8, rope_full=RopeConfig()),
    tie_embeddings=True, dropout=0.01)

MOE = ModelConfig(
    vocab_size=37, d_model=10, num_layers=2,
    moe=MoEConfig(5, 2, MLPConfig(7), RouterConfig(balance_bias=True)),
    attention=AttentionConfig(3, 1, 4, rope_full=RopeConfig()))

TRAIN = TrainConfig(
    steps=40, batch_size=4, seq_len=SEQ_LEN,
    optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=3),
    eval_every=8, eval_batches=2, log_every=3, checkpoint_every=5)


def counting_data(seq_len: int = SEQ_LEN) -> DataBundle:
  """Numbers that count up: a model learns them in a few steps."""
  tokenizer = ByteTokenizer()
  def rows(first: int, documents: int):
    return pack(
        [tokenizer.encode(" ".join(str((first + 7 * i + j) % 100)
                                   for j in range(50)))
         for i in range(documents)], seq_len,
        end_of_document=tokenizer.end_of_document,
        vocab_size=tokenizer.vocab_size)
  return DataBundle(tokenizer, rows(0, 60), rows(3, 5), {"source": "counting"})


def random_batch(config: ModelConfig, batch_size: int, seed: int = 0) -> dict:
  """Two documents a row, and rows with unequal numbers of targets."""
  rng = np.random.default_rng(seed)
  tokens = rng.integers(config.vocab_size, size=(batch_size, SEQ_LEN + 1))
  tokens = tokens.astype(np.int32)
  cut_B1 = rng.integers(3, SEQ_LEN - 3, size=(batch_size, 1))
  place_T = np.arange(SEQ_LEN)
  mask = (place_T != cut_B1) & (place_T >= 4 * np.arange(batch_size)[:, None])
  return {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "mask": mask,
          "segment_ids": 1 + (place_T > cut_B1).astype(np.int32)}


def digest(params) -> str:
  """Of the bytes of all leaves."""
  total = hashlib.sha256()
  for leaf in jax.tree.leaves(params):
    total.update(np.asarray(leaf).tobytes())
  return total.hexdigest()


def main(workdir: str, largest_file: str = "") -> int:
  if largest_file:  # as if the disk were full
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(largest_file),) * 2)
  config = dataclasses.replace(TRAIN, checkpoint_every=1)
  try:
    [result] = train(DENSE, config, counting_data(), workdir, seeds=(7,),
                     on_step=lambda step, _: print(step, flush=True))
  except Interrupted as error:
    print(error, file=sys.stderr)
    return error.exit_status
  except ValueError as error:
    print(error, file=sys.stderr)
    return 1
  print(digest(result.params))
  return 0


def fork_each() -> int:
  for line in sys.stdin:
    child = os.fork()
    if not child:
      print("pid", os.getpid(), flush=True)
      status = main(line.strip())
      sys.stdout.flush()
      os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print("ended", status, flush=True)
  return 0


if __name__ == "__main__":
  sys.exit(main(*sys.argv[1:]) if sys.argv[1:] else fork_each())
