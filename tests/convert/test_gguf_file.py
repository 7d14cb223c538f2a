"""GGUF's block types, and files that are damaged."""
import functools
import struct
import tracemalloc

import gguf
import numpy as np
import pytest
import torch
from transformers.integrations.gguf.dequant import GGML_BLOCK, dequantize

from gguf_files import finish, small_model, write_model
from jaxlm.convert import gguf as gguf_format, gguf_file
from jaxlm.convert.checkpoint import leaf_shapes
from jaxlm.convert.gguf_file import read_file
from pallas_kernels.quant import MXFP4

Kind = gguf.GGMLQuantizationType
# Where a block has float16, which must not be infinite or NaN.
HALVES = {Kind.Q4_0: [0], Kind.Q4_1: [0, 2], Kind.Q8_0: [0],
          Kind.Q2_K: [80, 82], Kind.Q3_K: [108], Kind.Q4_K: [0, 2],
          Kind.Q5_K: [0, 2], Kind.Q6_K: [208], Kind.IQ4_NL: [0],
          Kind.IQ4_XS: [0]}


def write(path, **tensors):
  """A file of (bytes as an array, type)."""
  writer = gguf.GGUFWriter(path, "llama")
  for name, (array, kind) in tensors.items():
    writer.add_tensor(name, array, raw_dtype=kind)
  finish(writer)
  return path


@pytest.mark.parametrize("kind", HALVES, ids=lambda kind: kind.name)
def test_blocks_are_dequantized_as_transformers_does(kind, tmp_path,
                                                     monkeypatch):
  monkeypatch.setattr(gguf_file, "_CHUNK", 1000)  # several in each tensor
  rng = np.random.default_rng(0)
  size, nbytes = GGML_BLOCK[kind]
  blocks = rng.integers(0, 256, (3, 5, 2, nbytes), np.uint8)
  for at in HALVES[kind]:
    half = rng.normal(size=blocks.shape[:-1]).astype(np.float16)
    blocks[..., at:at + 2] = half[..., None].view(np.uint8)
  path = write(tmp_path / "x.gguf", x=(blocks.reshape(3, 5, -1), kind))
  tensor = read_file(path).tensors["x"]
  expected = dequantize(torch.tensor(blocks), kind).numpy()
  assert tensor.shape == (3, 5, 2 * size) and tensor.dtype == np.float32
  np.testing.assert_allclose(tensor.read().reshape(-1), expected, rtol=1e-6,
                             atol=1e-5)


@pytest.mark.parametrize("kind", [Kind.Q5_0, Kind.Q5_1, Kind.Q8_0],
                         ids=lambda kind: kind.name)
def test_what_was_quantized_comes_back_within_a_step(kind, tmp_path):
  x = np.random.default_rng(1).normal(size=(7, 96)).astype(np.float32)
  path = write(tmp_path / "x.gguf", x=(gguf.quantize(x, kind), kind))
  step = np.abs(x).max() / (127 if kind == Kind.Q8_0 else 15)
  assert np.abs(read_file(path).tensors["x"].read() - x).max() < step


def test_floats_are_read_as_they_are(tmp_path, monkeypatch):
  monkeypatch.setattr(gguf_file, "_CHUNK", 100)
  x = np.random.default_rng(2).normal(size=(2, 3, 45)).astype(np.float32)
  path = write(tmp_path / "x.gguf", a=(x, None), b=(x.astype(np.float16), None),
               c=(gguf.quantize(x, Kind.BF16), Kind.BF16))
  tensors = read_file(path).tensors
  for name, dtype in (("a", "float32"), ("b", "float16"), ("c", "bfloat16")):
    array = tensors[name].read()
    assert array.dtype == tensors[name].dtype == dtype
    np.testing.assert_array_equal(array, x.astype(array.dtype))


