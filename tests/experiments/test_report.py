"""The report of a synthetic ablation: its numbers, its honesty, its HTML."""

import dataclasses
import html.parser
import io
import json
import math
import re

import numpy as np
import pytest
import rich.console
from scipy import stats

from experiments import report
from experiments import results
from experiments import statistics
from experiments import verdicts
from experiments import wording
from experiments.claims import Claim

SEEDS = (0, 1, 2)
BASELINE = "depth-4"
# Held-out loss by arm and seed: the seeds move all arms together.
LOSSES = {
    "depth-2": (1.8412, 1.8527, 1.8365),
    "depth-4": (1.8021, 1.8148, 1.7979),
    "depth-8": (1.7702, 1.7822, 1.7655),
    "depth-16": (1.8003, 1.8191, 1.7932),
    "dense-8": (1.9105, 1.9230, 1.9066),
}
SPEEDS = {  # training tokens/s by seed
    "depth-2": (23510.0, 23790.0, 23620.0),
    "depth-4": (20980.0, 21240.0, 21120.0),
    "depth-8": (16220.0, 16410.0, 16330.0),
    "depth-16": (11050.0, 11210.0, 11080.0),
    "dense-8": (30330.0, 30810.0, 30600.0),
}
DIMENSIONS = {  # num_layers, d_model, num_experts, peak memory, KV bytes
    "depth-2": (2, 288, 32, 503316480, 1024),
    "depth-4": (4, 208, 32, 452984832, 2048),
    "depth-8": (8, 144, 32, 419430400, 4096),
    "depth-16": (16, 104, 32, 402653184, 8192),
    "dense-8": (8, 144, 0, 301989888, 4096),
}
CLAIMS = (
    Claim("Deeper is better at the same size", "Gemma 2, Table 9",
          "wide 50.8, deep 52.0 on 4 benchmarks", "less",
          ("depth-8", "depth-2"), "eval_loss",
          remark="Expect deep to be at least as good in loss."),
    Claim("A dense model is better than a mixture", "constructed",
          "the opposite", "less", ("dense-8", "depth-8"), "eval_loss"),
    Claim("Loss falls with every doubling of the depth", "constructed",
          "monotone", "monotone",
          ("depth-2", "depth-4", "depth-8", "depth-16"), "eval_loss"),
    Claim("Wide is faster to train", "constructed", "1.2 times", "greater",
          ("depth-2", "depth-16"), "tokens_per_second"),
    Claim("Wide decodes faster", "constructed", "1.5 times", "greater",
          ("depth-2", "depth-16"), "decode_tokens_per_second"),
    Claim("Wide needs more memory", "constructed", "none given", "greater",
          ("depth-2", "depth-16"), "peak_memory_bytes"),
    Claim("Width does not change the KV cache", "constructed", "none given",
          "equal", ("depth-2", "depth-16"), "kv_bytes_per_token", margin=0.05),
)


def make_ablation(**changes) -> results.Ablation:
  def arm(name, layers, width, experts, *_):
    total = 12_000_000 + 1000 * layers
    return results.Arm(
        name, f"{layers} layers of width {width}",
        {"total_params": total,
         "active_params": 4_100_000 + 500 * layers if experts else total,
         "flops_per_token": 25_000_000 + 9000 * layers, "num_layers": layers,
         "d_model": width, **({"num_experts": experts} if experts else {})},
        learning_rate=0.003 * 208 / width)
  mixtures = tuple(LOSSES)[:4]
  fields = dict(
      name="width_vs_depth", question="Wide or deep, at the same parameters?",
      budget="laptop", seeds=SEEDS, baseline=BASELINE,
      arms=[arm(name, *DIMENSIONS[name]) for name in LOSSES],
      held_equal=[
          results.Held("total_params", 12_008_000, 0.00067),
          results.Held("active_params", 4_104_000, 0.0012, arms=mixtures)],
      not_held=[results.Held("flops_per_token", 25_072_000, 0.0043,
                             "attention grows with depth")],
      learning_rate_rule="Scaled by 1/d_model from 0.003 at d_model 208.",
      data="python-stdlib, bytes, split by file <held out: 5 %>",
      train={"steps": 600, "batch_size": 8, "seq_len": 256,
             "tokens": 1_228_800, "optimizer": "adamw"},
      claims=CLAIMS,
      versions={"python": "3.11.2", "jax": "0.10.2", "commit": "0123abc"},
      hardware={"cpu": "Some CPU @ 2.1 GHz", "cores": 2},
      command="python -m experiments.main --config "
      "experiments/configs/width_vs_depth.py:laptop")
  return results.Ablation(**{**fields, **changes})


