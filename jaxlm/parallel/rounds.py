"""A sum over rounds, of which there are mostly one and sometimes many."""
import functools

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import manual


def sum_of_rounds(function, rounds, floats, others, most: int):
  """function(0, floats, others) + ... + function(rounds - 1, ...).

  The first round is a straight piece of program, of which the backward pass
  finds what the forward pass kept. The others run in a loop that takes no
  time where there are none, and whose gradient computes them again, one after
  the other; so memory is one round's, however many there are.

  Args:
    rounds: how many, at least 1; traced.
    floats: a tree of arrays it is differentiable in.
    others: a tree of arrays it is not.
    most: what `rounds` can be.
  """
  total = function(0, floats, others)
  if most == 1:
    return total
  floats, others = manual.like((floats, others))
  return _rest(function, manual.like(total, floats, others), rounds, floats,
               others)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _rest(function, total, rounds, floats, others):
  def add(i, total):
    return total + manual.like(function(i, floats, others), total)
  with jax.named_scope("rarely"):  # for who plans
    return lax.fori_loop(1, rounds, add, total)


def _forward(function, total, rounds, floats, others):
  return (_rest(function, total, rounds, floats, others),
          (rounds, floats, others))


def _backward(function, residuals, dy):
  rounds, floats, others = residuals

  def add(i, gradients):
    _, vjp = jax.vjp(lambda floats: function(i, floats, others), floats)
    return jax.tree.map(jnp.add, gradients, vjp(dy)[0])

  zeros = manual.like(jax.tree.map(jnp.zeros_like, floats), floats)
  with jax.named_scope("rarely"):
    return dy, None, lax.fori_loop(1, rounds, add, zeros), None


_rest.defvjp(_forward, _backward)
