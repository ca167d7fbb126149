"""The states of the trunk on disk: the same in any row, whole or made again."""

import dataclasses
import json
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import processes, tiny
from oracles.adapters import MODEL, ROW_LENGTH, keep, make, trained_state

from oreo_jax.config import Config, ConfigError, LoraConfig, TrainConfig
from oreo_jax.data import make_loader
from oreo_jax.sharding import local_rows, shard_batch
from oreo_jax.train import forward as forward_module
from oreo_jax.train import init_state, make_train_step
from oreo_jax.train import trunk as trunk_module
from oreo_jax.train.forward import TRUNK, forward


def loader_of(sequences, **options):
  options = {"batch_size": 8, "row_length": ROW_LENGTH, "epochs": 2} | options
  return make_loader(sequences, **options)


def refuse_to_run(*unused_arguments):
  raise AssertionError("the trunk was run")


@pytest.mark.slow
def test_in_every_epoch_networks_read_the_trunk_rounded_to_bfloat16(
  tmp_path, monkeypatch
):
  setup, base = make(ema_decay=0.9), tiny.draw_params(MODEL)
  params, averages = trained_state(setup, base)
  sequences = keep(tmp_path / "trunk", setup=setup)
  loader = loader_of(sequences)
  assert loader.num_epochs == 2 and loader.num_steps == 2
  first, second = (loader.sequence_indices(step) for step in (0, 1))
  assert not np.array_equal(first, second)  # another packing

  def say(batch):
    return jax.jit(lambda batch: forward(params, averages, base, batch, setup))(
      jax.tree.map(jnp.asarray, batch)
    )

  monkeypatch.setattr(forward_module, "run_trunk", refuse_to_run)
  batches = [loader.batch(step) for step in (0, 1)]
  kept = [say(batch) for batch in batches]
  monkeypatch.undo()
  exact = [say(batch._replace(extras={})) for batch in batches]

  run_trunk = forward_module.run_trunk
  monkeypatch.setattr(
    forward_module,
    "run_trunk",
    lambda *arguments: run_trunk(*arguments).astype(jnp.bfloat16),
  )
  rounded = [say(batch._replace(extras={})) for batch in batches]
  for batch, got, want, loose in zip(
    batches, kept, rounded, exact, strict=True
  ):
    inside = batch.segment_ids > 0
    select = lambda tree, at=inside: jax.tree.map(lambda x: x[at], tree)  # noqa: E731
    tiny.assert_trees_close(select(got), select(want), rtol=1e-5, atol=1e-5)
    # What bfloat16 costs a float32 model: a value here is of size one.
    gap = np.abs(select(got).values - select(loose).values)
    assert 0 < gap.max() < 0.05


def test_a_bfloat16_model_loses_nothing(tmp_path):
  setup = make()
  config = dataclasses.replace(MODEL, dtype="bfloat16")
  setup = dataclasses.replace(setup, model=config)
  base = tiny.draw_params(config)
  params, _ = trained_state(setup, base)
  batch = loader_of(keep(tmp_path / "trunk", setup=setup)).batch(0)
  assert batch.extras[TRUNK].dtype == jnp.bfloat16

  def values(batch):
    return jax.jit(
      lambda batch: forward(params, None, base, batch, setup).critic
    )(jax.tree.map(jnp.asarray, batch))

  inside = batch.segment_ids > 0
  np.testing.assert_allclose(
    values(batch)[inside],
    values(batch._replace(extras={}))[inside],
    rtol=1e-5,
    atol=1e-5,
  )


def test_what_is_on_disk_is_read_and_not_made_again(tmp_path, monkeypatch):
  sequences = tiny.draw_sequences(6)
  # The same answer twice is held once.
  made = keep(tmp_path, sequences=sequences + sequences[:2])
  (content,) = tmp_path.glob("*.bf16")
  tokens = sum(len(sequence.tokens) for sequence in sequences)
  assert content.stat().st_size == tokens * MODEL.embed_dim * 2
  monkeypatch.setattr(trunk_module, "run_trunk", refuse_to_run)
  read = keep(tmp_path, sequences=sequences + sequences[:2])
  for one, other, sequence in zip(
    made, read, sequences + sequences[:2], strict=True
  ):
    states = one.extras[TRUNK]
    assert states.shape == (len(sequence.tokens), MODEL.embed_dim)
    assert np.abs(states.astype(np.float32)).max() > 0.1
    np.testing.assert_array_equal(states, other.extras[TRUNK])
    assert one._replace(extras={}) == sequence