def write_run(workdir, arm, seed, **changes):
  rng = np.random.default_rng([seed, *arm.encode()])
  layers, _, experts, *_ = DIMENSIONS[arm]
  final = LOSSES[arm][seed]
  router = None
  if experts:
    load = rng.dirichlet(np.full(experts, 6.0), size=layers)
    router = results.Router(
        load.tolist(), (load.max(1) * experts - 1).tolist(),
        (-load * np.log(load)).sum(1).tolist(), 0.0)
  run = results.Run(final, final / math.log(2), SPEEDS[arm][seed], router)
  results.write(results.run_path(workdir, arm, seed),
                dataclasses.replace(run, **changes))
  lines = []
  for step in range(10, 601, 10):
    loss = final + 3.6 * math.exp(-step / 45) + 0.5 * (1 - step / 600)
    line = {"step": step, "loss": loss + 0.03 * rng.normal(),
            "tokens": step * 2048, "seconds": step / 10}
    if step % 50 == 0:
      line |= {"eval_loss": loss, "eval_bits_per_byte": loss / math.log(2)}
    lines.append(json.dumps(line) + "\n")
  results.metrics_path(workdir, arm, seed).write_text("".join(lines))


def write_all(workdir, ablation):
  results.write(results.ablation_path(workdir), ablation)
  for arm in ablation.arms:
    for seed in ablation.seeds:
      write_run(workdir, arm.name, seed)
    layers, _, _, memory, kv = DIMENSIONS[arm.name]
    results.write(results.speed_path(workdir, arm.name), results.Speed(
        prefill_tokens_per_second=[60000 / layers ** .5 + i for i in range(3)],
        decode_tokens_per_second=[900 / layers + i for i in (0, 1.5, 0.7)],
        peak_memory_bytes=memory, kv_bytes_per_token=kv))


@pytest.fixture(name="workdir")
def fixture_workdir(tmp_path):
  write_all(tmp_path, make_ablation())
  return tmp_path


@pytest.fixture(scope="module", name="complete")
def fixture_complete(tmp_path_factory):
  """(workdir, page, HTML, Markdown), to be read only."""
  workdir = tmp_path_factory.mktemp("complete")
  write_all(workdir, make_ablation())
  return workdir, *written(workdir)


class Page(html.parser.HTMLParser):
  """Checks that elements close in order; collects cells, links and ids."""
  VOID = {"meta", "br", "img", "link", "input", "hr"}

  def __init__(self, text):
    super().__init__()
    self.open, self.ids, self.links, self.tables = [], [], [], []
    self.tags, self.text = [], []
    self.feed(text)
    self.close()
    assert not self.open

  def handle_starttag(self, tag, attrs):
    self._attributes(tag, attrs)
    if tag not in self.VOID:
      self.open.append(tag)
    if tag == "table":
      self.tables.append([])
    elif tag == "tr":
      self.tables[-1].append([])
    elif tag in ("td", "th"):
      self.tables[-1][-1].append("")

  def handle_startendtag(self, tag, attrs):
    self._attributes(tag, attrs)

  def handle_endtag(self, tag):
    assert self.open and self.open.pop() == tag

  def handle_data(self, data):
    if self.open and self.open[-1] != "style":
      self.text.append(data)
    if {"td", "th"} & set(self.open):
      self.tables[-1][-1][-1] += data

  def _attributes(self, tag, attrs):
    self.tags.append(tag)
    for name, value in attrs:
      if name == "id":
        self.ids.append(value)
      elif name.split(":")[-1] in ("src", "href", "srcset", "data"):
        self.links.append(value)


def written(workdir):
  html_path, md_path = report.write_report(workdir)
  assert (html_path.name, md_path.name) == ("report.html", "report.md")
  text = html_path.read_text()
  return Page(text), text, md_path.read_text()


def printed(workdir):
  console = rich.console.Console(file=io.StringIO(), width=200)
  report.print_table(workdir, console)
  return console.file.getvalue()


def analysis_of(workdir):
  return verdicts.analyse(results.read_results(workdir))


def t_two_degrees(p):
  return (2 * p - 1) / math.sqrt(2 * p * (1 - p))


def difference_by_hand(a, b, comparisons):
  """Text of a paired difference of three seeds, from the textbook's formula."""
  pairs = [x - y for x, y in zip(a, b)]
  mean = sum(pairs) / 3
  variance = sum((pair - mean) ** 2 for pair in pairs) / 2
  half = t_two_degrees(1 - 0.025 / comparisons) * math.sqrt(variance / 3)
  text = f"{mean:+.4f} [{mean - half:.4f}, {mean + half:.4f}]"
  return text.replace("-", "\u2212")


