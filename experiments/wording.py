"""Numbers and findings in words, the same for every form of the report."""

import math

import numpy as np

from experiments import scaling
from experiments import statistics
from experiments import verdicts
from experiments.claims import METRICS
from experiments.verdicts import AGREES, CANNOT_TELL, DISAGREES


def signed(value: float, spec: str = ".4f") -> str:
  """With a real minus sign."""
  return format(value, spec).replace("-", "\u2212")


def number(value: float) -> str:
  """Three digits and a unit from ten thousand on: 3.21 M, 45.6 k, 789."""
  if 100 <= abs(value) < 1e4:
    return f"{value:,.0f}"
  return _scaled(value, (
      ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3), ("", 1)))


def size(value: float) -> str:
  return _scaled(value, (
      ("GiB", 2 ** 30), ("MiB", 2 ** 20), ("KiB", 2 ** 10), ("B", 1)))


def percent(fraction: float) -> str:
  if fraction == 0:
    return "exactly"
  return f"{100 * fraction:{'.2g' if fraction < 0.1 else '.0f'}} %"


def interval(low: float, high: float) -> str:
  return f"[{signed(low)}, {signed(high)}]"


def difference(comparison) -> str:
  """The difference or ratio with its interval, or the reason for none."""
  found = comparison.difference
  if found is None:
    return comparison.missing
  metric = METRICS[comparison.metric]
  if metric.ratio:
    text = f"{math.exp(found.mean):#.3g}\u00d7"
    bounds = (f"[{math.exp(found.low):#.3g}, {math.exp(found.high):#.3g}]"
              if found.low is not None else "")
  else:
    text = f"{signed(found.mean, '+.4f')} {metric.unit}".strip()
    bounds = interval(found.low, found.high) if found.low is not None else ""
  return f"{text} {bounds}".strip()


def finding(comparison) -> str:
  """What one comparison of a claim measured, in one line."""
  metric = METRICS[comparison.metric]
  text = (f"{metric.label}, {comparison.a} against {comparison.b}: "
          f"{difference(comparison)}")
  found = comparison.difference
  if found is None:
    return text
  if metric.source == "exact":
    return f"{text} (counted, so no interval)"
  if found.low is None:
    return f"{text} ({found.note})"
  text += f" (Holm {_p(comparison.holm)}"
  if effect := smallest_effect(comparison):
    text += f"; smallest effect {found.n} seeds could have seen: {effect}"
  return text + ")"


def smallest_effect(comparison) -> str:
  """With its unit; empty where nothing is known of the spread."""
  found, metric = comparison.difference, METRICS[comparison.metric]
  if found is None or found.smallest_effect is None:
    return ""
  if metric.ratio:
    return f"{math.exp(found.smallest_effect):#.3g}\u00d7"
  return f"{found.smallest_effect:.2g} {metric.unit}".strip()


def answer(results, analysis) -> str:
  """What the question's answer is, in one or two plain sentences."""
  baseline, count = results.ablation.baseline, len(analysis.seeds)
  compared = {
      arm: comparison.difference
      for arm, comparison in analysis.against_baseline.items()
      if comparison.difference}
  if not compared:
    return ("Nothing can be said yet: no arm and the baseline "
            f"{baseline} have finished a seed in common.")
  if count == 1:
    arm, found = min(compared.items(), key=lambda item: item[1].mean)
    first = (f"{arm} had the lowest held-out loss, {-found.mean:.4f} "
             f"nats/token below the baseline {baseline}" if found.mean < 0 else
             f"No arm had a lower held-out loss than the baseline {baseline}")
    return (f"{first}; but this is one seed, which cannot tell a difference "
            "from chance. Run several seeds for an answer.")
  better, worse, open_ = (
      [arm for arm, found in compared.items() if found.direction == direction]
      for direction in (-1, 1, 0))
  detectable = [
      compared[arm].smallest_effect for arm in open_
      if compared[arm].smallest_effect is not None]
  limit = (f" the smallest effect that {count} seeds could have seen is "
           f"{_range(detectable)} nats/token" if detectable else "")
  if not better and not worse:
    return (f"No difference in held-out loss to the baseline {baseline} could "
            f"be seen" + (f":{limit}." if limit else "."))
  parts = [
      f"clearly {word} for {_listed(arms, compared)}"
      for word, arms in (("lower", better), ("higher", worse)) if arms]
  text = (f"With {count} seeds, held-out loss was {' and '.join(parts)} than "
          f"for the baseline {baseline}.")
  if open_:
    text += (f" For {_joined(open_)} no difference could be seen"
             + (f":{limit}." if limit else "."))
  return text


def trend(results, analysis) -> str:
  """What was fitted, in a sentence; empty if nothing was to be."""
  law = results.ablation.trend
  return scaling.describe(law, analysis.fit) if law else ""