def cut(content, seal):
  content.write_bytes(content.read_bytes()[:-1])


def flip(content, seal):
  data = bytearray(content.read_bytes())
  data[len(data) // 2] ^= 1
  content.write_bytes(bytes(data))


def garble(content, seal):
  seal.write_text("{")


def empty(content, seal):
  seal.write_text("[]")


def break_off(content, seal):
  seal.unlink()
  content.rename(content.with_name(content.name + ".partial"))


@pytest.mark.parametrize(
  "damage, message",
  [
    (cut, "not as long"),
    (flip, "was changed after"),
    (garble, "cannot be read"),
    (empty, "cannot be read"),
    (break_off, "does not hold the states of all"),
  ],
)
def test_a_damaged_store_is_made_again(tmp_path, caplog, damage, message):
  (made,) = keep(tmp_path, sequences=tiny.draw_sequences(1))
  want = np.array(made.extras[TRUNK])  # a copy: the file is about to change
  damage(next(tmp_path.glob("*.bf16")), next(tmp_path.glob("*.json")))
  with caplog.at_level(logging.WARNING, logger="absl"):
    (got,) = keep(tmp_path, sequences=tiny.draw_sequences(1))
  np.testing.assert_array_equal(got.extras[TRUNK], want)
  assert message in caplog.text and "made again" in caplog.text
  assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"sequences": tiny.draw_sequences(3, seed=1)}, "other tokens"),
    ({"base": tiny.draw_params(MODEL, seed=1)}, "other weights"),
    ({"setup": make(last=2)}, "other layers"),
    (
      {
        "setup": dataclasses.replace(
          make(), model=dataclasses.replace(MODEL, rope_theta=100.0)
        )
      },
      "other settings",
    ),
  ],
  ids=lambda value: value if isinstance(value, str) else "",
)
def test_states_of_something_else_are_made_again(
  tmp_path, caplog, changes, message
):
  given = {"sequences": tiny.draw_sequences(3)}
  before = np.array(keep(tmp_path, **given)[0].extras[TRUNK])
  with caplog.at_level(logging.WARNING, logger="absl"):
    after = keep(tmp_path, **given | changes)
  assert message in caplog.text
  assert not np.array_equal(before, after[0].extras[TRUNK])


def test_weights_above_the_trunk_do_not_matter(tmp_path, monkeypatch):
  keep(tmp_path)
  monkeypatch.setattr(trunk_module, "run_trunk", refuse_to_run)
  base = tiny.draw_params(MODEL)
  moved = jax.tree.map(lambda p: p.at[-1].add(1.0), base["layers"])
  keep(tmp_path, base={**base, "layers": moved})


def test_a_disk_without_room_is_an_error_before_anything_runs(
  tmp_path, monkeypatch
):
  monkeypatch.setattr(trunk_module, "run_trunk", refuse_to_run)
  usage = type(trunk_module.shutil.disk_usage(tmp_path))
  monkeypatch.setattr(
    trunk_module.shutil, "disk_usage", lambda path: usage(10, 9, 1)
  )
  tokens = sum(len(sequence.tokens) for sequence in tiny.draw_sequences(12))
  with pytest.raises(ConfigError, match="keep_trunk=False") as error:
    keep(tmp_path / "trunk")
  assert f"{tokens} tokens x 16 x 2 bytes" in str(error.value)


def test_a_stage_without_shared_layers_keeps_nothing(tmp_path):
  setup = make(lora=False, critic="separate")
  sequences = tiny.draw_sequences(3)
  assert keep(tmp_path / "trunk", sequences=sequences, setup=setup) == sequences
  assert not (tmp_path / "trunk").exists()


