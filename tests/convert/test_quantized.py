"""Experts quantized on the way out, and models with them."""
import dataclasses
import functools

import jax
import numpy as np
import pytest

import jaxlm
from jaxlm import cli
from jaxlm.convert import formats
from jaxlm.convert.quantized import dequantize_experts, quantize_experts
from jaxlm.lm import LM, load, save
from jaxlm.model import transformer
from jaxlm.model.transformer import Execution, forward
from pallas_kernels.quant import FORMATS, is_quantized, quantization_error
from quick import quick_jit


@pytest.fixture(scope="module")
def source(tmp_path_factory):
  """A small gpt-oss in bfloat16, as jaxlm writes it."""
  preset = jaxlm.preset("gpt-oss-20b")
  expert = dataclasses.replace(preset.moe.expert, d_ff=96)
  config = dataclasses.replace(
      preset, vocab_size=61, d_model=64, num_layers=2,
      attention=dataclasses.replace(preset.attention, num_heads=6,
                                    num_kv_heads=2, head_dim=10),
      moe=dataclasses.replace(preset.moe, num_experts=5, experts_per_token=2,
                              expert=expert))
  params = jax.tree.map(lambda x: x.astype("bfloat16"),
                        quick_jit(functools.partial(
                            jaxlm.init_params, config))(jax.random.key(0)))
  path = tmp_path_factory.mktemp("source") / "model"
  save(LM(config, params), path)
  return path


TOKENS = np.random.default_rng(0).integers(0, 61, (2, 33))


def test_simulated_mxfp4_is_what_the_quantized_model_computes(source,
                                                              tmp_path):
  formats.write(quantize_experts(formats.read(source), "mxfp4"),
                tmp_path / "packed")
  floats, packed = load(source, "float32"), load(tmp_path / "packed",
                                                 "float32")

  def logits(simulate, params):
    @quick_jit
    def run(params):
      output = forward(floats.config, params, TOKENS,
                       execution=Execution(simulate=simulate))
      return transformer.logits(floats.config, params, output.hidden_BTD)
    return run(params)

  simulated = logits("mxfp4_experts", floats.params)
  for params, low, high in ((packed.params, 0, 1e-5),
                            (floats.params, 1e-3, 1)):
    difference = simulated - logits("none", params)
    assert low <= np.linalg.norm(difference) / np.linalg.norm(
        simulated) < high


@pytest.mark.parametrize("kind", FORMATS)
def test_quantized_experts_are_kept_and_computed_with(kind, source, tmp_path):
  errors = {}
  checkpoint = quantize_experts(formats.read(source), kind, errors.__setitem__)
  formats.write(checkpoint, tmp_path / "out")
  before, lm = load(source, "float32"), load(tmp_path / "out", "float32")
  plain = jax.tree.map(lambda x: x.astype("float32"), lm.params,
                       is_leaf=is_quantized)
  assert len(errors) == 4
  for i in range(2):
    for name in ("gate_up", "down"):
      leaf = lm.params["layers"][str(i)]["moe"][name]
      w = np.asarray(before.params["layers"][str(i)]["moe"][name])
      assert isinstance(leaf, FORMATS[kind]) and leaf.shape == w.shape
      assert errors[f"layers/{i}/moe/{name}"] == quantization_error(w, leaf)
      again = FORMATS[kind].quantize(leaf.astype("float32"))
      jax.tree.map(np.testing.assert_array_equal, again, leaf)
  ours = lm.logits(TOKENS)
  expected = LM(lm.config, plain).logits(TOKENS)
  assert np.abs(ours - expected).max() < 1e-5 * np.abs(expected).max()
  # In the mean: a token that goes to another expert differs altogether.
  far = np.abs(ours - before.logits(TOKENS)).mean() / np.abs(ours).mean()
  assert 1e-4 < far < 0.5


def test_the_command_reports_the_errors(source, tmp_path, capsys):
  out = tmp_path / "out"
  assert cli.main(["convert", str(source), str(out), "--to", "hf",
                   "--quantize-experts", "mxfp4"]) == 0
  printed = capsys.readouterr().out
  assert printed.count("root mean square") == 4
  assert "layers/1/moe/down: error 1" in printed
  # Already quantized; and what came out is what went in.
  assert cli.main(["convert", str(out), str(tmp_path / "again"),
                   "--quantize-experts", "int8"]) == 1
  assert "is quantized already" in capsys.readouterr().err
  assert is_quantized(load(out).params["layers"]["1"]["moe"]["gate_up"])


@pytest.mark.parametrize("kind", FORMATS)
def test_dequantized_experts_are_what_was_computed_with(kind, source,
                                                        tmp_path):
  packed, floats = tmp_path / "packed", tmp_path / "floats"
  formats.write(quantize_experts(formats.read(source), kind), packed)
  assert cli.main(["convert", str(packed), str(floats), "--to", "hf",
                   "--dequantize-experts", "--dtype", "float32"]) == 0
  expected = jax.tree.map(lambda x: x.astype("float32"),
                          load(packed, "float32").params, is_leaf=is_quantized)
  jax.tree.map(np.testing.assert_array_equal, load(floats, "float32").params,
               expected)
  with pytest.raises(ValueError, match="no quantized experts"):
    dequantize_experts(formats.read(floats))


def test_what_cannot_be_quantized_is_named(source):
  checkpoint = formats.read(source)
  with pytest.raises(ValueError, match="'int4': use one of"):
    quantize_experts(checkpoint, "int4")
  dense = dataclasses.replace(
      checkpoint, tensors={path: tensor for path, tensor in
                           checkpoint.tensors.items() if "/moe/" not in path})
  with pytest.raises(ValueError, match="no experts to quantize"):
    quantize_experts(dense, "mxfp4")
  name = "layers/1/moe/down"
  odd = dataclasses.replace(checkpoint, tensors=checkpoint.tensors | {
      name: checkpoint.tensors[name]._replace(shape=(5, 95, 64))})
  with pytest.raises(ValueError, match=f"{name}: an array .5, 95, 64. cannot"):
    quantize_experts(odd, "mxfp4")
