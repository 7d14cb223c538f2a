"""What compiled programs send, against what they were written to send."""
import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec as P
import pytest

from jaxlm.parallel.mesh import gather, manual
from jaxlm.plan import hlo, programs
from jaxlm.plan.devices import parse_slice

ROWS, WIDTH, ROUNDS = 4096, 1024, 5
X, W = 2 * ROWS * WIDTH, 2 * WIDTH * WIDTH
SIZES = {"data": 2, "context": 2, "expert": 4}


def every_collective(x, w):
  def body(x, w):
    w = lax.all_gather(w, "data", axis=0, tiled=True)
    y = lax.all_to_all(x @ w, "expert", 0, 1, tiled=True)
    y = lax.all_to_all(jnp.tanh(y), "expert", 1, 0, tiled=True)
    y = lax.ppermute(y, "context", [(0, 1)])
    y = jnp.tanh(lax.all_gather(y, "expert", axis=0, tiled=True))
    return lax.psum_scatter(y, "expert", scatter_dimension=0, tiled=True), None
  x, _ = lax.scan(body, x, w)
  return lax.psum(x, ("data", "context"))


@pytest.fixture(scope="module")
def compiled():
  pytest.importorskip("libtpu", reason="Linux on x86 alone has libtpu")
  mesh = programs.topology_mesh(parse_slice("v5e:4x4"), SIZES)
  rows, depth = P(("data", "context", "expert")), P(None, "data")
  struct = lambda shape, spec: jax.ShapeDtypeStruct(
      shape, jnp.bfloat16, sharding=NamedSharding(mesh, spec))
  with jax.set_mesh(mesh):
    function = manual(every_collective, (rows, depth), P("expert"))
    return jax.jit(function).lower(
        struct((ROWS * mesh.size, WIDTH), rows),
        struct((ROUNDS, WIDTH, WIDTH), depth)).compile().as_text()


def test_each_is_read_with_its_axes_and_bytes(compiled):
  found = {}
  for one in hlo.collectives(compiled, {"stage": 1, **SIZES, "tensor": 1}):
    assert one.degraded is None
    if one.times * one.wire > X / 20:  # not what mends a padded array
      key = one.kind, one.axes
      found[key] = found.get(key, 0) + one.times * one.wire
  expected = {
      ("all-gather", ("data",)): ROUNDS * W / 2,
      ("all-to-all", ("expert",)): ROUNDS * 2 * X * 3 / 4,
      ("collective-permute", ("context",)): ROUNDS * X / 2,
      ("all-gather", ("expert",)): ROUNDS * X * 3,
      ("reduce-scatter", ("expert",)): ROUNDS * X * 3,
      ("all-reduce", ("data", "context")): 2 * X * 3 / 4,
  }
  assert set(found) == set(expected)
  for key, nbytes in expected.items():
    # A reduce-scatter's rows are padded.
    assert found[key] == pytest.approx(nbytes, rel=0.01), key


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_gradients_of_gathered_weights_are_scattered(axis):
  """Also where they do not fill tiles, between other dimensions."""
  pytest.importorskip("libtpu", reason="Linux on x86 alone has libtpu")
  mesh = programs.topology_mesh(parse_slice("v5p:4x4x4"),
                                {"data": 4, "expert": 16})
  shape, split = [6, 304, 1088], [None] * 3
  shape[axis], split[axis] = 4 * 180, ("data", "context")

  def loss(x, w):
    y = jnp.einsum("DEF,TD->TEF", gather(w, axis, "expert_embed"), x)
    return lax.psum(jnp.sum(jnp.tanh(y).astype(jnp.float32)), axes)
  axes = "data", "context", "expert"
  rows = P(axes)
  struct = lambda shape, spec: jax.ShapeDtypeStruct(
      shape, jnp.bfloat16, sharding=NamedSharding(mesh, spec))
  with jax.set_mesh(mesh):
    function = manual(loss, (rows, P(*split)), P())
    text = jax.jit(jax.grad(function, 1)).lower(
        struct((16 * mesh.size, shape[0]), rows),
        struct(tuple(shape), P(*split))).compile().as_text()
  found = [one for one in hlo.collectives(text, dict(mesh.shape))
           if one.axes == ("data",)]
  assert {one.kind for one in found} == {"all-gather", "reduce-scatter"}


