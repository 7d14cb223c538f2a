"""The console command `jaxlm`."""
import argparse
import functools
import re
import sys
import warnings

import rich.console
import rich.progress
import rich.table

from jaxlm import cli_plan, cli_text


def main(arguments: list[str] | None = None) -> int:
  """Runs a command; 0 if it worked, 1 if not (2, from argparse: wrong usage).
  """
  args = _parser().parse_args(arguments)
  warnings.showwarning = lambda message, *_: print(f"jaxlm: {message}",
                                                   file=sys.stderr)
  try:
    args.run(args)
  except (ValueError, NotImplementedError) as error:
    print(f"jaxlm: error: {error}", file=sys.stderr)
    return 1
  except KeyboardInterrupt:
    print("jaxlm: interrupted", file=sys.stderr)
    return 1
  return 0


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
      "jaxlm", description="Open language models in JAX.",
      epilog="jaxlm COMMAND --help says more, with examples.")
  commands = parser.add_subparsers(metavar="COMMAND", required=True)
  _add_convert(commands)
  _add_inspect(commands)
  add = functools.partial(_add, commands)
  cli_text.add_generate(add)
  cli_text.add_chat(add)
  cli_plan.add_plan(add)
  return parser


def _add(commands, name: str, run, help: str, examples: str):
  command = commands.add_parser(
      name, help=help, description=help[0].upper() + help[1:] + ".",
      epilog="examples:\n" + examples,
      formatter_class=argparse.RawDescriptionHelpFormatter)
  command.set_defaults(run=run)
  return command


def _add_convert(commands):
  command = _add(
      commands, "convert", _convert, "rewrite a checkpoint in another format",
      "  jaxlm convert Qwen3-0.6B qwen3\n"
      "  jaxlm convert gpt-oss-20b/original gpt-oss-20b-hf --to hf\n"
      "  jaxlm convert qwen3 qwen3-float32 --to hf --dtype float32\n"
      "  jaxlm convert Mixtral-8x7B mixtral --quantize-experts mxfp4\n"
      "  jaxlm convert gpt-oss-20b floats --to hf --dequantize-experts\n"
      "  jaxlm convert SmolLM2-135M-Instruct.Q4_1.gguf smollm2\n\n"
      "Tensors go through one at a time: a few times the largest of them must\n"
      "fit into memory, not the model. DST appears when all is written.")
  command.add_argument("source", metavar="SRC",
                       help="a directory in any of the formats, or a GGUF file")
  command.add_argument("destination", metavar="DST", help="a new directory")
  command.add_argument(
      "--to", default="native", choices=("native", "hf", "openai"),
      help="jaxlm's own layout (the default), Hugging Face's or OpenAI's")
  command.add_argument(
      "--dtype", choices=("float32", "bfloat16", "float16"),
      help="of the weights (default: as they are stored)")
  experts = command.add_mutually_exclusive_group()
  experts.add_argument(
      "--dequantize-experts", action="store_true",
      help="write packed experts (gpt-oss's MXFP4) as floats")
  experts.add_argument(
      "--quantize-experts", metavar="KIND", choices=("mxfp4", "int8", "fp8"),
      help="mxfp4, int8 or fp8: the matrices of the experts, with the error of "
      "each in the end")


def _add_inspect(commands):
  command = _add(
      commands, "inspect", _inspect, "show what a checkpoint holds",
      "  jaxlm inspect Qwen3-0.6B")
  command.add_argument("source", metavar="SRC",
                       help="a directory in any of the formats, or a GGUF file")


def _convert(args):
  # jax takes a second to import: not for --help.
  import dataclasses
  from jaxlm.convert import formats
  from jaxlm.convert.quantized import dequantize_experts, quantize_experts
  from jaxlm.convert.tensors import cast
  source = formats.read(args.source)
  errors = {}
  if args.quantize_experts:
    source = quantize_experts(source, args.quantize_experts, errors.__setitem__)
  if args.dequantize_experts:
    source = dequantize_experts(source, args.dtype or "bfloat16")
  source = dataclasses.replace(source, tensors=cast(source.tensors, args.dtype))
  with rich.progress.Progress(
      "[progress.description]{task.description}", rich.progress.BarColumn(),
      rich.progress.DownloadColumn(), rich.progress.TransferSpeedColumn(),
      rich.progress.TimeRemainingColumn(),
      console=rich.console.Console(stderr=True)) as progress:
    task = progress.add_task("writing", total=source.nbytes)
    formats.write(source, args.destination, args.to,
                  lambda nbytes: progress.advance(task, nbytes))
  for path, error in errors.items():
    print(f"{path}: error {error.relative_rms:.3%} (root mean square), at most "
          f"{error.largest:.3g}")
  print(f"{args.destination}: {source.nbytes / 1e9:.2f} GB, {source.dtype}")


def _inspect(args):
  from jaxlm.config_dict import to_dict
  from jaxlm.convert import formats
  from jaxlm.convert.tensors import summarize
  from jaxlm.model.costs import parameter_counts
  source = formats.read(args.source)
  console = rich.console.Console()
  counts = parameter_counts(source.config)
  console.print(f"format: {formats.format_of(args.source)}")
  console.print(f"parameters: {counts.total:,} ({counts.active:,} active), "
                f"{source.nbytes / 1e9:.2f} GB")
  console.print(f"text files: {', '.join(source.files) or 'none'}")
  console.print("config (what is off or absent is not shown):")
  console.print_json(data=_shown({**to_dict(source.config), **source.about}))
  table = rich.table.Table("tensor", "shape", "dtype")
  alike = {}
  for name, tensor in source.tensors.items():
    key = (re.sub(r"\d+", "", name), tensor.shape, str(tensor.dtype))
    alike.setdefault(key, []).append(name)
  for (_, shape, dtype), names in alike.items():
    table.add_row("\n".join(summarize(names)), str(list(shape)), dtype)
  console.print(table)


def _shown(values):
  if not isinstance(values, dict):
    return values
  return {name: _shown(value) for name, value in values.items()
          if value or value == 0 and value is not False}


if __name__ == "__main__":
  sys.exit(main())
