"""The real programs of a job, traced and lowered for a slice."""
import functools
import importlib.util
import math
import os
import typing

import jax
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

from jaxlm.decode.generate import CHUNK, State as Decoding, decode, prefill
from jaxlm.decode.sampling import Sampling
from jaxlm.parallel import mesh as mesh_lib
from jaxlm.parallel.params import shardings, with_shardings
from jaxlm.plan.devices import Slice
from jaxlm.plan.job import Job, State, abstract_state, train_state
from jaxlm.train.step import train_step

# So that libtpu compiles without a TPU, beside other processes that do.
ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",  # any: it restricts nothing
    "TPU_WORKER_HOSTNAMES": "localhost",
}


def topology_mesh(slice_: Slice, sizes: dict[str, int]):
  """A mesh of a slice's devices, which need not be there.

  Raises:
    ValueError: libtpu is missing, or knows no such topology.
  """
  from jax.experimental import topologies
  for name, value in ENVIRONMENT.items():
    os.environ.setdefault(name, value)
  device = slice_.device
  if device.topology is None:
    raise ValueError(f"{slice_.name} is no TPU slice: there is no compiler for "
                     "it here; use the estimate (--estimate)")
  if importlib.util.find_spec("libtpu") is None:
    raise ValueError("libtpu, the compiler for TPUs, is not installed: `pip "
                     "install libtpu` (Linux on x86), or use the estimate "
                     "(--estimate)")
  options = {}
  if device.name == "v4":
    options["chip_config_name"] = "megacore"
  if math.prod(slice_.shape) < 4 and device.torus == 2:
    options["chips_per_host_bounds"] = (*slice_.shape, 1)
  name = f"{device.topology}:{'x'.join(map(str, slice_.shape))}"
  try:
    devices = topologies.get_topology_desc(
        platform="tpu", topology_name=name, **options).devices
  except jax.errors.JaxRuntimeError as error:
    raise ValueError(f"slice {slice_.name}: libtpu knows no topology {name}: "
                     f"{str(error).splitlines()[0]}") from error
  return mesh_lib.make_mesh(sizes, devices)


def abstract_mesh(sizes: dict[str, int]) -> AbstractMesh:
  """The same without devices, for arithmetic."""
  return AbstractMesh(tuple(sizes.get(axis, 1) for axis in mesh_lib.AXES),
                      mesh_lib.AXES,
                      axis_types=(AxisType.Auto,) * len(mesh_lib.AXES))


def split(job: Job, mesh) -> State:
  """The shardings of what lies in memory.

  Raises:
    ValueError: something does not divide over the mesh.
  """
  state, fsdp = abstract_state(job), job.execution.fsdp
  if job.task == "train":
    found = shardings(job.config, train_state(state), mesh, fsdp)
    return State(found.params, found.opt_state, None)
  return State(shardings(job.config, state.parameters, mesh, fsdp), None,
               [_cache_shardings(cache, mesh) for cache in state.cache])


def _cache_shardings(cache, mesh):
  return type(cache)(*(
      mesh_lib.named_sharding(mesh, "cache", x.shape, axes)
      for x, axes in zip(cache, cache.logical_axes, strict=True)))


def bytes_by_kind(job: Job, mesh) -> dict[str, int]:
  """Bytes of one device of each kind in `State`, without padding."""
  def size(tree, split_):
    return sum(math.prod(s.shard_shape(x.shape)) * x.dtype.itemsize
               for x, s in zip(jax.tree.leaves(tree), jax.tree.leaves(split_)))
  state, split_ = abstract_state(job), split(job, mesh)
  return {kind: size(getattr(state, kind), getattr(split_, kind))
          for kind in State._fields}


def traced(job: Job, mesh):
  """The program of a job as `jax.stages.Traced`: one training step, a pass
  over prompts, or the loop that decodes token after token.

  Raises:
    ValueError: something does not divide over the mesh.
  """
  state, split_ = abstract_state(job), split(job, mesh)
  whole = NamedSharding(mesh, PartitionSpec())
  tokens = NamedSharding(mesh, mesh_lib.spec("batch", "length"))
  rows = NamedSharding(mesh, mesh_lib.spec("batch"))
  struct = jax.ShapeDtypeStruct
  key = jax.eval_shape(jax.random.key, 0)
  match job.task:
    case "train":
      state, split_ = train_state(state), (whole, *split_[:2])
      split_ = type(state)(*split_)
      shape = (job.batch, job.seq)
      batch = {name: struct(shape, dtype, sharding=tokens) for name, dtype in (
          ("tokens", "int32"), ("targets", "int32"), ("segment_ids", "int32"),
          ("mask", "bool"))}
      function = jax.jit(
          functools.partial(train_step, job.config, job.train_config),
          donate_argnums=0, out_shardings=(split_, None))
      args = (with_shardings(state, split_), batch,
              struct((), "uint32", sharding=whole))
    case "prefill":
      function = jax.jit(
          functools.partial(prefill, job.config, max_length=job.seq,
                            execution=job.execution),
          out_shardings=(None, split_.cache))
      args = (with_shardings(state.parameters, split_.parameters),
              struct((job.batch, job.seq), "int32", sharding=tokens),
              struct((job.batch,), "int32", sharding=rows))
    case "decode":
      row = lambda dtype: struct((job.batch,), dtype, sharding=rows)
      standing = Decoding(
          with_shardings(state.cache, split_.cache), row("int32"),
          row("int32"), row("bool"), None,
          struct((), key.dtype, sharding=whole))
      stop = struct((1,), "int32", sharding=whole)
      function = jax.jit(
          functools.partial(_decode, job.config, job.execution),
          donate_argnums=1, out_shardings=(
              None, jax.tree.map(lambda x: x.sharding, standing)))
      args = (with_shardings(state.parameters, split_.parameters), standing,
              stop, struct((), "int32", sharding=whole))
  with jax.set_mesh(mesh):
    return function.trace(*args)


def _decode(config, execution, params, state, stop_tokens, count):
  return decode.__wrapped__(
      config, params, state, Sampling().checked(), stop_tokens, count,
      most=CHUNK, execution=execution)


def lowered(trace, mesh) -> typing.Any:
  with jax.set_mesh(mesh):
    return trace.lower()
