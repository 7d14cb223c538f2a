"""Fill-in-the-middle (Bavarian et al. 2022, 2207.14255), prefix-suffix-middle.

Some documents are cut in three and stored as
`<prefix> prefix <suffix> suffix <middle> middle`, so that a left-to-right
model learns to infill. DeepSeek-V3 does this to 10 % of documents (2412.19437,
section 4.1).
"""

from collections.abc import Iterable, Iterator

import numpy as np

from jaxlm.data.byte_tokenizer import FimTokens


def fill_in_the_middle(
    tokens: np.ndarray, fim: FimTokens, rng: np.random.Generator
) -> np.ndarray:
  """Rearranges one document at two uniformly drawn cuts: [n] -> [n + 3]."""
  first, second = np.sort(rng.integers(0, len(tokens) + 1, size=2))
  prefix, middle, suffix = np.split(tokens, [first, second])
  parts = ([fim.prefix], prefix, [fim.suffix], suffix, [fim.middle], middle)
  return np.concatenate(parts).astype(tokens.dtype)


def apply_fim(
    documents: Iterable[np.ndarray],
    fim: FimTokens | None,
    rate: float = 0.1,
    seed: int = 0,
) -> Iterator[np.ndarray]:
  """Rearranges each document with probability `rate`.

  What happens to a document depends on `seed` and its index alone.
  """
  if not 0 <= rate <= 1:
    raise ValueError(f"fim_rate={rate} must lie between 0 and 1")
  if rate and fim is None:
    raise ValueError(
        f"fim_rate={rate}, but the tokenizer has no fill-in-the-middle "
        "tokens: use fim_rate=0 or the tokenizer 'bytes' or 'bpe:VOCAB'"
    )
  for index, tokens in enumerate(documents):
    rng = np.random.default_rng([seed, index])
    if fim is not None and rng.random() < rate:
      tokens = fill_in_the_middle(tokens, fim, rng)
    yield tokens
