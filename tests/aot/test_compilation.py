"""The real step, made from a config alone, for eight simulated devices."""

import dataclasses

import jax
import pytest
from aot.tiny_step import maze_config

from oreo_jax import memory, models, train
from oreo_jax.aot import compilation, jobs, program
from oreo_jax.config import ConfigError
from oreo_jax.models.presets import preset
from oreo_jax.progress import Progress
from oreo_jax.sharding import make_mesh
from oreo_jax.stages.aot import describe


@pytest.mark.slow
def test_bytes_of_arguments_are_those_of_the_shards(answer):
  # From real arrays, whose shards this machine holds.
  config = maze_config()
  mesh = make_mesh(config.mesh)
  sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  base = jax.jit(models.init, static_argnames="config", out_shardings=sharding)(
    jax.random.key(0), config=config.model
  )
  setup = train.make_setup(
    config, train.get_objective(config.train.objective), 1000
  )

  def fresh(base):
    return train.init_state(jax.random.key(0), setup, base)

  shardings = train.state_shardings(setup, jax.eval_shape(fresh, base), mesh)
  state = jax.jit(fresh, out_shardings=shardings)(base)

  def held(tree):
    first = mesh.devices.flat[0]
    return sum(
      shard.data.nbytes
      for leaf in jax.tree.leaves(tree)
      for shard in leaf.addressable_shards
      if shard.device == first
    )

  arguments = answer["memory"]["arguments"]
  assert arguments["weights of policy"] == held(state.params["policy"])
  assert arguments["weights of critic"] == held(state.params["critic"])
  assert arguments["optimiser"] == held((state.step, state.opt_state))
  # Tokens, targets, positions, segments, rewards: 4 bytes; two masks: 1 byte.
  rows = 16 // 4
  assert arguments["batch"] == rows * config.data.row_length * (5 * 4 + 2)
  assert arguments["reference"] < held(base)  # whole here, in shards there


def test_an_answer_says_all_there_is_to_say(answer):
  assert answer["fits"] and answer["message"] == ""
  assert answer["mesh"] == {"dcn_data": 1, "data": 1, "fsdp": 4, "tensor": 2}
  assert answer["tokens"] == 16 * maze_config().data.row_length
  assert answer["compile_s"] > 0
  assert answer["memory"]["peak"] >= answer["memory"]["arguments_total"]
  assert answer["unknown_loops"] == []
  assert "all-gather" in answer["collectives"]
  for item in answer["collectives"].values():
    assert item["sent"] >= item["largest"]["sent"] > 0
  lines = {item["largest"]["line"] for item in answer["collectives"].values()}
  assert any(line.split(":")[0].endswith(".py") for line in lines)
  roofline = answer["roofline"]
  times = [roofline[f"{name}_s"] for name in ("compute", "hbm", "ici")]
  assert roofline["step_s"] == max(*times, roofline["network_s"])
  assert 0 < roofline["mfu"] < 1


def test_a_device_computes_its_share_of_the_step(answer):
  # Rows and heads are split over all eight devices; what the program does
  # more than the mathematics are full scores where causal ones would do.
  share = answer["model_flops"] / answer["devices"]
  assert share < answer["flops"] < 3 * share


def test_a_program_whose_arguments_do_not_fit_is_not_compiled(monkeypatch):
  def refuse(*unused):
    raise AssertionError("it was lowered")

  config = maze_config(hbm_gib=1e-6)
  made = program.train_program(config, make_mesh(config.mesh))
  monkeypatch.setitem(
    compilation.PROGRAMS, "train", lambda *_: made._replace(lower=refuse)
  )
  answer = compilation.compile_program(config)
  assert not answer["fits"]
  assert "arguments alone" in answer["message"]
  assert "flops" not in answer


def test_what_the_compiler_says_is_kept(monkeypatch):
  words = (
    "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in "
    "memory space hbm. Used 29.50G of 15.75G hbm. Exceeded hbm capacity by "
    "13.75G.\n\nTotal hbm usage >= 29.75G:\n"
  )

  class Refused:
    def compile(self, compiler_options):
      raise jax.errors.JaxRuntimeError(words)

  config = maze_config()
  made = program.train_program(config, make_mesh(config.mesh))
  monkeypatch.setitem(
    compilation.PROGRAMS, "train", lambda *_: made._replace(lower=Refused)
  )
  answer = compilation.compile_program(config)
  assert not answer["fits"] and answer["message"] == words.strip()
  assert compilation.short_message(words) == (
    "Used 29.50G of 15.75G hbm. Exceeded hbm capacity by 13.75G."
  )


def test_a_program_without_a_text_is_judged_by_its_memory(monkeypatch):
  class Compiled:
    def memory_analysis(self):
      return None

    def as_text(self):
      raise RuntimeError("UNIMPLEMENTED: no text")

  class Lowered:
    def compile(self, compiler_options):
      return Compiled()

  config = maze_config()
  made = program.train_program(config, make_mesh(config.mesh))
  monkeypatch.setitem(
    compilation.PROGRAMS, "train", lambda *_: made._replace(lower=Lowered)
  )
  answer = compilation.compile_program(config)
  assert answer["fits"] and "flops" not in answer
  assert describe(answer)[-1].startswith("the compiler gives no text")