def test_the_config_asks_for_adapters_above_a_trunk():
  config = Config(
    train=TrainConfig(keep_trunk=True), lora=LoraConfig(last_layers=1)
  )
  with pytest.raises(ConfigError, match="lora.policy=True or critic.kind=lora"):
    config.validate()
  dataclasses.replace(
    config, lora=LoraConfig(last_layers=1, policy=True)
  ).validate()


def test_pairs_stay_pairs_and_long_sequences_are_left_alone(tmp_path):
  sequences = tiny.draw_sequences(4)
  long = tiny.draw_sequences(30, longest=40)
  long = max(long, key=lambda sequence: len(sequence.tokens))
  pairs = [tuple(sequences[:2]), tuple(sequences[2:]), (sequences[0], long)]
  again = keep(tmp_path, sequences=pairs)
  assert [len(pair) for pair in again] == [2, 2, 2]
  assert TRUNK not in again[2][1].extras
  batch = loader_of(again, on_long="skip").batch(0)
  assert np.abs(batch.extras[TRUNK].astype(np.float32)).max() > 0


def test_the_trunk_runs_on_answers_that_were_rotated(tmp_path):
  setup, base = make("kto"), tiny.draw_params(MODEL)
  loader = loader_of(keep(tmp_path / "trunk"))
  batch = setup.objective.batch(loader, 0)
  assert TRUNK in batch.rows.extras and TRUNK not in batch.mismatched.extras
  state = init_state(jax.random.key(0), setup, base)
  step = make_train_step(setup, state, tiny.mesh())
  with jax.set_mesh(tiny.mesh()):
    _, metrics = step(state, base, shard_batch(batch, tiny.mesh()))
  assert np.isfinite(float(metrics["loss"]))


def test_a_mesh_makes_the_same_states(tmp_path):
  mesh = tiny.mesh(data=2, fsdp=2, tensor=2)
  want = keep(tmp_path / "one")
  base = tiny.place(tiny.draw_params(MODEL), MODEL, mesh)
  got = keep(tmp_path / "eight", base=base, mesh=mesh)
  for one, other in zip(got, want, strict=True):
    # A value that lies between two bfloat16 may be rounded to either.
    np.testing.assert_allclose(
      one.extras[TRUNK].astype(np.float32),
      other.extras[TRUNK].astype(np.float32),
      rtol=1e-2,
      atol=1e-2,
    )


def test_local_rows_undo_shard_batch():
  rows = np.arange(16.0).reshape(8, 2)
  for sizes in ({}, {"data": 2, "fsdp": 2, "tensor": 2}, {"data": 8}):
    mesh = tiny.mesh(**sizes)
    np.testing.assert_array_equal(
      local_rows(shard_batch(rows, mesh), mesh), rows
    )


_SHARED = """
import numpy as np
from oracles import tiny
from oracles.adapters import MODEL, keep
from oreo_jax.train.forward import TRUNK
from oreo_jax.config import MeshConfig
from oreo_jax.sharding import make_mesh

mesh = make_mesh(MeshConfig(data=2, tensor=2))
base = tiny.place(tiny.draw_params(MODEL), MODEL, mesh)
states = keep(sys.argv[4], base=base, mesh=mesh)
total = sum(s.extras[TRUNK].astype(np.float64).sum() for s in states)
print("total", round(float(total), 3))
"""


@pytest.mark.slow
def test_each_process_writes_its_rows_and_reads_all(tmp_path, monkeypatch):
  folder = tmp_path / "trunk"
  outputs = processes.run(_SHARED, folder, processes=2, devices=2)
  totals = {
    line
    for output in outputs
    for line in output.splitlines()
    if line.startswith("total")
  }
  assert len(totals) == 1
  seals = sorted(folder.glob("*.json"))
  assert [seal.stem for seal in seals] == [
    "states-0-of-2",
    "states-1-of-2",
  ]
  held = [json.loads(seal.read_text())["sequences"] for seal in seals]
  assert all(held) and sorted(held[0] + held[1]) == list(range(12))
  # Another number of processes reads the same files.
  monkeypatch.setattr(trunk_module, "run_trunk", refuse_to_run)
  keep(folder)
