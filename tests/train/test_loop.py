"""Whole runs: what they learn, write, resume from and stop at."""
import dataclasses
import json
import math
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.data.pipeline import batches, eval_batches
from jaxlm.model.transformer import Execution, forward, logits
from jaxlm.parallel.mesh import make_mesh
from jaxlm.train import Diverged, Interrupted, train
from jaxlm.train.evaluation import Heldout
from jaxlm.train.programs import Programs, SeedBatches
import toy_training as toy

pytestmark = pytest.mark.usefixtures("program_cache")


class Stop(Exception):
  pass


def run(workdir, config=toy.TRAIN, stop_at=None, seeds=(7,), mesh=None):
  def on_step(step, metrics):
    shown.append((step, metrics))
    if step == stop_at:
      raise Stop
  shown = []
  results = train(toy.DENSE, config, toy.counting_data(), workdir, seeds=seeds,
                  on_step=on_step, mesh=mesh)
  return results, shown


@pytest.fixture
def whole(whole_run):
  return whole_run.workdir, whole_run.result, whole_run.shown


def lines(workdir, seed=7):
  path = workdir / f"seed_{seed}" / "metrics.jsonl"
  return [json.loads(line) for line in path.read_text().splitlines()]


def without_times(entries):
  return [{name: value for name, value in entry.items()
           if name not in ("seconds", "tokens_per_second")}
          for entry in entries]


def checkpoints(workdir, name="seed_7"):
  return sorted(int(path.name)
                for path in (workdir / name / "checkpoints").glob("[0-9]*"))


def test_a_toy_stream_is_learned(whole):
  _, result, shown = whole
  assert shown[0][1]["loss"] > 5.0  # log(260) is 5.56
  assert shown[-1][1]["loss"] < 3.5
  assert result.eval_loss < 3.5


def test_every_step_is_reported_once(whole):
  assert [step for step, _ in whole[2]] == list(range(1, 41))


def test_lines_of_metrics(whole):
  workdir, result, _ = whole
  found = lines(workdir)
  evaluated = [8, 16, 24, 32, 40]
  assert [entry["step"] for entry in found] == sorted(
      {*range(3, 40, 3), *evaluated})
  assert [e["step"] for e in found if "eval_loss" in e] == evaluated
  assert found[0]["tokens"] == 3 * 4 * toy.SEQ_LEN
  assert found[-1]["eval_loss"] == result.eval_loss
  assert found[-1]["eval_bits_per_byte"] == result.bits_per_byte
  assert all(a["seconds"] < b["seconds"] for a, b in zip(found, found[1:]))
  assert result.tokens_per_second > 0


def test_evaluations_tell_the_load_of_the_experts(tmp_path):
  model = dataclasses.replace(toy.MOE, vocab_size=260)
  config = dataclasses.replace(
      toy.TRAIN, steps=4, eval_every=2, log_every=1,
      execution=Execution(experts="ragged"))  # quick to compile
  shown = []
  results = train(model, config, toy.counting_data(), tmp_path, seeds=(3, 7),
                  on_step=lambda _, metrics: shown.append(metrics))
  for result in results:
    found = lines(tmp_path, result.seed)
    assert ["load" in entry for entry in found] == [False, True] * 2
    assert found[-1]["load"] == result.router.load != found[1]["load"]
    assert np.shape(result.router.load) == (2, 5)
    np.testing.assert_allclose(np.sum(result.router.load, 1), 1, rtol=1e-6)
  assert len(shown) == 4 and all("load" not in metrics for metrics in shown)


def test_checkpoints_are_the_newest(whole):
  assert checkpoints(whole[0]) == [35, 40]


def test_evaluation_agrees_with_the_final_parameters(whole):
  """It ran beside training; and bits a byte are nats over bytes."""
  _, result, _ = whole
  config = toy.TRAIN
  heldout = Heldout(Programs(toy.DENSE, config, (7,)), config,
                    toy.counting_data())
  [again] = heldout.finish(heldout.begin(result.params), 1)
  np.testing.assert_allclose(again.loss, result.eval_loss, rtol=1e-5)
  # Every target under the mask is a byte, but for the ends of documents.
  targets = sum(int(b["mask"].sum()) for b in map(jax.device_get,
                                                  heldout.batches))
  ends = sum(int(((b["targets"] == 256) & b["mask"]).sum())
             for b in map(jax.device_get, heldout.batches))
  np.testing.assert_allclose(
      again.bits_per_byte,
      again.loss * targets / (targets - ends) / math.log(2), rtol=1e-6)


