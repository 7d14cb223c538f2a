"""Layers in stages, one after the other on different devices.

Axis `stage` of the mesh splits the layers. A batch goes through in M
microbatches: while a stage has one, the stage before it has the next (GPipe,
arXiv 1811.06965). Of the M + S - 1 steps that takes, each of S stages spends
S - 1 idle: the bubble. Gradients go back the same way.
"""
import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from jaxlm.config import ModelConfig, stacks
from jaxlm.parallel import mesh
from pallas_kernels import vma

AXIS = "stage"


def bubble(stages: int, microbatches: int) -> float:
  """The part of the time that a stage is idle."""
  return (stages - 1) / (microbatches + stages - 1)


def choose_microbatches(batch: int, asked: int = 0) -> int:
  """As many as asked for; else up to four for each stage of the mesh.

  Raises:
    ValueError: they, or the rows of one of them over the mesh, do not divide.
  """
  stages, devices = mesh.axis_size(AXIS), mesh.axis_size(*mesh.RULES["batch"])
  fits = [n for n in range(1, batch + 1) if batch % (n * devices) == 0]
  if asked and asked not in fits or not fits:
    raise ValueError(
        f"microbatches={asked} of batch={batch}: each must divide over "
        f"{devices} devices (data x expert); use {_listed(fits)}")
  return asked or max(n for n in fits if n <= max(4 * stages, fits[0]))


def _listed(numbers) -> str:
  return ", ".join(map(str, numbers)) or "a batch that does"


def check(config: ModelConfig, training: bool) -> None:
  """Raises ValueError unless stages can split the model's layers."""
  runs, stages = stacks(config), mesh.axis_size(AXIS)
  networks = [config.mlp, *((config.moe.expert, config.moe.shared)
                            if config.moe else ())]
  if mesh.axis_size("tensor") > 1 and any(
      network is not None and network.gated and not network.interleaved
      for network in networks):
    # As they lie, a device of `tensor` has columns of only one of both.
    raise ValueError(f"stage={stages} and tensor={mesh.axis_size('tensor')}: "
                     "gates and what they gate lie side by side in this "
                     "model's feed-forwards; use stage=1 or tensor=1")
  router = config.moe and config.moe.router.kind
  if router == "expert_choice":
    raise ValueError(f"stage={stages}: router.kind='expert_choice' chooses "
                     "from a whole batch, not from microbatches; use stage=1")
  noisy = router == "noisy_topk"
  if training and (config.dropout or noisy):
    raise ValueError(f"stage={stages}: dropout and noise of routers would not "
                     "be what they are without; use stage=1")
  if len(runs) > 1:
    counts = " + ".join(f"{s.repeats} x {len(s.kinds)}" for s in runs)
    raise ValueError(f"stage={stages}: layers in {len(runs)} runs of "
                     f"different kinds ({counts}) cannot be split in stages; "
                     "use stage=1")
  mesh.check_divides("repeats of the model's layers", (runs[0].repeats,),
                     ("layers",), mesh.current())


def run(apply, stacked, specs, index_R, x_BTD, context, microbatches: int):
  """All layers, as a scan of `apply` over `stacked` would run them.

  Args:
    apply: (weights, x_BTD, index, context) to x_BTD and a tree of reports of
      this microbatch, of which the mean over all is returned. It gets each
      device's own parts: here every axis of the mesh is in hand.
    stacked: weights, with R repeats in front, and how they are split;
      `index_R`: of each the number of its first layer.
    context: a tree of arrays [B, T, ...] or [1, T, ...].

  Returns:
    x_BTD and the reports, with R in front.
  """
  whole_batch = len(x_BTD)

  def local(stacked, index_R, x_BTD, context):
    x_BTD, context = vma.vary((x_BTD, context), {AXIS})
    stage, stages = lax.axis_index(AXIS), lax.axis_size(AXIS)

    def cut(x):
      return (x.reshape(microbatches, -1, *x.shape[1:])
              if len(x) == len(x_BTD) else x[None])

    x_MBTD, contexts = cut(x_BTD), jax.tree.map(cut, context)

    def through(x_BTD, part):
      """A microbatch through the layers of this stage."""
      own = jax.tree.map(lambda x: x[jnp.minimum(part, len(x) - 1)], contexts)
      return lax.scan(lambda x, layer: apply(layer[0], x, layer[1], own),
                      x_BTD, (stacked, index_R))

    def step(carry, time):
      received, sums = carry
      part = time - stage
      there = (0 <= part) & (part < microbatches)
      part = jnp.clip(part, 0, microbatches - 1)
      y, reports = through(jnp.where(stage == 0, x_MBTD[part], received), part)
      sums = jax.tree.map(lambda s, x: s + jnp.where(there, x, 0), sums,
                          reports)
      return (lax.ppermute(y, AXIS, [(i, i + 1) for i in range(stages - 1)]),
              sums), y

    _, reports = jax.eval_shape(through, x_MBTD[0], stage)
    sums = jax.tree.map(lambda x: vma.vary(jnp.zeros(x.shape, x.dtype),
                                           vma.varying(x) | {AXIS}), reports)
    (_, sums), y_SBTD = lax.scan(
        step, (jnp.zeros_like(x_MBTD[0]), sums),
        jnp.arange(microbatches + stages - 1))
    # Of the last stage, from when the first microbatch gets there.
    y_MBTD = lax.psum(jnp.where(stage == stages - 1, y_SBTD[stages - 1:], 0),
                      AXIS)
    return (y_MBTD.reshape(x_BTD.shape),
            jax.tree.map(lambda s: s / microbatches, sums))

  tokens = mesh.spec("batch", "length")
  context_specs = jax.tree.map(
      lambda x: tokens if len(x) == whole_batch else mesh.spec(None, "length"),
      context)
  return mesh.manual(
      local, (specs, P(AXIS), tokens, context_specs),
      (tokens, P(AXIS)))(stacked, index_R, x_BTD, context)