def test_mxfp4_of_the_package_is_ours(tmp_path, monkeypatch):
  monkeypatch.setattr(gguf_file, "_CHUNK", 100)
  rng = np.random.default_rng(3)
  blocks = rng.integers(0, 256, (4, 7, 3, 17), np.uint8)
  blocks[..., 0] %= 253
  path = write(tmp_path / "x.gguf", x=(blocks.reshape(4, 7, -1), Kind.MXFP4))
  file = read_file(path)
  leaf = MXFP4(*(tensor.read() for tensor in file.packed["x"]))
  expected = gguf.dequantize(blocks.reshape(4, 7, -1), Kind.MXFP4)
  ours = leaf.dequantize("float32").swapaxes(1, 2)
  big = blocks[..., 0].repeat(32, -1).reshape(ours.shape) > 2
  np.testing.assert_array_equal(ours[big], expected[big])
  np.testing.assert_array_equal(file.tensors["x"].read().astype(np.float32),
                                ours)
  assert [t.shape for t in file.packed["x"]] == [(4, 7, 3, 16), (4, 7, 3)]


def test_reading_takes_the_result_and_little_more(tmp_path):
  x = np.zeros((1000, 8192), np.float32)
  path = write(tmp_path / "x.gguf", x=(gguf.quantize(x, Kind.Q8_0), Kind.Q8_0))
  tensor = read_file(path).tensors["x"]
  tracemalloc.start()
  try:
    array = tensor.read()
    peak = tracemalloc.get_traced_memory()[1]
  finally:
    tracemalloc.stop()
  assert peak < array.nbytes + 40e6


def header(*parts) -> bytes:
  return b"GGUF" + b"".join(
      part if isinstance(part, bytes) else struct.pack("<Q", part)
      for part in parts)


V3 = struct.pack("<I", 3)
NAME = struct.pack("<Q", 1) + b"x"


def tensor(dims, kind=0, offset=0, name=NAME) -> bytes:
  return (name + struct.pack(f"<I{len(dims)}Q", len(dims), *dims)
          + struct.pack("<IQ", kind, offset))


@pytest.mark.parametrize("content, message", [
    (b"", "4 bytes from byte 0 of 0"),
    (b"GGML" + bytes(99), "does not begin with GGUF"),
    (header(struct.pack(">I", 3), bytes(99)), "only 2 and 3 .little-endian"),
    (header(struct.pack("<I", 1), bytes(99)), "version 1 is not supported"),
    (header(V3, 2 ** 63, 0), "9223372036854775808 tensors from byte 24"),
    (header(V3, 0, 2 ** 63), "9223372036854775808 values from byte 24"),
    (header(V3, 0, 1, 2 ** 62, bytes(99)), "4611686018427387904 bytes of text"),
    (header(V3, 0, 1, NAME, struct.pack("<I", 13), bytes(9)),
     "unknown type 13"),
    (header(V3, 0, 1, NAME, struct.pack("<IIQ", 9, 8, 2 ** 60)),
     "1152921504606846976 texts"),
    (header(V3, 0, 1, NAME, struct.pack("<IIQ", 9, 6, 2 ** 61)),
     "2305843009213693952 numbers"),
    (header(V3, 0, 1, NAME, struct.pack("<IIQ", 9, 9, 1), bytes(9)),
     "an array of type 9"),
    (header(V3, 0, 1, struct.pack("<Q", 1) + b"\xff", bytes(99)), "utf-8"),
    (header(V3, 0, 2, 2 * (NAME + struct.pack("<II", 4, 7))), "'x' occurs"),
    (header(V3, 1, 0, tensor([]), bytes(9)), "0 axes"),
    (header(V3, 1, 0, tensor([1] * 5)), "5 axes"),
    (header(V3, 1, 0, tensor([3, 0])), "is empty"),
    (header(V3, 1, 0, tensor([2 ** 63, 2 ** 63])), "'x' ends at byte 3402823"),
    (header(V3, 1, 0, tensor([8], offset=2 ** 63)), "'x' ends at byte 9223"),
    (header(V3, 1, 0, tensor([8]), bytes(30)), "'x' ends at byte 96 of"),
    (header(V3, 1, 0, tensor([32], 99)), "type 99 .unknown."),
    (header(V3, 1, 0, tensor([32], 24)), "type 24 .I8."),
    (header(V3, 1, 0, tensor([33], 8), bytes(99)), "rows of 33, but Q8_0"),
    (header(V3, 2, 0, 2 * tensor([1]), bytes(99)), "'x' occurs twice"),
])
def test_impossible_headers_are_refused(content, message, tmp_path):
  path = tmp_path / "x.gguf"
  path.write_bytes(content)
  with pytest.raises(ValueError, match=f"x.gguf is no readable.*{message}"):
    read_file(path)


