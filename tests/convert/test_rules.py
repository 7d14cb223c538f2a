"""Rules: what they mean, that they run both ways, what they refuse."""
import math

from hypothesis import given, settings, strategies as st
import numpy as np
import pytest

from jaxlm.convert.rules import Rule, bind, their_shapes, to_ours, to_theirs
from jaxlm.convert.tensors import (check, contiguous, copy_into, of_array,
                                   summarize)


def numbers(*shape):
  return np.arange(math.prod(shape), dtype=np.float32).reshape(shape)


def ours_of(rules, shapes, theirs):
  tensors = {name: of_array(x) for name, x in theirs.items()}
  return {path: tensor.read() for path, tensor
          in to_ours(bind(rules, shapes), tensors, "here").items()}


def theirs_of(rules, ours):
  units = bind(rules, {path: x.shape for path, x in ours.items()})
  tensors = to_theirs(units, {path: of_array(x) for path, x in ours.items()})
  return {name: tensor.read() for name, tensor in tensors.items()}


def assert_both_ways(rules, ours, theirs):
  shapes = {path: x.shape for path, x in ours.items()}
  for made, expected in ((ours_of(rules, shapes, theirs), ours),
                         (theirs_of(rules, ours), theirs)):
    assert made.keys() == expected.keys()
    for name, x in expected.items():
      np.testing.assert_array_equal(made[name], x)


def test_a_projection_is_transposed_and_split_into_heads():
  theirs = numbers(3 * 5, 7)
  ours = np.einsum("nhd->dnh", theirs.reshape(3, 5, 7))
  rule = Rule("layers/{layer}/q", "h.{layer}.q", "(N H) D -> D N H")
  assert_both_ways([rule], {"layers/4/q": ours}, {"h.4.q": theirs})


def test_gate_and_up_are_stacked():
  gate, up = numbers(3, 5), -numbers(3, 5)
  assert_both_ways([Rule("gate_up", ("gate", "up"), "C F D -> D (C F)")],
                   {"gate_up": np.concatenate([gate.T, up.T], 1)},
                   {"gate": gate, "up": up})


def test_gate_and_up_of_each_expert_are_stacked():
  theirs = {f"e.{e}.{name}": numbers(3, 5) + 100 * e + 1000 * i
            for e in range(11) for i, name in enumerate(("gate", "up"))}
  ours = np.stack([np.concatenate([theirs[f"e.{e}.gate"].T,
                                   theirs[f"e.{e}.up"].T], 1)
                   for e in range(11)])
  assert_both_ways(
      [Rule("gate_up", ("e.{expert}.gate", "e.{expert}.up"),
            "E C F D -> E D (C F)")], {"gate_up": ours}, theirs)


def test_one_of_theirs_is_split_into_unequal_parts():
  q, k = numbers(6, 5, 7), -numbers(2, 5, 7)
  theirs = np.concatenate([q.reshape(-1, 7), k.reshape(-1, 7)])
  assert_both_ways(
      [Rule(("q", "k"), "qk", "(N H) D -> D N H", axis=0)],
      {"q": q.transpose(2, 0, 1), "k": k.transpose(2, 0, 1)}, {"qk": theirs})


@st.composite
def rules_with_shapes(draw):
  """A random rule and the shapes of its leaves."""
  letters = draw(st.permutations("ABCDE"))[:draw(st.integers(1, 5))]
  sizes = {letter: draw(st.integers(1, 5)) for letter in letters}
  num_stacked = draw(st.integers(0, min(2, len(letters) - 1)))
  stack, rest = list(letters[:num_stacked]), letters[num_stacked:]
  names = ("a", "b", "c")[:sizes[stack[-1]] if len(stack) == 2 else 1]
  if len(stack) == 2:
    sizes[stack[-1]] = len(names)
  theirs = tuple(("{e}." if stack else "") + name for name in names)
  if len(stack) == 2 and len(names) == 1:
    stack, rest = stack[:1], [stack[1], *rest]
  left = stack + _grouped(draw, rest)
  # On our side at most one letter of a group has an unknown size.
  known = stack[1:]
  right = []
  for letter in draw(st.permutations([x for x in letters if x not in known])):
    right.append(letter)
  for letter in known:
    i = draw(st.integers(0, len(right) - 1))
    right[i] = draw(st.sampled_from([f"({letter} {right[i]})",
                                     f"({right[i]} {letter})"]))
  shape = tuple(math.prod(sizes[x] for x in group if x in sizes)
                for group in right)
  return Rule("ours", theirs, f"{' '.join(left)} -> {' '.join(right)}"), shape