def side_answer(results, analysis) -> str:
  """Speed, memory and the count of verdicts, in a few plain sentences."""
  sentences = [
      sentence for sentence in (
          _extreme(results, analysis, "tokens_per_second",
                   "trained fastest", "tokens/s"),
          _extreme(results, analysis, "decode_tokens_per_second",
                   "decoded fastest", "tokens/s"),
          _extreme(results, analysis, "peak_memory_bytes",
                   "needed least memory for a training step", "peak"))
      if sentence]
  if analysis.verdicts:
    counts = [
        (word, sum(v.verdict == word for v in analysis.verdicts))
        for word in (AGREES, DISAGREES, CANNOT_TELL)]
    total = len(analysis.verdicts)
    said = {AGREES: ("agrees", "agree"), DISAGREES: ("disagrees", "disagree"),
            CANNOT_TELL: (CANNOT_TELL,) * 2}
    sentences.append(
        f"Of {total} published claim{'s' if total > 1 else ''}, "
        + _joined([f"{n} {said[word][n != 1]}" for word, n in counts if n])
        + ".")
  return " ".join(sentences)


def methods(results, analysis) -> list[tuple[str, str]]:
  """(heading, text) of everything needed to judge or repeat the ablation."""
  ablation = results.ablation
  def pairs(values):
    return ", ".join(f"{key} {value}" for key, value in values.items())
  level = 100 * (1 - (1 - statistics.CONFIDENCE) / max(analysis.family, 1))
  return [
      ("Seeds and pairs", (
          f"Seeds {', '.join(map(str, analysis.seeds)) or 'none'}. For one "
          "seed all arms see the same data in the same order, so differences "
          "are taken seed by seed; their spread gives the interval (Student's "
          "t, one degree of freedom fewer than seeds).")),
      ("Correction", (
          f"{analysis.family} comparisons share the 5 % chance of an error: "
          "every arm's held-out loss against the baseline's, and every other "
          "pair that a claim needs, fixed before the first run. Intervals are "
          f"Bonferroni's: {level:.4g} % each, 95 % for all at once; verdicts "
          "follow them. p-values are adjusted by Holm's rule, the less strict "
          "of the two. The smallest effect is the true difference that such "
          "an interval would tell from zero with a chance of 80 %, given the "
          "spread seen.")),
      ("Speed and memory", (
          "Training speed is the median over a run's steps, compilation "
          "excluded, compared seed by seed as a ratio. Prefill and decode "
          "(one stream) are repeated timings in one process, compared as a "
          "ratio by Welch's t, which covers the noise of timing and not that "
          "of another process or machine. Peak memory (of a training step) and "
          "KV bytes are counted, not sampled, and compared as they are.")),
      ("Learning rate", ablation.learning_rate_rule),
      ("Data", ablation.data),
      ("Training", f"{ablation.budget} budget: {pairs(ablation.train)}."),
      ("Versions", f"{pairs(ablation.versions)}."),
      ("Hardware", f"{pairs(ablation.hardware)}."),
  ]


def typical(results, arm, metric, seeds) -> float | None:
  """The median of repeats, else the mean; None where nothing was measured."""
  found = verdicts.values(results, arm, metric, seeds)
  if not found:
    return None
  source = METRICS[metric].source
  return float(np.median(found) if source == "repeats" else np.mean(found))


def _extreme(results, analysis, metric, said, of):
  found = {
      arm: value for arm in results.runs
      if (value := typical(results, arm, metric, analysis.seeds))}
  baseline = results.ablation.baseline
  if baseline not in found or len(set(found.values())) < 2:
    return ""
  best = (min if METRICS[metric].lower_is_better else max)(
      found, key=found.get)
  if best == baseline or found[best] == found[baseline]:
    return f"{baseline}, the baseline, {said}."
  return (f"{best} {said} ({found[best] / found[baseline]:#.3g}\u00d7 the "
          f"baseline's {of}).")


def _scaled(value, units):
  for unit, scale in units:
    if abs(value) >= 0.9995 * scale or scale == 1:
      scaled = value / scale
      digits = f"{scaled:.0f}" if abs(scaled) >= 99.95 else f"{scaled:#.3g}"
      return f"{digits} {unit}".strip()


def _p(value: float) -> str:
  return f"p\u00a0=\u00a0{value:.2g}" if value >= 0.001 else (
      "p\u00a0<\u00a00.001")


def _range(values) -> str:
  low, high = f"{min(values):.2g}", f"{max(values):.2g}"
  return low if low == high else f"{low} to {high}"


def _joined(words) -> str:
  words = list(words)
  if len(words) < 2:
    return "".join(words)
  return f"{', '.join(words[:-1])} and {words[-1]}"


def _listed(arms, compared) -> str:
  return _joined(
      f"{arm} ({signed(compared[arm].mean, '+.4f')} nats/token)"
      for arm in arms)
