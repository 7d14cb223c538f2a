"""The page about routing: of an ablation and of a checkpoint, end to end."""
import base64
import html.parser
import json
import pathlib
import re

import jax
import numpy as np
import pytest

import jaxlm
from experiments import design as design_lib
from experiments import plan
from experiments import results
from experiments import routing_model
from experiments import routing_report
from experiments.budget import Solution, measure
from jaxlm.config import (AttentionConfig, MLPConfig, ModelConfig, MoEConfig,
                          RopeConfig, RouterConfig)
from jaxlm.config_dict import to_dict
from jaxlm.data import build_dataset, ByteTokenizer
from jaxlm.model.trace import trace
from jaxlm.train import train
from jaxlm.train.checkpoint import Checkpoints, newest, read_step
from quick import jax_options

pytestmark = pytest.mark.usefixtures("quick_compile")
SEQ_LEN, SEEDS = 19, (3, 5)
TEXT = "<script>alert('1 & 2')</script>\n\tn\u00e9e \u20ac 5\n" * 12


def model(router=RouterConfig("topk_softmax"), **fields):
  experts = {"moe": MoEConfig(5, 2, MLPConfig(7), router)}
  return ModelConfig(**{
      "vocab_size": 260, "d_model": 10, "num_layers": 2, "tie_embeddings": True,
      "attention": AttentionConfig(3, 1, 8, rope_full=RopeConfig())}
      | (fields or experts))


MODELS = {"mixture": model(), "dense": model(mlp=MLPConfig(23))}


@pytest.fixture(scope="module")
def text_file(tmp_path_factory):
  path = tmp_path_factory.mktemp("text") / "some [1].txt"
  path.write_text(TEXT)
  return path


@pytest.fixture(scope="module")
def ablation(tmp_path_factory):
  """As `runner` leaves it: two seeds that trained together, and their
  checkpoints."""
  directory = tmp_path_factory.mktemp("source")
  for i in range(30):
    (directory / f"{i}.txt").write_text(
        " ".join(str((7 * i + j) % 97) for j in range(60)))
  config = design_lib.make_config({}, {"tiny": {
      "seeds": SEEDS, "together": True, "keep_checkpoints": True,
      "data": {"source": f"files:{directory}/*.txt", "heldout_fraction": 0.2},
      "train": {"steps": 3, "batch_size": 4, "seq_len": SEQ_LEN,
                "eval_batches": 2, "log_every": 1},
      "optimizer": {"warmup_steps": 2}}}, "tiny")
  def solved(model):
    found = measure(model, SEQ_LEN)
    return Solution(model, {}, {}, found, {})
  design = design_lib.Design(
      "Which?", "mixture", {arm: solved(m) for arm, m in MODELS.items()},
      dict.fromkeys(MODELS, "one of them"), ())
  workdir = tmp_path_factory.mktemp("ablation")
  results.write(results.ablation_path(workdir), plan.ablation(
      config, design, "tiny", dict.fromkeys(MODELS, 1e-2), "", ""))
  (workdir / "config.json").write_text(json.dumps(
      plan.identity(config, design)))
  train(MODELS["mixture"], plan.train_config(config, MODELS["mixture"], 1e-2),
        build_dataset(config.data.source, "bytes", SEQ_LEN,
                      heldout_fraction=0.2), workdir / "arms" / "mixture",
        seeds=SEEDS)
  # Of the dense arm there is what need not be trained.
  saved = Checkpoints(workdir / "arms" / "dense" / "seed_3" / "checkpoints", 1)
  saved.save(3, {"params": jaxlm.init_params(MODELS["dense"],
                                             jax.random.key(0))},
             {"seeds": [3], "model": to_dict(MODELS["dense"])})
  saved.close()
  return workdir


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
  path = tmp_path_factory.mktemp("checkpoint") / "tiny"
  jaxlm.save(jaxlm.LM(model(), jaxlm.init_params(model(), jax.random.key(0))),
             path)
  return path


@pytest.fixture
def main(monkeypatch, tmp_path, capsys):
  """Runs main in an empty directory: (exit status, stdout, stderr)."""
  monkeypatch.chdir(tmp_path)
  monkeypatch.setenv("JAXLM_CACHE", str(tmp_path / "cache"))
  def run(*arguments):
    status = routing_report.main([str(x) for x in arguments])
    return status, *capsys.readouterr()
  with jax_options():
    yield run