def test_loss_by_position_is_that_of_all_logits(whole):
  _, result, _ = whole
  nats_T, targets_T = np.zeros(toy.SEQ_LEN), np.zeros(toy.SEQ_LEN)

  @jax.jit
  def nats(params, batch):
    hidden_BTD = forward(toy.DENSE, params, batch["tokens"],
                         segment_ids_BT=batch["segment_ids"]).hidden_BTD
    log_probs_BTV = jax.nn.log_softmax(logits(toy.DENSE, params, hidden_BTD))
    return -jnp.take_along_axis(log_probs_BTV, batch["targets"][..., None],
                                -1)[..., 0]

  for batch in eval_batches(toy.counting_data().heldout, 4, 2):
    nats_T += np.sum(nats(result.params, batch), 0, where=batch["mask"])
    targets_T += batch["mask"].sum(0)
  np.testing.assert_allclose(result.position_loss, nats_T / targets_T,
                             rtol=1e-5)
  np.testing.assert_allclose(
      np.average(result.position_loss, weights=targets_T), result.eval_loss,
      rtol=1e-6)


def test_a_place_without_targets_has_no_loss():
  config = dataclasses.replace(toy.TRAIN, seq_len=4)
  heldout = Heldout(Programs(toy.DENSE, config, (7, 8)), config,
                    toy.counting_data(4))
  nats = np.array([[6, 0, 5, 1], [8, 0, 9, 3]], np.float32)
  targets = np.tile(np.float32([4, 0, 2, 4]), (2, 1))
  first, second = heldout.finish({"nats": nats, "targets": targets}, 2)
  assert first.position_loss == [1.5, None, 2.5, 0.25]
  assert second.position_loss == [2.0, None, 4.5, 0.75]
  assert (first.loss, second.loss) == (1.2, 2.0)


def test_evaluations_see_the_parameters_of_their_step(monkeypatch, tmp_path):
  """Though the next step is given their buffers while they run."""
  begin, kept = Heldout.begin, []
  def keep(self, params):
    kept.append(jax.tree.map(np.array, params))
    return begin(self, params)
  monkeypatch.setattr(Heldout, "begin", keep)
  run(tmp_path)
  heldout = Heldout(Programs(toy.DENSE, toy.TRAIN, (7,)), toy.TRAIN,
                    toy.counting_data())
  told = [e["eval_loss"] for e in lines(tmp_path) if "eval_loss" in e]
  for params, loss in zip(kept, told, strict=True):
    [again] = heldout.finish(begin(heldout, params), 1)
    np.testing.assert_allclose(loss, again.loss, rtol=1e-5)


@pytest.mark.parametrize("stop_at", [3, 13])
def test_a_stopped_run_ends_as_if_it_never_was(whole, tmp_path, stop_at):
  workdir, result, shown = whole
  with pytest.raises(Stop):
    run(tmp_path, stop_at=stop_at)
  [resumed], shown_again = run(tmp_path)
  assert shown_again[0][0] == stop_at // 5 * 5 + 1
  assert toy.digest(resumed.params) == toy.digest(result.params)
  assert without_times(lines(tmp_path)) == without_times(lines(workdir))
  assert resumed.eval_loss == result.eval_loss


def test_a_run_on_a_mesh_equals_that_of_one_device_and_goes_on_there(
    whole, tmp_path):
  workdir, result, _ = whole
  mesh = make_mesh({"data": 2, "context": 1, "expert": 2}, jax.devices()[:4])
  config = dataclasses.replace(toy.TRAIN, keep_best=1)
  with pytest.raises(Stop):
    run(tmp_path, config, stop_at=13, mesh=mesh)
  [resumed], shown = run(tmp_path)
  assert shown[0][0] == 11
  told = [[entry["loss"] for entry in lines(where)]
          for where in (tmp_path, workdir)]
  np.testing.assert_allclose(*told, rtol=1e-4)
  np.testing.assert_allclose(resumed.eval_loss, result.eval_loss, rtol=1e-4)
  np.testing.assert_allclose(resumed.position_loss, result.position_loss,
                             rtol=1e-3)


def test_a_mesh_is_of_one_seed(tmp_path):
  with pytest.raises(ValueError, match=r"seeds=\[3, 7\] with a mesh: seeds"):
    run(tmp_path, seeds=(3, 7), mesh={"data": 8})
  with pytest.raises(ValueError, match="a batch: batch=4 does not divide over "
                                       "the mesh's data=3: use 1, 2 or 4"):
    run(tmp_path, mesh=make_mesh({"data": 3}, jax.devices()[:3]))


def test_a_finished_run_trains_no_more(whole):
  workdir, result, _ = whole
  before = lines(workdir)
  [again], shown = run(workdir)
  assert not shown and lines(workdir) == before
  assert again.tokens_per_second == result.tokens_per_second
  assert again.seconds == result.seconds
  np.testing.assert_allclose(again.eval_loss, result.eval_loss, rtol=1e-6)
  assert toy.digest(again.params) == toy.digest(result.params)


def test_another_run_in_the_same_directory_is_refused(whole):
  with pytest.raises(ValueError, match=(
      r"another run: train.batch_size=4 there, 2 here; "
      r"train.optimizer.b2=0.95 there, 0.9 here")):
    run(whole[0], dataclasses.replace(
        toy.TRAIN, batch_size=2, keep=5,
        optimizer=dataclasses.replace(toy.TRAIN.optimizer, b2=0.9)))


