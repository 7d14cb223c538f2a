"""A sum over rounds, of which there are mostly one and sometimes many."""
import functools

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import vma


def sum_of_rounds(function, rounds, floats, others, most: int):
  """function(0, floats, others) + ... + function(rounds - 1, ...).

  The first round is a straight piece of program, of which the backward pass
  finds what the forward pass kept. The others run in a loop that takes no
  time where there are none, and whose gradient computes them again, one after
  the other: so memory is one round's, however many there are.

  Args:
    rounds: how many, at least 1; traced.
    floats: a tree of arrays it is differentiable in.
    others: a tree of arrays it is not.
    most: what `rounds` can be.
  """
  if most == 1:
    return function(0, floats, others)
  return _sum(function, rounds, *vma.like((floats, others)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sum(function, rounds, floats, others):
  return _add_rest(lambda i: function(i, floats, others), rounds,
                   function(0, floats, others))


def _add_rest(function, rounds, total):
  def add(i, total):
    return jax.tree.map(jnp.add, total, function(i))
  with jax.named_scope("rarely"):  # for who plans
    return lax.fori_loop(1, rounds, add, total)


def _forward(function, rounds, floats, others):
  total, first = jax.vjp(lambda floats: function(0, floats, others), floats)
  total = _add_rest(lambda i: function(i, floats, others), rounds, total)
  return total, (first, rounds, floats, others)


def _backward(function, residuals, dy):
  first, rounds, floats, others = residuals

  def gradients(i):
    return jax.vjp(lambda floats: function(i, floats, others), floats)[1](dy)

  # After the first round's, whose memory is free again.
  return None, *_add_rest(gradients, rounds, first(dy)), None


_sum.defvjp(_forward, _backward)