def test_table_has_the_numbers_computed_by_hand(complete):
  workdir, page, _, markdown = complete
  terminal = printed(workdir)
  rows = {row[0].split()[0]: row[1:] for row in page.tables[0]}
  # Nine: four arms against the baseline, depth-8 and dense-8 against another
  # arm, the last step of the trend, and two ratios of speed. (The first two
  # steps of the trend are against the baseline; what is counted is not tested.)
  assert analysis_of(workdir).family == 9
  for arm, losses in LOSSES.items():
    mean = sum(losses) / 3
    half = t_two_degrees(0.975) * math.sqrt(
        sum((loss - mean) ** 2 for loss in losses) / 2 / 3)
    assert rows[arm][2] == f"{mean:.4f} \u00b1 {half:.4f}"
    expected = "baseline"
    if arm != BASELINE:
      expected = difference_by_hand(losses, LOSSES[BASELINE], 9)
    assert rows[arm][3] == expected
    assert expected in markdown and expected in terminal
    smallest = "\u2013"
    if arm != BASELINE:
      apart = np.subtract(losses, LOSSES[BASELINE])
      smallest = f"{statistics.smallest_effect(np.std(apart, ddof=1), 3, 9):.2g}"
    assert rows[arm][4] == smallest
    assert rows[arm][5] == f"{mean / math.log(2):.4f}"
    assert rows[arm][10] == f"{DIMENSIONS[arm][4]:,}"
  assert rows["depth-2"][:2] == ["12.0 M", "4.10 M"]
  assert rows["depth-2"][6] == "23.6 k"  # the mean of 23510, 23790, 23620
  assert rows["depth-2"][8] == "451"  # the median of 450, 451.5, 450.7
  assert rows["depth-2"][9] == "480 MiB"


def test_page_stands_alone(complete):
  workdir, page, text, markdown = complete
  assert all(
      re.match("#|data:image/png;base64,", link) for link in page.links)
  assert not re.search(r"url\((?!#)|@import", text)
  assert not {"script", "link", "img", "iframe"} & set(page.tags)
  assert len(page.ids) == len(set(page.ids))
  assert set(re.findall(r"(?:url\(|href=\")#([^)\"]+)", text)) <= set(page.ids)
  assert page.tags.count("svg") == 5
  assert "<held out: 5 %>" in "".join(page.text)  # escaped, so it is text
  assert "&lt;held out: 5 %>" in markdown
  linked = re.findall(r"!\[.*?\]\((.*?)\)", markdown)
  assert len(linked) == 5
  for name in linked:
    assert (workdir / name).read_bytes().startswith(b"\x89PNG")


def test_markdown_tables_are_whole(complete):
  *_, markdown = complete
  tables = re.findall(r"(?:^\|.*\n)+", markdown, re.M)
  assert len(tables) == 5
  for table in tables:
    widths = {
        len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}
    assert len(widths) == 1, table


def test_same_files_same_report(workdir, complete):
  assert written(workdir)[1:] == complete[2:]
  for path in (workdir / "plots").iterdir():
    assert path.read_bytes() == (
        complete[0] / "plots" / path.name).read_bytes()


def test_verdicts(complete):
  workdir, page, _, markdown = complete
  found = analysis_of(workdir).verdicts
  assert [v.verdict for v in found] == [
      "agrees", "disagrees", "cannot be told at this size", "agrees", "agrees",
      "agrees", "disagrees"]
  text = " ".join("".join(page.text).split())
  expected = (f"held-out loss, depth-8 against depth-2: "
              f"{difference_by_hand(LOSSES['depth-8'], LOSSES['depth-2'], 9)}"
              ).replace(" [", " nats/token [")
  for form in (text, markdown):
    assert expected in form
    assert "peak memory, depth-2 against depth-16: 1.25\u00d7" in form
    assert "KV bytes per token, depth-2 against depth-16: 0.125\u00d7" in form
  assert "4 agree, 2 disagree and 1 cannot be told at this size" in text
  assert "Holm p\u00a0<\u00a00.001" in "".join(page.text)


def test_a_speed_measured_once_is_stated_and_not_judged(workdir):
  for arm in ("depth-2", "depth-16"):
    results.write(results.speed_path(workdir, arm), results.Speed(
        decode_tokens_per_second=[900.0 if arm == "depth-2" else 300.0]))
  found = analysis_of(workdir).verdicts
  assert found[4].verdict == verdicts.CANNOT_TELL
  assert wording.finding(found[4].comparisons[0]) == (
      "decode speed, depth-2 against depth-16: 3.00\u00d7 "
      "(measured once, so there is no interval)")
  assert found[5].verdict == verdicts.CANNOT_TELL
  assert found[5].comparisons[0].missing == (
      "no peak memory for depth-2 and depth-16")
  assert "not measured" in written(workdir)[1]


