"""Fixtures: what a function computes, seen by its jaxpr; quick compiling."""
import collections
import functools
import gc
import math
import os
import pathlib

# libtpu, which is here to compile, must not look for a TPU.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal
import pytest

from quick import jax_options

# Tracing makes many objects that live long: looking through them for cycles at
# the default pace took a twentieth of the time.
gc.set_threshold(100_000, 20, 100)

# For what is split over devices; all else runs on the first of them.
jax.config.update("jax_num_cpu_devices", 8)


def _inner(eqn):
  """The jaxprs inside an equation: a call's, a loop's, the branches'."""
  for value in eqn.params.values():
    for item in value if isinstance(value, (tuple, list)) else (value,):
      if isinstance(item, ClosedJaxpr):
        yield item.jaxpr
      elif isinstance(item, Jaxpr):
        yield item


def _equations(jaxpr):
  for eqn in jaxpr.eqns:
    yield eqn
    for inner in _inner(eqn):
      yield from _equations(inner)


def _multiplies(jaxpr) -> bool:
  return any(eqn.primitive.name == "dot_general" for eqn in _equations(jaxpr))


def _flops_of_dot(eqn) -> int:
  (contracted, _), _ = eqn.params["dimension_numbers"]
  left = eqn.invars[0].aval.shape
  return 2 * math.prod(eqn.outvars[0].aval.shape) * math.prod(
      left[axis] for axis in contracted)


def _read(values, variables):
  return [v.val if isinstance(v, Literal) else values[v] for v in variables]


def _run(closed: ClosedJaxpr, args, flops):
  """The jaxpr's outputs, and `flops` plus those of the matmuls it ran."""
  values = dict(zip(closed.jaxpr.constvars, closed.consts))
  values |= dict(zip(closed.jaxpr.invars, args, strict=True))
  for eqn in closed.jaxpr.eqns:
    outputs, flops = _apply(eqn, _read(values, eqn.invars), flops)
    values |= dict(zip(eqn.outvars, outputs, strict=True))
  return _read(values, closed.jaxpr.outvars), flops


def _apply(eqn, args, flops):
  name, params = eqn.primitive.name, eqn.params
  if name == "dot_general":
    flops += _flops_of_dot(eqn)
  if not any(_multiplies(jaxpr) for jaxpr in _inner(eqn)):
    outputs = eqn.primitive.bind(*args, **params)
    return outputs if eqn.primitive.multiple_results else [outputs], flops
  match name:
    case "cond":
      branches = [functools.partial(_run, b) for b in params["branches"]]
      return jax.lax.switch(args[0], branches, args[1:], flops)
    case "while":
      return _while(params, args, flops)
    case "scan":
      return _scan(eqn, args, flops)
  return _run(params.get("jaxpr") or params["call_jaxpr"], args, flops)


def _while(params, args, flops):
  in_test, in_body = params["cond_nconsts"], params["body_nconsts"]
  test, body = args[:in_test], args[in_test:in_test + in_body]
  return jax.lax.while_loop(
      lambda state: _run(params["cond_jaxpr"], test + state[0], 0)[0][0],
      lambda state: _run(params["body_jaxpr"], body + state[0], state[1]),
      (args[in_test + in_body:], flops))


def _scan(eqn, args, flops):
  body, length = eqn.params["jaxpr"], eqn.params["length"]
  # Scanned arrays have one axis more outside than in the body; what names the
  # number of constants and carries differs between versions of jax.
  same = lambda outside, inside: [
      a.aval.shape == b.aval.shape for a, b in zip(outside, inside)]
  carries = sum(same(eqn.outvars, body.jaxpr.outvars))
  held = sum(same(eqn.invars, body.jaxpr.invars))
  consts = args[:held - carries]
  def step(state, row):
    carry, flops = state
    outputs, flops = _run(body, consts + carry + row, flops)
    return (outputs[:carries], flops), outputs[carries:]
  (carry, flops), rows = jax.lax.scan(
      step, (args[held - carries:held], flops), args[held:], length,
      eqn.params["reverse"])
  return carry + rows, flops


@pytest.fixture(scope="session")
def executed_flops():
  """`executed_flops(f, *args)`: FLOPs of the matmuls that f really ran.

  A loop counts as often as it went round, a branch only if it was taken:
  XLA's own cost analysis knows neither when it depends on the data.
  """
  def count(function, *args):
    closed = jax.make_jaxpr(function)(*args)
    return int(jax.jit(lambda *args: _run(closed, list(args), 0)[1])(
        *jax.tree.leaves(args)))
  return count


@pytest.fixture(scope="session")
def primitives():
  """`primitives(f, *args)`: how often f has each, a loop's body once."""
  def count(function, *args):
    jaxpr = jax.make_jaxpr(function)(*args).jaxpr
    return collections.Counter(eqn.primitive.name for eqn in _equations(jaxpr))
  return count


@pytest.fixture(scope="session")
def largest_array():
  """`largest_array(f, *args)`: elements of the largest array f computes."""
  def largest(function, *args):
    jaxpr = jax.make_jaxpr(function)(*args).jaxpr
    return max(math.prod(v.aval.shape) for eqn in _equations(jaxpr)
               for v in eqn.outvars)
  return largest


@pytest.fixture(scope="module", autouse=True)
def _few_memory_maps():
  """Compiled programs hold memory maps, of which Linux grants a process 65,530:
  where no more are to be had, XLA crashes."""
  yield
  maps = pathlib.Path("/proc/self/maps")
  if maps.exists() and maps.read_text().count("\n") > 15_000:
    jax.clear_caches()


@pytest.fixture(scope="module")
def quick_compile():
  """XLA optimises little: for tests that compile much and compute little."""
  with jax_options(jax_disable_most_optimizations=True):
    yield
