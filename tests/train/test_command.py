"""`python -m jaxlm.train`, in this process."""
import json

import pytest

from jaxlm.config_dict import to_dict
from jaxlm.train.__main__ import main
import toy_training as toy

pytestmark = pytest.mark.usefixtures("program_cache")

HOW = ("--steps=3 --batch-size=2 --seq-len=16 --eval-batches=1 --log-every=1 "
       "--max-bytes=60000").split()
SMALL = ["--preset=gpt2"] + [f"--set={field}" for field in (
    "num_layers=1", "d_model=8", "attention.num_heads=2",
    "attention.num_kv_heads=1", "attention.head_dim=4", "mlp.d_ff=12",
    "vocab_size=260")]


def test_trains_a_small_preset_and_goes_on(tmp_path, capsys):
  command = [*SMALL, *HOW, f"--workdir={tmp_path}", "--mesh=data=2,tensor=4"]
  with pytest.raises(SystemExit):
    main([*command, "--stepz=4"])
  assert "--stepz=4" in capsys.readouterr().err
  assert main(command) == 1
  error = capsys.readouterr().err
  assert "kv_heads=1 does not divide over the mesh's tensor=4" in error
  command[-1] = "--mesh=data=2,expert=1,tensor=1,context=4"
  assert main([*command]) == 0
  first = capsys.readouterr().out
  assert "mesh {'data': 2" in first and "step 3/3  loss" in first
  assert main([*command]) == 0
  again = capsys.readouterr().out
  assert "step" not in again
  assert first.splitlines()[-1][:30] == again.splitlines()[-1][:30]
  entries = [json.loads(line) for line in
             (tmp_path / "seed_0" / "metrics.jsonl").read_text().splitlines()]
  assert [entry["step"] for entry in entries] == [1, 2, 3]


def test_a_config_of_ones_own(tmp_path, capsys):
  path = tmp_path / "model.json"
  path.write_text(json.dumps(to_dict(toy.DENSE)))
  refused = [f"--config={path}", *HOW, f"--workdir={tmp_path / 'run'}",
             "--set=attention.num_head=2"]
  assert main(refused) == 1
  assert "did you mean 'num_heads'" in capsys.readouterr().err


@pytest.mark.parametrize("wrong, said", [
    ("--mesh=date=8", "mesh axis 'date'"), ("--mesh=data", "NAME=SIZE"),
    ("--set=num_layers", "is not FIELD=VALUE"), ("--dtype=half", "--dtype"),
    ("--step=3", "--step=3")])
def test_wrong_usage(tmp_path, capsys, wrong, said):
  with pytest.raises(SystemExit) as error:
    main([*SMALL, *HOW, f"--workdir={tmp_path / 'run'}", wrong])
  assert error.value.code == 2
  assert said in capsys.readouterr().err
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("wrong, said", [
    ("--preset=gpt-oss-21b", "did you mean 'gpt-oss-20b'"),
    ("--set=moe.num_experts=2", "the model has no moe"),
    ("--num-processes=2", "give all three"),
    ("--mesh=data=3", "there are 8"),
    ("--workdir=gs://bucket/run", "mount the bucket"),
    ("--data=files:nowhere/*", "matches no file")])
def test_what_cannot_be(tmp_path, capsys, wrong, said):
  arguments = [wrong, *SMALL[1:]] if "preset" in wrong else [*SMALL, wrong]
  assert main([f"--workdir={tmp_path / 'run'}", *arguments, *HOW]) == 1
  assert said in capsys.readouterr().err
