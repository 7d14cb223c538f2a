"""A model in memory: loaded, asked, saved."""
import dataclasses
import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers

from jaxlm.config import ModelConfig
from jaxlm.convert import formats
from jaxlm.convert.checkpoint import Checkpoint, leaf_shapes, named_leaves
from jaxlm.convert.tensors import cast, check, of_array
from jaxlm.data.tokenizers import HuggingFaceTokenizer
from jaxlm.decode import Sampling, generate
from jaxlm.decode.generate import check_tokens
from jaxlm.model.transformer import (Execution, forward, logits, per_layer)
from jaxlm.parallel import mesh
from jaxlm.parallel.params import leaf_shardings, place
from jaxlm.relayout import relayout, relayout_leaf
from pallas_kernels.platforms import platform
from pallas_kernels.quant import quantized_leaves


@dataclasses.dataclass(frozen=True, eq=False)
class LM:
  """A config with its parameters.

  A convenience around pure functions, such as jaxlm.forward(config, params,
  tokens_BT). `about` and `files` travel from one checkpoint to the next (see
  `jaxlm.convert.checkpoint`).
  """
  config: ModelConfig
  params: dict = dataclasses.field(repr=False)
  about: dict = dataclasses.field(default_factory=dict)
  files: dict[str, bytes] = dataclasses.field(default_factory=dict, repr=False)

  @functools.cached_property
  def tokenizer(self) -> HuggingFaceTokenizer | None:
    """The checkpoint's own, if it came with a tokenizer.json.

    Raises:
      ValueError: the file is damaged.
    """
    if "tokenizer.json" not in self.files:
      return None
    try:
      tokenizer = tokenizers.Tokenizer.from_buffer(self.files["tokenizer.json"])
    except Exception as error:  # tokenizers raises no other
      raise ValueError(f"the checkpoint's tokenizer cannot be read: {error}"
                       ) from error
    return HuggingFaceTokenizer(
        tokenizer, end_of_document=self.tokenizer_settings.get("eos_token"),
        where="tokenizer.json")

  @functools.cached_property
  def tokenizer_settings(self) -> dict:
    """tokenizer_config.json, special tokens by their text."""
    settings = self._json("tokenizer_config.json")
    return {name: value["content"] if isinstance(value, dict)
            and "content" in value else value
            for name, value in settings.items()}

  @property
  def stop_tokens(self) -> tuple[int, ...]:
    """After which a text is over, of all that the checkpoint names."""
    found = [values.get("eos_token_id") for values in (
        self.about, self._json("generation_config.json"))]
    if self.tokenizer is not None:
      found.append(self.tokenizer.end_of_document)
    return tuple({token: None for tokens in found if tokens is not None
                  for token in (tokens if isinstance(tokens, list)
                                else [tokens])})

  def _json(self, name: str) -> dict:
    try:
      values = json.loads(self.files.get(name, b"{}"))
    except ValueError as error:
      raise ValueError(f"the checkpoint's {name} cannot be read: {error}"
                       ) from error
    return values if isinstance(values, dict) else {}

  @property
  def execution(self) -> Execution:
    """In the parameters' own precision, layer by layer."""
    return Execution(dtype=str(self.params["embed"]["embedding"].dtype),
                     scan_layers=False, fsdp=False)

  def logits(self, tokens_BT) -> jax.Array:
    """What may follow each token: [B, T] integers to [B, T, V] float32.

    Raises:
      ValueError: a token is not in the vocabulary, or there are too many.
    """
    tokens_BT = np.asarray(tokens_BT)
    check_tokens(self.config, tokens_BT)
    return _logits(self.config, self.params, tokens_BT.astype(np.int32),
                   self.execution)

  def generate(self, tokens_BT, max_new_tokens: int = 64,
               temperature: float = 0.0, top_k: int | None = None,
               top_p: float | None = None, min_p: float | None = None,
               repetition_penalty: float | None = None, **options):
    """Continues prompts: see jaxlm.decode's generate and Sampling.

    Returns:
      int32 [B, max_new_tokens].
    """
    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty)
    return generate(self.config, self.params, tokens_BT,
                    max_new_tokens=max_new_tokens, sampling=sampling,
                    execution=self.execution, **options)


@functools.partial(jax.jit, static_argnums=(0, 3))
def _logits(config, params, tokens_BT, execution):
  hidden_BTD = forward(config, params, tokens_BT,
                       execution=execution).hidden_BTD
  return logits(config, params, hidden_BTD, execution.fsdp)


def load(path, dtype: str | None = "bfloat16") -> LM:
  """Loads a checkpoint: Hugging Face's or OpenAI's layout, GGUF, jaxlm's own,
  or the newest of a training run.

  Under `jax.set_mesh` it lies split over the mesh, one leaf at a time in the
  host's memory (of a training run all of them).

  Args:
    path: of its directory, of a GGUF file, or of a training run's workdir.
    dtype: "bfloat16", "float32", "float16", or None: as it is stored. Packed
      experts stay packed, laid out for the default device (`relayout`).

  Raises:
    ValueError: it is none, or damaged, or does not fit its config.
    NotImplementedError: its config asks for what is not supported.
  """
  checkpoint = formats.read(path)
  tensors = cast(checkpoint.tensors, dtype)
  kinds, params = quantized_leaves(tensors), {}
  for path in leaf_shapes(checkpoint.config):
    *parents, name = path.split("/")
    leaf = (_quantized(checkpoint.config, path, tensors, kinds[path])
            if path in kinds else tensors[path].read())
    node = params
    for parent in parents:
      node = node.setdefault(parent, {})
    if mesh.current() is None:
      node[name] = jax.tree.map(jnp.asarray, leaf)
    else:
      quantized = any(kind.startswith(path.rpartition("/")[0] + "/")
                      for kind in kinds)
      node[name] = place(leaf, leaf_shardings(
          checkpoint.config, path, leaf, jax.sharding.get_mesh(), False,
          quantized))
  return LM(checkpoint.config, params, checkpoint.about, checkpoint.files)


def _quantized(config, path: str, tensors, kind):
  """A quantized leaf, on the host, laid out for where it will run."""
  leaf = kind(**{part: tensors[f"{path}/{part}"].read()
                 for part in kind.PARTS})
  return relayout_leaf(config, path.rpartition("/")[2], leaf, platform())


def save(lm: LM, path: str | pathlib.Path, format: str = "native") -> None:
  """Writes a model to a new directory, which appears whole or not at all.

  Args:
    format: "native", "hf" (Hugging Face) or "openai" (gpt-oss alone).

  Raises:
    ValueError: the parameters are not the config's, the format has no place
      for this model, or the path is taken or cannot be written.
  """
  published = relayout(lm.config, per_layer(lm.config, lm.params), "cpu")
  leaves = {name: of_array(leaf)
            for name, leaf in named_leaves(published).items()}
  shapes = leaf_shapes(lm.config, quantized_leaves(leaves))
  check("the parameters", shapes, leaves)
  formats.write(Checkpoint(lm.config, {name: leaves[name] for name in shapes},
                           lm.about, lm.files), path, format)
