"""The command `jaxlm plan`."""
import json
import os

import rich.console


def add_plan(add):
  command = add(
      "plan", plan, "say what a model will cost on hardware one does not have",
      "  jaxlm plan --model gpt-oss-120b --slice v5p:4x4x4\n"
      "  jaxlm plan --model gpt-oss-20b --slice v5e:2x4 --task decode \\\n"
      "      --mesh expert=4,tensor=2 --batch 32 --seq 8192\n"
      "  jaxlm plan --model gpt-oss-120b --slice v6e:2x2 --task decode \\\n"
      "      --weights mxfp4 --estimate\n"
      "  jaxlm plan --model qwen3-8b --slice h100:8 --json\n"
      "  jaxlm plan --model gpt2 --slice mine:2 --hbm-gb 24 --tflops 80 \\\n"
      "      --bandwidth-gbps 900\n\n"
      "For TPUs the program itself is compiled, by libtpu (`pip install\n"
      "libtpu`), on any machine; it takes minutes the first time. GPUs, and\n"
      "--estimate, go by arithmetic alone. Times are what public figures of\n"
      "the hardware allow at best, not measurements.")
  command.add_argument("--model", required=True, metavar="NAME",
                       help="a preset, as gpt-oss-20b")
  command.add_argument(
      "--slice", required=True, metavar="KIND:SHAPE",
      help="v5e:4x4, v5p:4x4x4, v6e:2x4, h100:8 ...")
  command.add_argument(
      "--mesh", metavar="AXIS=SIZE,...",
      help="of stage, data, context, expert, tensor (default: the layout that "
      "is best by the estimate)")
  command.add_argument("--task", default="train",
                       choices=("train", "prefill", "decode"))
  command.add_argument(
      "--batch", type=int, metavar="N",
      help="sequences in all (default: one a device, at least 32 to decode)")
  command.add_argument(
      "--seq", type=int, metavar="N",
      help="tokens of each (default: 4096 to train, else 8192)")
  command.add_argument(
      "--weights", choices=("bf16", "mxfp4"),
      help="to prefill and decode with (default: bf16); mxfp4: of experts")
  command.add_argument("--estimate", action="store_true",
                       help="by arithmetic alone, in seconds")
  command.add_argument(
      "--fast", action="store_true",
      help="compile with few optimizations: memory is right within 1 %%, what "
      "is sent is not")
  command.add_argument("--no-cache", action="store_true",
                       help="compile again what was compiled before")
  command.add_argument("--json", action="store_true",
                       help="print JSON (bytes, FLOPs, seconds)")
  group = command.add_argument_group("figures of the device, in place of the "
                                     "known ones")
  group.add_argument("--hbm-gb", type=float, metavar="GB")
  group.add_argument("--tflops", type=float, metavar="T",
                     help="of bfloat16 matmuls")
  group.add_argument("--bandwidth-gbps", type=float, metavar="GB/S",
                     help="of its memory, gigabytes a second")
  group.add_argument("--link-gbps", type=float, metavar="GB/S",
                     help="to a neighbour, one way, gigabytes a second")


def plan(args):
  # What is planned for is not this machine; before jax is imported.
  os.environ["JAX_PLATFORMS"] = "cpu"
  from jaxlm import families
  from jaxlm.parallel.mesh import parse_mesh
  from jaxlm.plan import table
  from jaxlm.plan.devices import parse_slice
  from jaxlm.plan.job import make_job
  from jaxlm.plan.plan import by_compiling, by_estimate
  from jaxlm.plan.search import search
  config = families.preset(args.model)
  slice_ = parse_slice(args.slice, **{
      name: given and given * unit for name, given, unit in (
          ("hbm", args.hbm_gb, 1e9), ("flops", args.tflops, 1e12),
          ("bandwidth", args.bandwidth_gbps, 1e9),
          ("link", args.link_gbps, 1e9))})
  console = rich.console.Console()
  sizes = found = None
  asked = args.model, config, args.task, slice_
  options = args.batch, args.seq, args.weights
  if args.mesh is not None:
    sizes = parse_mesh(args.mesh)
  else:
    found = search(*asked, *options)
    if found.plans:
      sizes = found.plans[0].mesh
  results = []
  if sizes is not None:
    job = make_job(*asked, sizes, *options)
    if args.estimate or not slice_.device.torus:
      results.append(by_estimate(job))
    else:
      results.append(by_compiling(job, args.fast, not args.no_cache))
  if args.json:
    document = {"plan": table.as_json(results[0]) if results else None}
    if found is not None:
      document["layouts"] = [table.as_json(one) for one in
                             found.plans[:table.SHOWN]]
      document["refused"] = found.refused
    print(json.dumps(document, indent=2))
  else:
    if found is not None:
      table.show_search(console, found)
    for one in results:
      table.show(console, one)
  if not results:
    raise ValueError(f"{args.model} {args.task} does not fit on {slice_.name}")