def test_a_file_cut_short_after_it_was_opened_is_named(tmp_path):
  path = write(tmp_path / "x.gguf", x=(np.zeros((9, 9), np.float32), None))
  tensor = read_file(path).tensors["x"]
  path.write_bytes(path.read_bytes()[:-40])
  with pytest.raises(ValueError, match="was cut short"):
    tensor.read()


def test_a_part_of_a_model_is_refused(tmp_path):
  path = tmp_path / "x.gguf"
  writer = gguf.GGUFWriter(path, "llama")
  writer.add_uint16("split.count", 3)
  finish(writer)
  with pytest.raises(ValueError, match="llama-gguf-split --merge"):
    gguf_format.read(path)


def add_tokenizer(writer):
  letters = [chr(97 + i) for i in range(26)]
  pairs = [a + b for a in "abcdefg" for b in "hijklmnopq"]
  writer.kv_data[0].pop("tokenizer.ggml.model")
  writer.add_tokenizer_model("gpt2")
  writer.add_tokenizer_pre("qwen2")
  writer.add_token_list(["<|end|>", *letters, *pairs])
  writer.add_token_types([3] + [1] * 96)
  writer.add_token_merges([f"{a} {b}" for a, b in pairs])
  writer.add_eos_token_id(0)


def damages(content: bytes, end: int, rng):
  """One damaged copy after another: bytes changed, cut out, put in."""
  while True:
    data = bytearray(content)
    at = int(rng.integers(0, end))
    match rng.integers(6):
      case 0:
        data = data[:rng.integers(0, len(data))]
      case 1:
        del data[at:at + int(rng.integers(1, 20))]
      case 2:
        data[at:at] = rng.bytes(int(rng.integers(1, 20)))
      case 3:
        data[at] = int(rng.integers(256))
      case 4:
        data[at] ^= 1 << int(rng.integers(8))
      case 5:
        size = int(rng.choice([4, 8]))
        number = (0, 1, 2 ** 31, 2 ** 32 - 1, 2 ** 63, 2 ** 64 - 1)[
            rng.integers(6)]
        data[at:at + size] = struct.pack("<Q", number)[:size]
    yield bytes(data)


@pytest.mark.parametrize("case", ["llama", "gpt_oss"])
@pytest.mark.filterwarnings("ignore:.*tokenizer is left out")
def test_damaged_files_give_clean_errors_only(case, tmp_path, monkeypatch):
  shapes = functools.cache(lambda config, quantized: leaf_shapes(
      config, dict(quantized)))  # takes longer than all the rest
  monkeypatch.setattr(
      gguf_format, "leaf_shapes",
      lambda config, quantized: shapes(config, tuple(quantized.items())))
  path = tmp_path / "model.gguf"
  changes = dict(num_hidden_layers=1)
  if case == "gpt_oss":
    changes |= dict(hidden_size=64, intermediate_size=32,
                    layer_types=["sliding_attention"])
  write_model(path, small_model(case, **changes),
              lambda name, array: (Kind.MXFP4 if "exps.weight" in name
                                   else None), add_tokenizer)
  content, refused, read = path.read_bytes(), 0, 0
  end = gguf.GGUFReader(path).data_offset  # of the header
  source = damages(content, end, np.random.default_rng(4))
  for _, data in zip(range(2000), source):
    path.write_bytes(data)
    try:
      for tensor in gguf_format.read(path).tensors.values():
        tensor.read()
      read += 1
    except (ValueError, NotImplementedError) as error:
      assert str(error)
      refused += 1
  assert refused > 500 and read > 20