def test_seeds_together_equal_seeds_alone(whole, tmp_path):
  _, alone, _ = whole
  results, _ = run(tmp_path, seeds=(3, 7))
  assert [r.seed for r in results] == [3, 7]
  np.testing.assert_allclose(results[1].eval_loss, alone.eval_loss, rtol=1e-3)
  np.testing.assert_allclose(results[1].position_loss, alone.position_loss,
                             rtol=1e-2)
  np.testing.assert_allclose(
      [entry["loss"] for entry in lines(tmp_path)],
      [entry["loss"] for entry in lines(whole[0])], rtol=1e-3)
  assert results[0].eval_loss != results[1].eval_loss
  jax.tree.map(lambda x, y: np.testing.assert_equal(x.shape, y.shape),
               results[1].params, alone.params)


def test_a_seed_has_its_own_order_of_the_data():
  rows = toy.counting_data().train
  together = SeedBatches(rows, 4, (3, 7))
  alone = batches(rows, 4, 7)
  for _ in range(3):
    stacked, single = next(together), next(alone)
    np.testing.assert_array_equal(stacked["tokens"][1], single["tokens"])
    assert np.any(stacked["tokens"][0] != single["tokens"])


def test_the_donated_state_is_used_again():
  """Training holds one copy of parameters and moments, not two."""
  programs = Programs(toy.DENSE, toy.TRAIN, (7,))
  batch = next(batches(toy.counting_data().train, 4, 7))
  programs.compile()
  state = programs.init()
  pointers = {x.unsafe_buffer_pointer() for x in jax.tree.leaves(state)}
  new, _ = programs.step(state, batch)
  assert all(x.is_deleted() for x in jax.tree.leaves(state))
  assert {x.unsafe_buffer_pointer() for x in jax.tree.leaves(new)} == pointers


def poison(monkeypatch, at_step, factor):
  """From a step on, all parameters are multiplied by `factor`."""
  step = Programs.step
  def poisoned(self, state, batch):
    if int(state.step) == at_step - 1:
      state = state._replace(params=jax.tree.map(lambda x: x * factor,
                                                 state.params))
    return step(self, state, batch)
  monkeypatch.setattr(Programs, "step", poisoned)


def test_the_best_checkpoint_stays(monkeypatch, tmp_path):
  """Evaluated at steps 8, 16, ... and worse again at the last, 40."""
  poison(monkeypatch, 34, 5.0)
  config = dataclasses.replace(toy.TRAIN, checkpoint_every=8, keep=1,
                               keep_best=1, spike_factor=0)
  run(tmp_path, config)
  told = {entry["step"]: entry["eval_loss"] for entry in lines(tmp_path)
          if "eval_loss" in entry}
  assert min(told, key=told.get) == 32
  assert checkpoints(tmp_path) == [32, 40]


@pytest.mark.parametrize("factor, reason", [
    (jnp.nan, "loss is nan"), (40.0, "loss leapt")])
@pytest.mark.parametrize("at_step", [15, 17])
def test_a_bad_loss_stops_the_run_and_keeps_the_last_good_state(
    monkeypatch, tmp_path, factor, reason, at_step):
  """At step 15 a checkpoint is due."""
  poison(monkeypatch, at_step, factor)
  with pytest.raises(Diverged, match=reason) as error:
    run(tmp_path)
  assert error.value.step == at_step
  assert f"step {at_step}: " in str(error.value)
  assert checkpoints(tmp_path) == ([5, 10] if at_step == 15 else [10, 15])
  assert lines(tmp_path)[-1]["step"] < at_step


@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143),
                                            (signal.SIGINT, 130)])
def test_a_signal_saves_and_ends(whole, tmp_path, number, status):
  def on_step(step, _):
    if step == 6:
      signal.raise_signal(number)
  before = signal.getsignal(number)
  with pytest.raises(Interrupted) as error:
    train(toy.DENSE, toy.TRAIN, toy.counting_data(), tmp_path, seeds=(7,),
          on_step=on_step)
  assert error.value.exit_status == status
  assert error.value.step == checkpoints(tmp_path)[-1]
  assert signal.getsignal(number) is before
  [resumed], _ = run(tmp_path)
  assert toy.digest(resumed.params) == toy.digest(whole[1].params)


@pytest.mark.parametrize("changes, message", [
    ({"seq_len": 18}, "packed in rows of 19"),
    ({"seeds": (1, 1)}, r"seeds=\[1, 1\]: name at least one, none twice"),
    ({"vocab": 255}, "vocab_size=255 is less than the tokenizer's 260")])
def test_refuses(tmp_path, changes, message):
  model = dataclasses.replace(toy.DENSE, vocab_size=changes.get("vocab", 260))
  config = dataclasses.replace(toy.TRAIN,
                               seq_len=changes.get("seq_len", toy.SEQ_LEN))
  with pytest.raises(ValueError, match=message):
    train(model, config, toy.counting_data(), tmp_path,
          seeds=changes.get("seeds", (0,)))
  assert not list(tmp_path.iterdir())