class Page(html.parser.HTMLParser):
  """A page's tags with their attributes, and the text of some of them."""

  def __init__(self, text):
    super().__init__()
    self.tags, self.open, self.text = [], [], {}
    self.feed(text)

  def handle_starttag(self, tag, attributes):
    self.tags.append((tag, dict(attributes)))
    if tag not in ("meta", "input", "br"):
      self.open.append((tag, dict(attributes).get("id")))

  def handle_endtag(self, tag):
    while self.open and self.open.pop()[0] != tag:
      pass

  def handle_data(self, data):
    for _, name in self.open:
      if name and not (name == "text" and self.open[-1][0] == "b"):
        self.text[name] = self.text.get(name, "") + data


def read(path):
  text = pathlib.Path(path).read_text()
  return text, Page(text)


def test_a_checkpoint_s_page(main, checkpoint, text_file, tmp_path):
  status, out, err = main(checkpoint, "--text", text_file, "--tokenizer",
                          "bytes", "--tokens", 300)
  assert (status, out.strip()) == (0, "routing.html"), err
  text, page = read(tmp_path / "routing.html")
  # One text of 300 tokens in a row of as many; the page shows it as it is.
  tokens = ByteTokenizer().encode(TEXT)[:300]
  shown = ByteTokenizer().decode(tokens)
  assert page.text["text"] == shown
  # What the text says is no markup, and in the data no end of a script.
  scripts = [attributes for tag, attributes in page.tags if tag == "script"]
  assert len(scripts) == 2 and text.count("</script>") == 2
  assert "alert('" not in re.sub(r"&#x27;|&#39;", "", text)
  data = json.loads(page.text["data"])
  assert "".join(data["pieces"]).startswith("<script>alert")
  found = trace(model(), jaxlm.load(checkpoint, "float32").params,
                tokens[None])
  starts = [i for i, token in enumerate(tokens) if token & 0xc0 != 0x80]
  experts = np.frombuffer(base64.b64decode(data["experts"]), "<u2")
  np.testing.assert_array_equal(experts.reshape(2, len(starts), 2),
                                found.expert_LBTA[:, 0, starts])
  weights = np.frombuffer(base64.b64decode(data["weights"]), "<u2")
  np.testing.assert_allclose(
      weights.reshape(2, len(starts), 2) / 1000,
      found.weight_LBTA[:, 0, starts], atol=1e-3)
  # Without scripts the first layer is there to be read.
  spans = [a for tag, a in page.tags if tag == "span" and "title" in a]
  assert spans[0]["class"] == f"x{experts[0]}"
  assert spans[0]["title"].startswith(f"expert {experts[0]}: 0.")
  blocks = [a for tag, a in page.tags if a.get("class") == "layer"]
  assert ["hidden" in block for block in blocks] == [False, True]


