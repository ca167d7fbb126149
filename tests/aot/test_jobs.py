"""The command: compilations in processes of their own, cached and ranked."""

import dataclasses
import io
import subprocess

import pytest
from aot.tiny_step import maze_config

from oreo_jax import files
from oreo_jax.aot import jobs, search, topology
from oreo_jax.config import ConfigError
from oreo_jax.progress import Progress
from oreo_jax.stages import STAGES, Workspace
from oreo_jax.stages.aot import resolve


def compile_all(configs, folder):
  stream = io.StringIO()
  with Progress(len(configs), "aot", stream=stream) as progress:
    answers = jobs.compile_all(configs, folder, progress=progress)
  return answers, stream.getvalue()


def no_process(*unused, **unused_options):
  raise AssertionError("a process was started")


def layout(name, *, step_s=1.0, peak=1.0, fits=True):
  return {
    "fits": fits,
    "topology": "cpu:8",
    "mesh": {"dcn_data": 1, "data": 1, "fsdp": 8, "tensor": 1},
    "flags": [f"--config.mesh.fsdp={name}"],
    "memory": {"peak": peak},
    "roofline": {"step_s": step_s, "bound": "compute", "mfu": 0.5},
  }


@pytest.mark.slow
def test_the_command_compiles_once_and_then_remembers(tmp_path, monkeypatch):
  config = maze_config()
  config = dataclasses.replace(
    config, model=dataclasses.replace(config.model, num_layers=1)
  )
  said = []
  STAGES["aot"].run(Workspace(config, tmp_path), said.append)
  answer = files.read_json(tmp_path / "aot" / "train.json")
  assert answer["fits"] and not answer["cached"]
  assert any("all-gather" in line for line in said)

  monkeypatch.setattr(subprocess, "run", no_process)
  STAGES["aot"].run(Workspace(config, tmp_path), said.append)
  again = files.read_json(tmp_path / "aot" / "train.json")
  assert again.pop("cached") and not answer.pop("cached")
  assert again == answer
  # Another layout is another program.
  config.train.grad_accum = 4
  with pytest.raises(AssertionError, match="a process was started"):
    STAGES["aot"].run(Workspace(config, tmp_path), said.append)


def test_what_does_not_fit_is_written_and_refused(tmp_path, monkeypatch):
  config = maze_config()
  workspace = Workspace(config, tmp_path)
  answer = layout("1", fits=False) | {
    "what": "train",
    "num_slices": 1,
    "devices": 8,
    "compiler": "none",
    "message": "words\nUsed 29.50G of 15.75G hbm. Exceeded.\nmore words",
  }
  answer["memory"]["arguments"] = {"weights of policy": 5 * 2**30}
  key = jobs.key_of(resolve(workspace))
  files.write_json(tmp_path / "aot" / "cache" / f"{key}.json", answer)
  monkeypatch.setattr(subprocess, "run", no_process)
  said = []
  with pytest.raises(ConfigError, match="Used 29.50G of 15.75G hbm"):
    STAGES["aot"].run(workspace, said.append)
  assert any("5.00 GiB" in line for line in said)
  assert not files.read_json(tmp_path / "aot" / "train.json")["fits"]


def test_a_search_writes_the_flags_of_the_best(tmp_path, monkeypatch):
  config = maze_config(
    search=True, tensor=(1, 2, 3), grad_accum=(1, 2), remat=("full",)
  )
  compiled = []

  def compile_one(config, path):
    compiled.append((config.mesh.tensor, config.train.grad_accum))
    tensor, accum = compiled[-1]
    # The fastest does not fit.
    return layout(
      f"{tensor}{accum}", step_s=accum / tensor, fits=(tensor, accum) != (2, 1)
    )

  monkeypatch.setattr(jobs, "_one", compile_one)
  said = []
  STAGES["aot"].run(Workspace(config, tmp_path), said.append)
  # 3 divides neither the devices nor the heads.
  assert sorted(compiled) == [(1, 1), (1, 2), (2, 1), (2, 2)]
  assert "3 of 4 layouts fit cpu:8" in said
  flags = (tmp_path / "aot" / "best.flags").read_text()
  assert flags in ("--config.mesh.fsdp=11\n", "--config.mesh.fsdp=22\n")
  ranked = files.read_json(tmp_path / "aot" / "layouts.json")["ranked"]
  times = [answer["roofline"]["step_s"] for answer in ranked]
  assert times == sorted(times) and len(times) == 3


