"""Compiles what the estimate is held against, and keeps the figures.

  python -m jaxlm.plan.figures [--only TEXT ...]

writes figures.json beside this file: for each job its plan as compiled, with
the versions that compiled it. Jobs whose names contain none of the texts stay
as they are.
"""
import argparse
import json
import pathlib

from jaxlm import families
from jaxlm.parallel.mesh import parse_mesh
from jaxlm.plan import table
from jaxlm.plan.devices import parse_slice
from jaxlm.plan.job import Job, make_job
from jaxlm.plan.plan import by_compiling

PATH = pathlib.Path(__file__).with_suffix(".json")
# Model, slice, mesh, task and what else `make_job` takes.
JOBS = (
    ("gpt2", "v5e:2x2", "data=4", "train", {"seq": 1024}),
    ("gpt2", "v5e:2x2", "data=4", "decode", {"seq": 1024}),
    ("qwen3-0.6b", "v5e:2x4", "data=8", "train", {}),
    ("qwen3-4b", "v6e:2x4", "data=4,tensor=2", "train", {}),
    ("qwen3-8b", "v5e:2x4", "tensor=8", "decode", {}),
    ("gemma3-1b", "v6e:2x2", "data=4", "train", {}),
    ("gpt-oss-20b", "v5p:2x2x2", "data=2,expert=4", "train", {}),
    ("gpt-oss-20b", "v5p:4x4x4", "data=4,expert=16", "train", {}),
    ("gpt-oss-120b", "v5p:4x4x4", "data=4,expert=16", "train", {}),
    ("gpt-oss-20b", "v5e:2x4", "expert=4,tensor=2", "decode", {}),
    ("gpt-oss-120b", "v5e:4x4", "expert=8,tensor=2", "decode",
     {"weights": "mxfp4"}),
    ("gpt-oss-120b", "v6e:2x2", "expert=2,tensor=2", "decode",
     {"weights": "mxfp4"}),
)


def name_of(model, slice_, mesh, task, options) -> str:
  return " ".join([model, task, slice_, mesh, *map(str, options.values())])


def job_of(model, slice_, mesh, task, options) -> Job:
  return make_job(model, families.preset(model), task, parse_slice(slice_),
                  parse_mesh(mesh), **options)


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--only", nargs="*", default=[""])
  only = parser.parse_args().only
  kept = json.loads(PATH.read_text()) if PATH.exists() else {}
  for job in JOBS:
    name = name_of(*job)
    if any(text in name for text in only):
      kept[name] = table.as_json(by_compiling(job_of(*job)))
      PATH.write_text(json.dumps(kept, indent=1) + "\n")
      print(name, f"{kept[name]['total'] / 2 ** 30:.3f} GiB", flush=True)


if __name__ == "__main__":
  main()
