"""Runs `python -m jaxlm.train` of a small mixture in processes of their own."""
import json
import os
import pathlib
import socket
import subprocess
import sys
import time

from jaxlm.config import (AttentionConfig, MLPConfig, ModelConfig, MoEConfig,
                          RopeConfig)
from jaxlm.config_dict import to_dict

ROOT = pathlib.Path(__file__).parents[1]

# Each dimension that is split divides by 2, 4 or 8.
MODEL = ModelConfig(
    vocab_size=260, d_model=16, num_layers=1,
    moe=MoEConfig(4, 2, MLPConfig(24)),
    attention=AttentionConfig(4, 2, 6, rope_full=RopeConfig()))
FLAGS = ("--steps=10 --batch-size=8 --seq-len=22 --learning-rate=0.01 "
         "--log-every=1 --eval-every=4 --eval-batches=2 --checkpoint-every=2 "
         "--heldout-fraction=0.3").split()


def environment(program_cache, num_devices: int) -> dict[str, str]:
  return os.environ | {
      "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(num_devices),
      "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
      "JAX_COMPILATION_CACHE_DIR": str(program_cache),
      "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
      "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
      "PYTHONPATH": str(ROOT)}


class Processes:
  """A run of one or several processes, all on this machine."""

  def __init__(self, program_cache, workdir, *flags, count=1, devices=8):
    self.workdir = pathlib.Path(workdir)
    self.workdir.mkdir(exist_ok=True)
    text = self.workdir.with_name("text")
    text.mkdir(exist_ok=True)
    for i in range(8):
      (text / f"{i}.txt").write_text(
          " ".join(str(j * (2 * i + 1)) for j in range(400)))
    model = text / "model.json"
    model.write_text(json.dumps(to_dict(MODEL)))
    command = [sys.executable, "-m", "jaxlm.train", f"--config={model}",
               f"--data=files:{text}/*.txt",
               f"--workdir={workdir}", *FLAGS, *flags]
    if count > 1:
      command += [f"--coordinator=localhost:{_free_port()}",
                  f"--num-processes={count}", "--heartbeat-seconds=10"]
    self.outputs = [self.workdir.with_suffix(f".out{i}") for i in range(count)]
    self.processes = [subprocess.Popen(
        command + [f"--process-id={i}"] * (count > 1),
        env=environment(program_cache, devices // count),
        stdout=output.open("w"), stderr=subprocess.STDOUT)
        for i, output in enumerate(self.outputs)]

  def said(self, i: int = 0) -> str:
    return self.outputs[i].read_text()

  def wait_for(self, text: str, seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while text not in self.said():
      if time.monotonic() > end or self.processes[0].poll() is not None:
        self.kill()
        raise AssertionError(self.said())
      time.sleep(0.05)

  def wait(self, seconds: float = 300) -> list[int]:
    """Exit statuses."""
    end = time.monotonic() + seconds
    try:
      return [process.wait(max(0.1, end - time.monotonic()))
              for process in self.processes]
    finally:
      self.kill()

  def kill(self) -> None:
    for process in self.processes:
      process.kill()
      process.wait()

  def losses(self) -> list[tuple]:
    path = self.workdir / "seed_0" / "metrics.jsonl"
    return [(line["step"], line["loss"], line.get("eval_loss"))
            for line in map(json.loads, path.read_text().splitlines())]


def _free_port() -> int:
  with socket.socket() as found:
    found.bind(("localhost", 0))
    return found.getsockname()[1]