def _grouped(draw, letters):
  groups = []
  for letter in letters:
    if groups and draw(st.booleans()):
      groups[-1].append(letter)
    else:
      groups.append([letter])
  return [f"({' '.join(g)})" if len(g) > 1 else g[0] for g in groups]


@settings(max_examples=300, deadline=None)
@given(rules_with_shapes())
def test_every_rule_can_be_inverted(rule_and_shape):
  rule, shape = rule_and_shape
  ours = {"ours": numbers(*shape)}
  theirs = theirs_of([rule], ours)
  assert {name: x.shape for name, x in theirs.items()} == their_shapes(
      bind([rule], {"ours": shape}))
  assert sum(x.size for x in theirs.values()) == math.prod(shape)
  back = ours_of([rule], {"ours": shape}, theirs)
  np.testing.assert_array_equal(back["ours"], ours["ours"])


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_blocked_copies_equal_numpys(data):
  shape = data.draw(st.lists(st.sampled_from([1, 2, 63, 65, 130]), min_size=1,
                             max_size=3))
  axes = data.draw(st.permutations(range(len(shape))))
  source = numbers(*shape).transpose(axes)
  np.testing.assert_array_equal(contiguous(source), source)
  target = np.zeros(shape, np.float32).transpose(axes)
  copy_into(target, np.ascontiguousarray(source))
  np.testing.assert_array_equal(target, source)


def test_blocks_meet_at_their_edges():
  source = numbers(131, 4099)
  np.testing.assert_array_equal(contiguous(source.T), source.T)


def test_the_wider_dtype_holds_what_is_stacked():
  rule = Rule("gate_up", ("gate", "up"), "C F D -> D (C F)")
  up = numbers(3, 5) / 3
  made = ours_of([rule], {"gate_up": (5, 6)},
                 {"gate": numbers(3, 5).astype(np.float16), "up": up})
  np.testing.assert_array_equal(made["gate_up"][:, 3:], up.T)


def test_tensors_made_together_are_made_once():
  reads = []
  rule = Rule(("q", "k"), "qk", "(N H) D -> D N H", axis=0)
  tensor = of_array(numbers(6, 7))
  tensor = tensor._replace(read=lambda: reads.append(1) or numbers(6, 7))
  ours = to_ours(bind([rule], {"q": (7, 2, 2), "k": (7, 1, 2)}),
                 {"qk": tensor}, "here")
  assert [x.read().shape for x in ours.values()] == [(7, 2, 2), (7, 1, 2)]
  assert len(reads) == 1


@pytest.mark.parametrize("pattern", ["A B -> A", "A -> A B", "A A -> A A",
                                     "A B -> A C"])
def test_sides_with_other_letters_are_refused(pattern):
  with pytest.raises(ValueError, match="same letters"):
    Rule("ours", "theirs", pattern)


def test_a_split_needs_an_axis():
  with pytest.raises(ValueError, match="axis says where"):
    Rule(("q", "k"), "qk", "(N H) D -> D N H")


def test_leaves_without_a_rule_are_all_named():
  with pytest.raises(ValueError, match="no place for b, c"):
    bind([Rule("a", "x", "D -> D")], {"a": (1,), "c": (2,), "b": (3,)})


def test_all_that_does_not_fit_is_named_at_once():
  rules = [Rule("layers/{layer}/a", "h.{layer}.a", "D -> D"),
           Rule("b", "b", "E D -> D E"), Rule("c", "c", "D -> D")]
  shapes = {f"layers/{i}/a": (3,) for i in range(12)} | {"b": (2, 3), "c": (5,)}
  found = {"h.3.a": of_array(numbers(4)), "b": of_array(numbers(2, 3)),
           "c": of_array(np.zeros(5, np.int32)), "extra": of_array(numbers(1))}
  with pytest.raises(ValueError) as error:
    check("here", their_shapes(bind(rules, shapes)), found)
  for part in ("missing: h.0.a, h.1.a, h.2.a, h.4.a", "unexpected: extra",
               "h.3.a is [4], expected [3]", "b is [2, 3], expected [3, 2]",
               "c is int32, expected float32 or float16 or bfloat16"):
    assert part in str(error.value)


def test_names_are_summed_up_without_loss():
  names = [f"h.{i}.e.{j}.w" for i in range(3) for j in range(11)]
  assert summarize(names) == ["h.{0..2}.e.{0..10}.w"]
  assert summarize(["x", *names[1:3]]) == ["x", "h.0.e.{1..2}.w"]
  assert summarize([names[0], names[12]]) == ["h.0.e.0.w", "h.1.e.1.w"]
  for odd in ("{'a': 1}", "h.007", "h.{}", "{0}", "7", "9" * 5000, ""):
    assert summarize([odd]) == [odd]