def test_no_difference_states_what_could_have_been_seen(workdir):
  arms = [arm for arm in make_ablation().arms
          if arm.name in ("depth-4", "depth-16")]
  results.write(results.ablation_path(workdir), make_ablation(
      arms=arms, claims=(), held_equal=(), not_held=()))
  page, *_ = written(workdir)
  pairs = np.subtract(LOSSES["depth-16"], LOSSES["depth-4"])
  # With two degrees of freedom and one comparison: 5.6535 standard errors.
  effect = 5.6535 * pairs.std(ddof=1) / math.sqrt(3)
  assert (
      "No difference in held-out loss to the baseline depth-4 could be seen: "
      f"the smallest effect that 3 seeds could have seen is {effect:.2g} "
      "nats/token.") in "".join(page.text)


def test_one_seed_gives_no_interval(workdir):
  results.write(results.ablation_path(workdir), make_ablation(seeds=(1,)))
  page, _, markdown = written(workdir)
  rows = {row[0].split()[0]: row[1:] for row in page.tables[0]}
  assert rows["depth-8"][2:4] == ["1.7822", "\u22120.0326"]
  text = "".join(page.text)
  assert "one seed, which cannot tell a difference from chance" in text
  assert "there is no interval" in text and "there is no interval" in markdown
  loss_verdicts = [v.verdict for v in analysis_of(workdir).verdicts[:4]]
  assert loss_verdicts == [verdicts.CANNOT_TELL] * 4


def test_incomplete_is_said_loudly_and_shared_seeds_are_used(workdir):
  results.run_path(workdir, "depth-16", 1).unlink()
  page, text, markdown = written(workdir)
  terminal = printed(workdir)
  said = "depth-16: 1 of 3 seeds not finished (1)"
  for form in ("".join(page.text), markdown, terminal):
    assert said in form and "incomplete" in form.lower()
  assert 'role="alert"' in text
  rows = {row[0].split()[0]: row[1:] for row in page.tables[0]}
  mean = np.mean([LOSSES["depth-2"][0], LOSSES["depth-2"][2]])
  assert rows["depth-2"][2].startswith(f"{mean:.4f} ")
  pairs = np.subtract(LOSSES["depth-2"], LOSSES[BASELINE])[[0, 2]]
  half = stats.t.isf(0.025 / 9, 1) * pairs.std(ddof=1) / math.sqrt(2)
  assert f"{pairs.mean() + half:.4f}]" in rows["depth-2"][3]
  assert "only the seeds that every arm with a result has finished: 0, 2" in (
      markdown)


def test_finished_ablation_has_no_warning(complete):
  workdir, _, text, markdown = complete
  for form in (text, markdown, printed(workdir)):
    assert "incomplete" not in form.lower() and 'role="alert"' not in form


@pytest.mark.parametrize("lost", [LOSSES, (BASELINE,), ("dense-8",)])
def test_arms_without_any_run(workdir, lost):
  for arm in lost:
    for seed in SEEDS:
      results.run_path(workdir, arm, seed).unlink()
  page, _, markdown = written(workdir)
  text = "".join(page.text)
  assert f"{lost[0] if lost != LOSSES else 'depth-2'}: 3 of 3 seeds not" in text
  if BASELINE in lost:
    assert "Nothing can be said yet" in text and "Nothing can" in markdown
  else:
    assert "clearly lower for depth-8" in text
    assert "no held-out loss for dense-8" in text


def test_diverged_run_is_reported_and_left_out(workdir):
  results.write(results.run_path(workdir, "depth-16", 2),
                results.Run(failure="loss is nan at step 120"))
  *_, markdown = written(workdir)
  assert "depth-16: seed 2 failed: loss is nan at step 120" in markdown
  assert analysis_of(workdir).seeds == (0, 1)


def test_command_line(workdir, capsys):
  assert report.main([str(workdir)]) == 0
  assert str(workdir / "report.html") in capsys.readouterr().out
  with pytest.raises(SystemExit) as stop:
    report.main([])
  assert stop.value.code == 2


@pytest.mark.parametrize("path, text, message", [
    ("ablation.json", None, "is no ablation: it has no ablation.json"),
    ("ablation.json", '{"name": "half', "ablation.json is damaged"),
    ("ablation.json", '{"nam": "x"}', "unexpected keyword argument 'nam'|nam"),
    ("arms/depth-2/seed_0/result.json", '{"eval_los": 1}', "is damaged"),
    ("arms/depth-2/seed_0/result.json", '{"eval_loss": NaN}', "eval_loss=nan"),
    ("arms/depth-2/speed.json", "[]", "speed.json is damaged"),
    ("arms/depth-2/seed_0/metrics.jsonl", "{}\n{}\n", "metrics.jsonl, line 1"),
])
def test_bad_files_are_named(workdir, capsys, path, text, message):
  if text is None:
    (workdir / path).unlink()
  else:
    (workdir / path).write_text(text)
  assert report.main([str(workdir)]) == 1
  assert re.search(message, capsys.readouterr().err)
  assert not (workdir / "report.html").exists()