PROGRAM = """HloModule m, is_scheduled=true

%sum (a: f32[], b: f32[]) -> f32[] {
  ROOT %add.1 = f32[] add(%a, %b)
}

%body.1 (p: (s32[], f32[64,8])) -> (s32[], f32[64,8]) {
  %x.1 = f32[64,8]{1,0:T(8,128)} get-tuple-element(%p), index=1
  %all-reduce.7 = f32[64,8]{1,0:T(8,128)} all-reduce(%x.1), GROUPS, to_apply=%sum, metadata={op_name="jit(f)/OP"}
  ROOT %tuple.1 = (s32[], f32[64,8]) tuple(%i, %USER)
}

%test.1 (p: (s32[], f32[64,8])) -> pred[] {
  %limit = s32[] constant(3)
  %i.1 = s32[] get-tuple-element(%p), index=0
  ROOT %lt = pred[] compare(%i.1, %limit), direction=LT
}

ENTRY %main (a: f32[64,8]) -> f32[64,8] {
  %w = (s32[], f32[64,8]) while(%t), condition=%test.1, body=%body.1
  ROOT %r = f32[64,8] get-tuple-element(%w), index=1
}
"""
MESH = {"stage": 1, "data": 2, "context": 1, "expert": 4, "tensor": 2}


def read(groups, op="psum", program=PROGRAM):
  program = program.replace("GROUPS", groups).replace("OP", op)
  [found] = hlo.collectives(program, MESH)
  return found


@pytest.mark.parametrize("groups, axes", [
    ("replica_groups={{0,2,4,6},{1,3,5,7},{8,10,12,14},{9,11,13,15}}",
     ("expert",)),
    ("replica_groups=[8,2]<=[16]", ("tensor",)),
    ("replica_groups=[8,2]<=[2,8]T(1,0)", ("data",)),
    ("replica_groups=[2,8]<=[16]", ("expert", "tensor")),
    ("replica_groups=mesh['axis_0'=8,'axis_1'=2] {'axis_0'}",
     ("data", "expert")),
    ("replica_groups=mesh['axis_0'=2,'axis_1'=8] {'axis_1'}",
     ("expert", "tensor")),
    ("replica_groups={}", ("data", "expert", "tensor"))])
def test_groups_in_every_spelling(groups, axes):
  found = read(groups)
  size = {"expert": 4}.get(axes[0], 2) if len(axes) == 1 else {
      ("expert", "tensor"): 8, ("data", "expert"): 8}.get(axes, 16)
  assert (found.axes, found.size, found.times) == (axes, size, 3)
  assert found.wire == 2 * 64 * 8 * 4 * (size - 1) / size


@pytest.mark.parametrize("op, kind", [
    ("psum", None), ("all_gather", "all-gather"),
    ("reduce_scatter", "reduce-scatter")])
def test_what_became_an_all_reduce_is_flagged(op, kind):
  assert read("replica_groups=[4,4]<=[16]", op).degraded == kind


def test_a_sum_of_which_each_device_keeps_a_part_is_flagged():
  program = PROGRAM.replace("  ROOT %tuple.1", (
      "  %dynamic-slice.2 = f32[16,8] dynamic-slice(%all-reduce.7, %i, %z)\n"
      "  ROOT %tuple.1")).replace("%USER", "%dynamic-slice.2")
  assert read("replica_groups=[4,4]<=[16]",
              program=program).degraded == "reduce-scatter"


def test_it_is_flagged_in_a_fusion_with_what_comes_next():
  fused = """%fused (whole: f32[64,8], stack: f32[9,16,8]) -> f32[9,16,8] {
  %dynamic-slice.3 = f32[16,8] dynamic-slice(%whole, %i, %z)
  %row = f32[1,16,8] bitcast(%dynamic-slice.3)
  ROOT %put = f32[9,16,8] dynamic-update-slice(%stack, %row, %j, %z, %z)
}

%body.1"""
  program = PROGRAM.replace("%body.1", fused, 1).replace("  ROOT %tuple.1", (
      "  %fusion.1 = f32[9,16,8] fusion(%all-reduce.7, %stack), kind=kLoop, "
      "calls=%fused\n  ROOT %tuple.1")).replace("%USER", "%fusion.1")
  assert read("replica_groups=[4,4]<=[16]",
              program=program).degraded == "reduce-scatter"
