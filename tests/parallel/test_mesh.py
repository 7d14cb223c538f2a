"""The mesh, its rules, and where parameters lie."""
import functools

from hypothesis import given, strategies as st
import jax
from jax.sharding import PartitionSpec as P
import pytest

import jaxlm
from jaxlm.model.transformer import abstract_params, per_layer
from jaxlm.parallel import mesh as mesh_lib
from jaxlm.parallel.mesh import (AXES, check_divides, make_mesh,
                                 named_sharding, parse_mesh, spec)
from jaxlm.parallel.params import logical_axes, shardings
from pallas_kernels.quant import FORMATS


@given(st.dictionaries(st.sampled_from(AXES), st.integers(1, 999)))
def test_a_mesh_is_read_as_it_is_written(sizes):
  assert parse_mesh(",".join(f"{k}={v}" for k, v in sizes.items())) == sizes


@pytest.mark.parametrize("text, message", [
    ("data=2,exprt=4", "'exprt': use some of"),
    ("data=2,data=4", "'data=4' is not NAME=SIZE of an axis not yet named"),
    ("data", "'data' is not NAME=SIZE"), ("data=0", "'data=0' is not"),
    ("data=-1", "'data=-1' is not"), ("data=2.0", "'data=2.0' is not")])
def test_what_is_no_mesh_is_refused(text, message):
  with pytest.raises(ValueError, match=message):
    parse_mesh(text)


def test_a_mesh_has_all_axes_and_all_devices():
  mesh = make_mesh({"expert": 4, "data": 2})
  assert dict(mesh.shape) == {"stage": 1, "data": 2, "context": 1,
                              "expert": 4, "tensor": 1}
  assert make_mesh().shape["data"] == 8
  with pytest.raises(ValueError, match="data=3 is 3 devices, but there are 8"):
    make_mesh({"data": 3})
  with pytest.raises(ValueError, match="mesh data=0: must be at least 1"):
    make_mesh({"data": 0, "expert": 8})


def test_colliding_and_unknown_axes_are_refused_by_name():
  with pytest.raises(ValueError, match="both 'embed' and 'expert' would be "
                     "split over the mesh axis 'expert'"):
    spec("embed", "expert")
  with pytest.raises(ValueError, match="logical axis 'width': use some of"):
    spec("width")


def test_sizes_that_do_not_divide_are_refused_with_those_that_would():
  mesh = make_mesh({"tensor": 4, "expert": 2})
  with pytest.raises(ValueError, match="x/k_proj: kv_heads=6 does not divide "
                     "over the mesh's tensor=4: use 1, 2, 3 or 6$"):
    check_divides("x/k_proj", (6, 5), ("kv_heads", None), mesh)
  with pytest.raises(ValueError, match="w: embed=7 does not divide over the "
                     "mesh's expert=2: use 1 or 7 devices in all"):
    named_sharding(mesh, "w", (7, 4), ("embed", "mlp"))


@pytest.mark.parametrize("name", jaxlm.presets())
def test_every_parameter_of_every_preset_has_its_axes(name):
  config = jaxlm.preset(name)
  params = abstract_params(config)
  axes = logical_axes(config)
  assert len(axes) == len(jax.tree.leaves(params))
  one = make_mesh({"data": 1}, jax.devices()[:1])
  for tree in (params, jax.eval_shape(functools.partial(per_layer, config),
                                      params)):
    for leaf, sharding in zip(jax.tree.leaves(tree), jax.tree.leaves(
        shardings(config, tree, one)), strict=True):
      assert len(sharding.spec) == leaf.ndim


def test_parameters_and_optimizer_are_split_alike():
  config = jaxlm.preset("gpt-oss-20b")
  mesh = make_mesh({"data": 2, "expert": 2, "tensor": 2})
  params = abstract_params(config)
  state = {"mu": params, "params": params,
           "count": jax.ShapeDtypeStruct((), int)}
  found = shardings(config, state, mesh)
  assert found["mu"] == found["params"]
  assert found["count"].spec == P()
  moe = found["mu"]["stack_0"]["layer_1"]["moe"]
  assert moe["gate_up"].spec == P("stage", "expert", ("data", "context"),
                                  "tensor")
  resident = shardings(config, params, mesh, fsdp=False)
  assert resident["stack_0"]["layer_1"]["moe"]["gate_up"].spec == P(
      "stage", "expert", None, "tensor")


def test_quantized_experts_stay_whole_matrices():
  config = jaxlm.preset("gpt-oss-20b")
  params = jax.eval_shape(functools.partial(per_layer, config),
                          abstract_params(config))
  moe = params["layers"]["3"]["moe"]
  kind = FORMATS["mxfp4"]
  moe["down"] = kind(*(jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in
                       zip(kind.part_shapes(moe["down"].shape),
                           kind.PARTS.values())))
  found = shardings(config, params, make_mesh({"expert": 4, "tensor": 2}),
                    fsdp=False)["layers"]["3"]["moe"]
  for x in (found["down"].blocks, found["down"].scales, found["down_bias"]):
    assert x.spec[0] == ("expert", "tensor") and not any(x.spec[1:])


def test_without_a_mesh_nothing_is_split():
  x = jax.numpy.ones((3, 5))
  assert mesh_lib.current() is None and mesh_lib.axis_size("data") == 1
  assert mesh_lib.shard(x, "batch", None) is x
