"""Trains a model on text: `python -m jaxlm.train --help`."""
import argparse
import functools
import json
import pathlib
import shlex
import sys

import jax

import jaxlm
from jaxlm.config import ModelConfig
from jaxlm.config_dict import from_dict, to_dict
from jaxlm.data import build_dataset
from jaxlm.model.transformer import REMAT_POLICIES, Execution
from jaxlm.parallel import multihost, pipeline
from jaxlm.parallel.mesh import make_mesh, parse_mesh
from jaxlm.train.checkpoint import CheckpointError
from jaxlm.train.loop import Diverged, train
from jaxlm.train.memory import keep_freed_memory
from jaxlm.train.optimizer import OPTIMIZERS, SCHEDULES, OptimizerConfig
from jaxlm.train.step import TrainConfig

EXAMPLES = """\
examples:
  python -m jaxlm.train --preset gpt2 --set num_layers=2 --set d_model=64 \\
      --set attention.num_heads=2 --set attention.num_kv_heads=2 \\
      --steps 200 --batch-size 8 --seq-len 128 --workdir runs/small
  python -m jaxlm.train --preset gpt-oss-20b --data 'files:text/*.txt' \\
      --tokenizer json:tokenizer.json --mesh data=8,expert=8 --dtype bfloat16 \\
      --remat full --steps 1000 --batch-size 64 --seq-len 4096 --workdir DIR

The same command goes on with a run that was stopped. Started on every host of
a TPU slice, of GKE or by srun, the processes find each other; elsewhere give
each --coordinator, --num-processes and its --process-id. WORKDIR is one
directory that all of them see.

exit status: 0 done, 1 failed, 2 wrong usage, 130 or 143 stopped by Ctrl-C or
SIGTERM, its state saved."""


def main(argv: list[str] | None = None) -> int:
  args = _parser().parse_args(argv)
  command = shlex.join(sys.argv[1:] if argv is None else argv)
  keep_freed_memory()
  try:
    multihost.initialize(args.coordinator, args.num_processes, args.process_id,
                         args.heartbeat_seconds)
    _train(args)
  except (CheckpointError, jax.errors.JaxRuntimeError) as error:
    # Either may come of the end of another process, which may be hard to tell.
    several = multihost.is_several()
    if not several and not isinstance(error, CheckpointError):
      raise
    print(f"error: {multihost.lost(error) if several else error}",
          file=sys.stderr)
    return multihost.leave(1)
  except (ValueError, OSError, NotImplementedError, Diverged) as error:
    print(f"error: {error}", file=sys.stderr)
    return multihost.leave(1)
  except KeyboardInterrupt as error:
    if multihost.is_main():
      print(f"{error or 'stopped'}. The same command continues:\n"
            f"  python -m jaxlm.train {command}", file=sys.stderr)
    return getattr(error, "exit_status", 130)
  return 0


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
      "python -m jaxlm.train", description="Trains a model on text.",
      epilog=EXAMPLES, allow_abbrev=False,
      formatter_class=argparse.RawDescriptionHelpFormatter)
  _add_what(parser)
  _add_how(parser)
  _add_where(parser)
  return parser


def _add_what(parser):
  group = parser.add_argument_group("what is trained")
  model = group.add_mutually_exclusive_group(required=True)
  model.add_argument("--preset", metavar="NAME",
                     help="an architecture by its published name")
  model.add_argument("--config", metavar="FILE",
                     help="the fields of a ModelConfig as JSON")
  group.add_argument("--set", metavar="FIELD=VALUE", action="append",
                     default=[], type=_assignment,
                     help="change a field of it, such as num_layers=2 or "
                     "moe.num_experts=8; may be repeated")
  group.add_argument("--data", default="python-stdlib", metavar="SOURCE",
                     help="python-stdlib (the default), files:GLOB or "
                     "hf:NAME[:SPLIT[:CONFIG]]")
  group.add_argument("--tokenizer", default="bytes", metavar="SPEC",
                     help="bytes (the default), bpe:VOCAB, json:PATH or "
                     "tiktoken:NAME")
  group.add_argument("--max-bytes", type=int, metavar="N",
                     help="of the text at most")
  group.add_argument("--heldout-fraction", type=float, default=0.05,
                     metavar="X", help="of the files (default: 0.05)")


def _add_how(parser):
  group = parser.add_argument_group("how")
  number = functools.partial(group.add_argument, type=int, metavar="N")
  number("--steps", required=True)
  number("--batch-size", required=True, help="sequences a step, of all devices")
  number("--seq-len", required=True, help="tokens a sequence")
  number("--accumulate", default=1, help="parts that a step takes one by one")
  number("--seed", default=0)
  group.add_argument("--optimizer", choices=OPTIMIZERS, default="adamw")
  group.add_argument("--learning-rate", type=float, default=1e-3, metavar="X")
  group.add_argument("--schedule", choices=SCHEDULES, default="cosine")
  number("--warmup-steps", default=0)
  group.add_argument("--dtype", default="float32",
                     choices=("float32", "bfloat16"), help="of activations")
  group.add_argument("--remat", choices=tuple(REMAT_POLICIES), default="none",
                     help="what the backward pass computes again")
  number("--eval-every", default=0, help="steps (0: at the end alone)")
  number("--eval-batches", default=16)
  number("--log-every", default=10, help="steps")