def test_a_text_that_jax_cannot_read_is_taken_from_the_dump(tmp_path):
  class Unreadable:
    def as_text(self):
      raise jax.errors.JaxRuntimeError("INTERNAL: RET_CHECK failure")

  assert compilation._text(Unreadable(), tmp_path) == ""
  (tmp_path / "m0.jit_convert.after_codegen.txt").write_text("a constant")
  (tmp_path / "m1.jit_step.after_codegen.txt").write_text("the whole step")
  (tmp_path / "m1.jit_step.before_optimizations.txt").write_text("x" * 99)
  assert compilation._text(Unreadable(), tmp_path) == "the whole step"


def test_a_chip_that_is_not_in_the_table_is_refused():
  with pytest.raises(ConfigError, match=r"config\.aot\.chip: expected one of"):
    compilation.compile_program(maze_config(chip="v9"))


@pytest.mark.parametrize(
  "objective", ["rejection", "dpo", "kto", "dqo", "value"]
)
def test_every_objective_has_a_program(objective):
  config = maze_config()
  config = dataclasses.replace(
    config,
    train=dataclasses.replace(config.train, objective=objective),
  )
  made = program.train_program(config, make_mesh(config.mesh))
  assert made.model_flops > 0
  assert memory.bytes_on_device(made.arguments["batch"]) > 0


def test_sampling_is_counted_to_the_longest_answer():
  config = maze_config()
  config.aot.what = "decode"
  config.mesh.fsdp, config.mesh.tensor = 8, 1
  config.collect = dataclasses.replace(
    config.collect, batch_size=32, samples=2, max_new_tokens=7
  )
  answer = compilation.compile_program(config)
  assert answer["fits"] and answer["tokens"] == 32 * 7
  assert len(answer["unknown_loops"]) == 1  # it ends when all answers have
  # The policy is laid out anew: with fsdp all weights would be gathered again
  # for every token.
  assert answer["mesh"] == {"dcn_data": 1, "data": 8, "fsdp": 1, "tensor": 1}
  assert sum(c["sent"] for c in answer["collectives"].values()) < 100
  share = answer["model_flops"] / answer["devices"]
  assert share < answer["flops"] < 3 * share


def test_a_search_is_counted_to_its_last_step():
  config = maze_config()
  config.aot.what = "search"
  config.mesh.fsdp, config.mesh.tensor = 8, 1
  config.evaluate = dataclasses.replace(
    config.evaluate,
    batch_size=32,
    budgets=(1, 2),
    max_new_tokens=12,
    max_steps=3,
    max_step_tokens=6,
  )
  answer = compilation.compile_program(config)
  # Eight questions of 2 x 2 candidates, three steps of four tokens.
  assert answer["fits"] and answer["tokens"] == 8 * 4 * 12
  arguments = answer["memory"]["arguments"]
  assert arguments["weights of critic"] > 0
  # Steps end when all beams have left, and proposals when all have ended.
  assert len(answer["unknown_loops"]) == 2
  # Neither network's weights are gathered.
  assert answer["mesh"] == {"dcn_data": 1, "data": 8, "fsdp": 1, "tensor": 1}
  sent = sum(item["sent"] for item in answer["collectives"].values())
  assert sent < arguments["weights of critic"] / 8
  share = answer["model_flops"] / answer["devices"]
  assert share < answer["flops"] < 5 * share


@pytest.mark.slow
def test_slices_exchange_gradients_and_nothing_else(tmp_path):
  pytest.importorskip("libtpu", reason="needs the TPU compiler: libtpu")
  model = preset(
    "tiny-qwen2", vocab_size=2048, embed_dim=256, head_dim=128, mlp_dim=1024
  )
  config = dataclasses.replace(
    maze_config(),
    model=dataclasses.replace(model, dtype="bfloat16", remat="full"),
    mesh=dataclasses.replace(
      maze_config().mesh, data=1, fsdp=4, tensor=1, dcn_data=2
    ),
  )
  config.aot.topology, config.aot.num_slices = "v5e:2x2", 2
  config.train.batch_size = 32
  layouts = [
    dataclasses.replace(
      config, train=dataclasses.replace(config.train, grad_accum=parts)
    )
    for parts in (1, 4)
  ]
  # In processes of their own, which start with what the compiler needs.
  with Progress(2, "aot", enabled=False) as progress:
    answers = jobs.compile_all(layouts, tmp_path, jobs=1, progress=progress)
  for answer in answers:
    assert answer["fits"], answer["message"]
    assert_gradients_cross_once(answer)


def assert_gradients_cross_once(answer):
  arguments = answer["memory"]["arguments"]
  # Of two slices each sends its sums once, in bfloat16 for the layers, or in
  # float32 where they are sums of micro-batches. The padding of small arrays to
  # tiles, and what the means are divided by, come on top.
  gradients = sum(
    size for name, size in arguments.items() if name.startswith("weights")
  )
  crossing = {
    name: item
    for name, item in answer["collectives"].items()
    if name.endswith("between slices")
  }
  assert list(crossing) == ["all-reduce between slices"]
  sent = crossing["all-reduce between slices"]["sent"]
  assert 0.4 * gradients < sent < 1.5 * gradients
