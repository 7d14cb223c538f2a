"""Each family against transformers' own model with the same random weights."""
import dataclasses
import functools

import pytest

import jaxlm
import reference_models
from quick import quick_jit

# Both sides are within 1e-5 of float64.
TOLERANCE = 3e-5


def difference(name, config, execution=jaxlm.Execution()) -> float:
  """Between our logits, under this config, and those of transformers."""
  case = reference_models.case(name)
  ours = quick_jit(functools.partial(
      reference_models.our_logits, config, execution=execution))(
          case.params, case.tokens_BT)
  return reference_models.relative_difference(ours, case.logits_BTV)


@pytest.mark.parametrize("name", reference_models.CASES)
def test_logits_equal_those_of_transformers(name, record_testsuite_property):
  config = reference_models.case(name).config
  relative = difference(name, config)
  record_testsuite_property(name, f"{relative:.1e}")
  assert relative <= TOLERANCE


def attention(**fields):
  return lambda config: dataclasses.replace(
      config, attention=dataclasses.replace(config.attention, **fields))


def rope(**fields):
  """Changes the rotary positions of the full layers."""
  return lambda config: attention(rope_full=dataclasses.replace(
      config.attention.rope_full, **fields))(config)


def yarn(**fields):
  """Changes YaRN on the layers of both kinds."""
  def change(config):
    old = config.attention.rope_full
    new = dataclasses.replace(
        old, scaling=dataclasses.replace(old.scaling, **fields))
    return attention(rope_full=new, rope_sliding=new)(config)
  return change


def moe(**fields):
  return lambda config: dataclasses.replace(
      config, moe=dataclasses.replace(config.moe, **fields))


def expert(**fields):
  return lambda config: moe(expert=dataclasses.replace(
      config.moe.expert, **fields))(config)


def router(**fields):
  return lambda config: moe(router=dataclasses.replace(
      config.moe.router, **fields))(config)


def model(**fields):
  return lambda config: dataclasses.replace(config, **fields)


def norm(**fields):
  return lambda config: model(norm=dataclasses.replace(
      config.norm, **fields))(config)


def latent_rope(scaling=None, **fields):
  """Changes the rotary positions of latent attention."""
  def change(config):
    old = config.attention.rope
    if scaling:
      fields["scaling"] = dataclasses.replace(old.scaling, **scaling)
    return attention(rope=dataclasses.replace(old, **fields))(config)
  return change


def swap_rope(config):
  old = config.attention
  return attention(rope_full=old.rope_sliding,
                   rope_sliding=old.rope_full)(config)


# What a port gets wrong, each of which must show.
MISTAKES = {
    "gpt_oss": {
        "window 127": attention(sliding_window=127),
        "window 129": attention(sliding_window=129),
        "full layers first": model(layer_pattern=("full", "sliding")),
        "no sinks": attention(sinks=False),
        "YaRN truncated": yarn(truncate=True),
        "gate before up": expert(interleaved=False),
        "clamp at 6.5": expert(swiglu_limit=6.5),
        "no bias in experts": expert(bias=False),
        "no router bias": router(bias=False),
        "softmax over all experts": router(kind="softmax_topk"),
        "norm eps": norm(eps=1e-6),
    },
    "llama": {"no scaling": rope(scaling=None)},
    "qwen2": {"no bias on q": attention(biases=("k", "v"))},
    "qwen3_untied": {"no QK-norm": attention(qk_norm=False)},
    "qwen3_moe": {"not renormalised": router(renormalize=False)},
    "gemma2": {
        "window 38": attention(sliding_window=38),
        "no cap on scores": attention(soft_cap=None),
        "no cap on logits": model(final_soft_cap=None),
        "scale of the head": attention(scale=None),
        "norm scale without 1": norm(scale_offset=0.0),
    },
    "gemma3": {
        "window 18": attention(sliding_window=18),
        "rope swapped": swap_rope,
        "positions not scaled": rope(scaling=None),
    },
    "deepseek_v3": {
        "halves rotated": latent_rope(interleaved=False),
        "YaRN not truncated": latent_rope(dict(truncate=False)),
        "cos and sin not scaled": latent_rope(dict(mscale=1.3)),
        "no mscale at all": latent_rope(dict(mscale=0.0, mscale_all_dim=0.0)),
        "norm eps of latents": attention(norm_eps=0.1),
        "no groups": router(num_groups=1, groups_per_token=1),
        "one group": router(num_groups=3, groups_per_token=1),
        "not renormalised": router(renormalize=False),
        "not scaled": router(weight_scale=1.0),
        "softmax": router(kind="softmax_topk"),
        "chosen without the bias": router(balance_bias=False),
        "no shared expert": moe(shared=None),
    },
    "gpt2": {
        "exact GELU": lambda config: model(mlp=dataclasses.replace(
            config.mlp, activation="gelu"))(config),
        "RMSNorm": norm(kind="rmsnorm"),
    },
}


@pytest.mark.parametrize("name,mistake", [
    (name, mistake) for name in MISTAKES for mistake in MISTAKES[name]])
def test_a_mistake_is_seen(name, mistake):
  """The comparison can fail: each mistake is far above the tolerance."""
  config = MISTAKES[name][mistake](reference_models.case(name).config)
  execution = jaxlm.Execution(
      attention="reference", experts="ragged" if config.moe else "auto")
  # The two forms of GELU differ by 5e-4 at most, the logits by less.
  least = TOLERANCE if mistake == "exact GELU" else 1e-2
  assert difference(name, config, execution) > 3 * least