def test_the_page_stands_alone(main, checkpoint, text_file, tmp_path):
  main(checkpoint, "--text", text_file, "--tokenizer", "bytes", "--tokens",
       200, "--out", "some/where.html")
  text, page = read(tmp_path / "some" / "where.html")
  for tag, attributes in page.tags:
    assert tag not in ("link", "iframe", "img", "object"), tag
    for name in ("src", "href", "xlink:href"):
      assert attributes.get(name, "#").startswith(("#", "data:")), attributes
  assert "@import" not in text and not re.search(r"url\((?!#|data:)", text)
  assert set(re.findall(r"https?://[^\s\"<]*", text)) <= {
      "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
  ids = [a["id"] for _, a in page.tags if "id" in a]
  assert len(ids) == len(set(ids))


def test_an_ablation_s_page(main, ablation):
  status, out, err = main(ablation, "--seed", 5, "--tokens", 400)
  assert status == 0, err
  assert out.strip() == str(ablation / "routing.html")
  text, page = read(ablation / "routing.html")
  assert "tiny, arm mixture" in text and "seed 5, step 3" in text
  assert "held-out files of files:" in text
  first = text
  assert main(ablation, "--seed", 5, "--tokens", 400)[0] == 0
  assert (ablation / "routing.html").read_text() == first


def test_each_seed_s_own_parameters_are_read(ablation):
  state, about = read_step(newest(
      ablation / "arms" / "mixture" / "seeds_3_5" / "checkpoints"))
  assert about["seeds"] == [3, 5]
  for place, seed in enumerate(SEEDS):
    subject = routing_model.read(ablation, seed=seed)
    assert subject.config == MODELS["mixture"] and subject.seq_len == SEQ_LEN
    jax.tree.map(lambda mine, both: np.testing.assert_array_equal(
        mine, both[place]), subject.params, state["params"])


def test_load_over_training_is_shown_where_it_was_logged(ablation, tmp_path):
  assert routing_model.load_curve(tmp_path, "mixture", 3) is None
  path = results.metrics_path(tmp_path, "mixture", 3)
  path.parent.mkdir(parents=True)
  lines = [{"step": i, "tokens": 10 * i, "loss": 1.0} for i in range(5)]
  for line in lines[1::2]:
    line["load"] = [[0.2] * 5, [line["step"] / 10, 0.1, 0.2, 0.3, 0.3]]
  path.write_text("".join(json.dumps(line) + "\n" for line in lines))
  tokens, load_SLE = routing_model.load_curve(tmp_path, "mixture", 3)
  assert tokens.tolist() == [10, 30] and load_SLE.shape == (2, 2, 5)
  assert load_SLE[:, 1, 0].tolist() == [0.1, 0.3]
  subject = routing_model.read(ablation)
  object.__setattr__(subject, "load_curve", (tokens, load_SLE))
  text = routing_report.write_page(subject, tmp_path / "x.html",
                                   num_tokens=100).read_text()
  assert "as training went on" in text and "was not logged" not in text


def test_expert_choice_has_a_page_too(tmp_path, text_file):
  config = model(RouterConfig("expert_choice"))
  jaxlm.save(jaxlm.LM(config, jaxlm.init_params(config, jax.random.key(0))),
             tmp_path / "model")
  subject = routing_model.read(tmp_path / "model", text=text_file,
                               tokenizer="bytes")
  text = routing_report.write_page(subject, tmp_path / "x.html",
                                   num_tokens=100).read_text()
  data = json.loads(Page(text).text["data"])
  experts = np.frombuffer(base64.b64decode(data["experts"]), "<u2")
  # Lists of five, which end in what is no expert.
  assert data["choices"] == 5 and set(experts) == {0, 1, 2, 3, 4, 5}


@pytest.mark.parametrize("arguments, message", [
    (["--arm", "dense"], "arm dense is dense: it has no experts"),
    (["--arm", "dence"], "--arm dence: .* has ['mixture', 'dense']"),
    (["--seed", "4"], "--seed 4: .* has [3, 5]"),
    (["--tokenizer", "bytes"], "an ablation's model has its own"),
    (["--text", "nowhere"], "--text nowhere: there is no such file"),
    (["--source", "nothing"], "source='nothing' is not known"),
    (["--tokens", "1"], "1 tokens: nothing to look at")])
def test_failure_is_one_message(main, ablation, arguments, message):
  status, out, err = main(ablation, *arguments)
  assert (status, out) == (1, "")
  assert re.search(message.replace("[", r"\["), err), err
  assert err.startswith("error: ") and err.count("\n") == 1


def test_what_is_no_model_is_refused(main, checkpoint, tmp_path):
  status, _, err = main(tmp_path / "nothing")
  assert status == 1 and "nothing" in err
  status, _, err = main(checkpoint)
  assert status == 1 and "has no tokenizer" in err and "--tokenizer" in err
  status, _, err = main(checkpoint, "--seed", 3, "--tokenizer", "bytes")
  assert status == 1 and "is no ablation's workdir" in err


def test_an_ablation_without_checkpoints_tells_how_to_keep_them(tmp_path):
  with pytest.raises(ValueError, match="keep_checkpoints=True"):
    routing_model.checkpoints(tmp_path, "mixture", 3)


def test_wrong_usage_is_told_from_failure(main, capsys):
  for arguments in ([], ["x", "--tokens", "many"],
                    ["x", "--text", "a", "--source", "b"]):
    with pytest.raises(SystemExit) as error:
      main(*arguments)
    assert error.value.code == 2