def test_ranking_is_by_time_then_by_memory():
  answers = [
    layout("slow", step_s=2.0, peak=1.0),
    layout("large", step_s=1.0, peak=3.0),
    layout("small", step_s=1.0, peak=2.0),
    layout("none", step_s=0.1, fits=False),
    {"refused": "no", "fits": False},
  ]
  ranked = search.rank(answers)
  names = [a["flags"][0].split("=")[1] for a in ranked]
  assert names == ["small", "large", "slow"]
  assert len(search.table(ranked)) == 3


def test_a_search_tries_blocks_of_attention():
  config = maze_config(
    tensor=(1,), grad_accum=(1,), remat=("full",), attention_block=(32, 64)
  )
  blocks = [c.model.attention_block for c in search.candidates(config)]
  assert blocks == [32, 64]


def test_a_search_without_a_layout_says_what_to_set():
  with pytest.raises(ConfigError, match="--config.aot.tensor"):
    search.candidates(maze_config(tensor=(3,)))


def test_two_equal_configs_are_compiled_once(tmp_path, monkeypatch):
  calls = []
  monkeypatch.setattr(
    jobs, "_one", lambda config, path: calls.append(path) or layout("1")
  )
  answers, shown = compile_all([maze_config(), maze_config()], tmp_path)
  assert len(calls) == 1 and len(answers) == 2
  assert "aot" in shown


def test_how_a_search_is_run_does_not_change_a_key():
  assert jobs.key_of(maze_config(jobs=4)) == jobs.key_of(maze_config())
  other = maze_config(num_slices=2)
  assert jobs.key_of(other) != jobs.key_of(maze_config())


def test_an_architecture_is_known_by_its_name_alone(tmp_path):
  config = maze_config()
  config.init, config.data.tokenizer = "somewhere/Qwen2.5-Math-1.5B", "hf"
  config.model.remat, config.model.attention = "full", "blockwise"
  model = resolve(Workspace(config, tmp_path)).model
  assert (model.num_layers, model.vocab_size) == (28, 151_936)
  assert (model.remat, model.attention) == ("full", "blockwise")
  config.init = "somewhere/unheard-of"
  with pytest.raises(ConfigError, match="neither a folder nor a known"):
    resolve(Workspace(config, tmp_path))


def test_slices_set_the_mesh_where_the_config_leaves_it(tmp_path):
  config = maze_config(num_slices=2)
  config.aot.topology = "v5e:2x2"
  assert resolve(Workspace(config, tmp_path)).mesh.dcn_data == 2


def test_no_machine_is_named(tmp_path):
  config = maze_config()
  config.aot.topology = ""
  with pytest.raises(ConfigError, match="--topology=v5e:4x4"):
    STAGES["aot"].run(Workspace(config, tmp_path), print)


@pytest.mark.parametrize("name", ["v5e", "v5e:4", "v9:4x4", "cpu:0", "v5p:4x4"])
def test_a_topology_that_is_none_is_refused(name):
  with pytest.raises(ConfigError, match="expected a kind and a shape"):
    topology.parse(name)


def test_without_the_compiler_one_line_says_what_to_install(monkeypatch):
  monkeypatch.setattr(topology.importlib.util, "find_spec", lambda name: None)
  with pytest.raises(ConfigError, match="pip install libtpu"):
    topology.check_compiler(topology.parse("v5e:4x4"))
  topology.check_compiler(topology.parse("cpu:8"))