def _add_where(parser):
  group = parser.add_argument_group("where")
  number = functools.partial(group.add_argument, type=int, metavar="N")
  group.add_argument("--workdir", required=True, metavar="DIR",
                     help="for metrics and checkpoints")
  number("--checkpoint-every", default=0, help="steps (0: at the end alone)")
  number("--keep", default=2, help="the newest checkpoints")
  number("--keep-best", default=0, help="and those of the least held-out loss")
  group.add_argument("--mesh", metavar="AXIS=SIZE,...", type=_mesh,
                     help="how devices share the work, such as "
                     "data=2,expert=4 (default: all data)")
  number("--microbatches", default=0,
         help="of a batch that goes through stages (0: up to four for each)")
  group.add_argument("--coordinator", metavar="HOST:PORT",
                     help="of process 0; with the two that follow")
  number("--num-processes")
  number("--process-id")
  number("--heartbeat-seconds", default=60,
         help="without a sign of a process all end (default: 60)")


def _assignment(text: str) -> tuple[list[str], object]:
  name, equals, value = text.partition("=")
  if not name or not equals:
    raise argparse.ArgumentTypeError(f"{text!r} is not FIELD=VALUE")
  try:
    value = json.loads(value)
  except ValueError:
    pass  # a string without its quotes
  return name.split("."), value


def _mesh(text: str) -> dict[str, int]:
  try:
    return parse_mesh(text)
  except ValueError as error:
    raise argparse.ArgumentTypeError(str(error)) from error


def _model(args) -> ModelConfig:
  if args.preset:
    fields = to_dict(jaxlm.preset(args.preset))
  else:
    try:
      fields = json.loads(pathlib.Path(args.config).read_bytes())
    except ValueError as error:
      raise ValueError(f"{args.config} is no JSON: {error}") from error
  for path, value in args.set:
    inner = fields
    for name in path[:-1]:
      inner = inner.get(name)
      if not isinstance(inner, dict):
        raise ValueError(f"--set {'.'.join(path)}: the model has no {name}")
    inner[path[-1]] = value
  return from_dict(ModelConfig, fields)


def _train_config(args) -> TrainConfig:
  same = {name: getattr(args, name) for name in (
      "steps", "batch_size", "seq_len", "accumulate", "eval_every",
      "eval_batches", "log_every", "checkpoint_every", "keep", "keep_best")}
  return TrainConfig(
      **same, execution=Execution(dtype=args.dtype, remat=args.remat,
                                  microbatches=args.microbatches),
      optimizer=OptimizerConfig(
          name=args.optimizer, learning_rate=args.learning_rate,
          schedule=args.schedule, warmup_steps=args.warmup_steps))


def _train(args):
  model, config = _model(args), _train_config(args)
  mesh = args.mesh
  if mesh is None and jax.device_count() > 1:
    mesh = {"data": jax.device_count()}
  if "://" in args.workdir:
    raise ValueError(f"--workdir {args.workdir} is no directory: mount the "
                     "bucket on each host, and name where")
  workdir = pathlib.Path(args.workdir)
  if jax.config.jax_compilation_cache_dir is None:
    # A restart is spared the compilation.
    jax.config.update("jax_compilation_cache_dir", str(workdir / "compiled"))
  data = build_dataset(args.data, args.tokenizer, args.seq_len,
                       heldout_fraction=args.heldout_fraction,
                       max_bytes=args.max_bytes)
  _say(f"{args.preset or args.config}: {jax.device_count()} devices of "
       f"{jax.process_count()} processes, mesh {mesh or 'none'}")
  if mesh and mesh.get("stage", 1) > 1:
    _say_bubble(config, mesh)
  [result] = train(model, config, data, workdir, seeds=(args.seed,), mesh=mesh,
                   on_step=functools.partial(_report, config))
  _say(f"done: held-out loss {result.eval_loss:.4f} nats a token, "
       f"{result.bits_per_byte:.4f} bits a byte")


def _say_bubble(config: TrainConfig, mesh: dict[str, int]) -> None:
  with jax.set_mesh(make_mesh(mesh)):
    microbatches = pipeline.choose_microbatches(
        config.batch_size // config.accumulate, config.execution.microbatches)
  idle = pipeline.bubble(mesh["stage"], microbatches)
  _say(f"{mesh['stage']} stages, {microbatches} microbatches: each stage is "
       f"idle {idle:.0%} of the time")


def _report(config, step, metrics):
  if (step % config.log_every and step != config.steps
      and "eval_loss" not in metrics):
    return
  line = f"step {step}/{config.steps}  loss {metrics['loss']:.4f}"
  if "eval_loss" in metrics:
    line += f"  held-out {metrics['eval_loss']:.4f}"
  if "tokens_per_second" in metrics:
    line += f"  {metrics['tokens_per_second']:.0f} tokens/s"
  _say(line)


def _say(line: str):
  """One process speaks for all."""
  if multihost.is_main():
    print(line, flush=True)


if __name__ == "__main__":
  sys.exit(main())
