"""Weights laid out to sample: as few gathers as can be, the same answers."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import tiny

from oreo_jax import models
from oreo_jax.aot import costs, groups, hlo
from oreo_jax.config import ConfigError, SamplingConfig
from oreo_jax.decode import GREEDY, Sampler, generate, slots
from oreo_jax.decode.continuous import answer_requests
from oreo_jax.decode.generate import run_batch
from oreo_jax.decode.layout import make_layout
from oreo_jax.decode.sampling import row_keys, sampling_rows
from oreo_jax.decode.schedule import Request
from oreo_jax.models.presets import preset

GIB = 2**30
KEY = jax.random.key(5)
TRAINING = {"data": 2, "fsdp": 4}
BFLOAT16 = dataclasses.replace(tiny.MODEL, dtype="bfloat16")
# How a copy of the weights may be spread over eight devices.
TENSOR = pytest.mark.parametrize("tensor", [1, 2, 4])


def layout_of(config=tiny.MODEL, mesh=None, memory=math.inf, **settings):
  heads = settings.pop("heads", ("lm",))
  mesh = mesh or tiny.mesh(**TRAINING)
  return make_layout(
    config, mesh, SamplingConfig(**settings), heads=heads, memory=memory
  )


@pytest.fixture(scope="module")
def params():
  return tiny.draw_params(scale=2.0)


# Weights by hand: the 1.5B model has 1.54e9 of them, which are 2.88 GiB in
# bfloat16; the 7B one 6.91e9, or 12.87 GiB. Half of the memory is theirs.
@pytest.mark.parametrize(
  ("name", "heads", "memory", "tensor"),
  [
    ("Qwen/Qwen2.5-Math-1.5B", ("lm",), 15.75 * GIB, 1),
    ("Qwen/Qwen2.5-Math-1.5B", ("lm", "value"), 15.75 * GIB, 1),
    ("Qwen/Qwen2.5-Math-1.5B", ("lm", "value"), 11 * GIB, 2),
    ("deepseek-ai/deepseek-math-7b-instruct", ("lm",), 31.25 * GIB, 1),
    ("deepseek-ai/deepseek-math-7b-instruct", ("lm",), 15.75 * GIB, 2),
    ("deepseek-ai/deepseek-math-7b-instruct", ("lm", "value"), 15.75 * GIB, 4),
  ],
)
def test_a_copy_is_spread_over_as_few_devices_as_have_room(
  name, heads, memory, tensor
):
  config = dataclasses.replace(preset(name), dtype="bfloat16")
  layout = layout_of(config, memory=memory, heads=heads)
  shape = layout.mesh.shape
  assert shape["tensor"] == tensor and shape["data"] == 8 // tensor
  assert shape["fsdp"] == 1


def test_weights_that_fit_nowhere_are_refused():
  config = dataclasses.replace(
    preset("deepseek-ai/deepseek-math-7b-instruct"), dtype="bfloat16"
  )
  with pytest.raises(ConfigError, match="over 8 devices .* 1.[67] GiB of 1.0"):
    layout_of(config, memory=GIB)
  with pytest.raises(ConfigError, match="tensor=3 does not divide the 8"):
    layout_of(tensor=3)


@TENSOR
def test_weights_arrive_as_they_are_computed_with(params, tensor):
  mesh = tiny.mesh(**TRAINING)
  layout = layout_of(BFLOAT16, tensor=tensor)
  placed = layout.place(tiny.place(params, tiny.MODEL, mesh))
  norm = ("scale", "value_head")
  for path, leaf in jax.tree_util.tree_leaves_with_path(placed):
    name = jax.tree_util.keystr(path)
    before = params
    for key in path:
      before = before[key.key]
    wide = path[-1].key in norm
    assert leaf.dtype == (jnp.float32 if wide else jnp.bfloat16), name
    np.testing.assert_array_equal(leaf, before.astype(leaf.dtype), name)
    sizes = leaf.sharding.mesh.shape
    assert (sizes["fsdp"], sizes["tensor"]) == (1, tensor)
  # The devices keep their order, so that arrays move within a program.
  assert list(layout.mesh.devices.flat) == list(mesh.devices.flat)
  heads = placed["layers"]["q"]["kernel"]
  assert heads.sharding.shard_shape(heads.shape)[2] == 4 // tensor


def test_a_lone_cpu_has_its_layers_apart(params):
  mesh = tiny.mesh()
  layout = layout_of(mesh=mesh)
  placed = layout.place(tiny.place(params, tiny.MODEL, mesh))
  assert layout.model == dataclasses.replace(tiny.MODEL, layers_apart=True)
  assert len(placed["layers"]) == tiny.MODEL.num_layers
  jax.tree.map(
    np.testing.assert_array_equal,
    models.stack_layers(placed, layout.model)[0],
    params,
  )
  options = {"max_new_tokens": 6, "eos_ids": (), "num_samples": 2}
  want, got = (
    generate(each, PROMPTS, KEY, config, **options)
    for each, config in ((params, tiny.MODEL), (placed, layout.model))
  )
  np.testing.assert_array_equal(got.tokens, want.tokens)


def test_weights_that_lie_well_are_not_copied(params):
  mesh = tiny.mesh(data=8)
  placed = tiny.place(params, tiny.MODEL, mesh)
  moved = layout_of(mesh=mesh).place(placed)
  for old, new in zip(*map(jax.tree.leaves, (placed, moved)), strict=True):
    for one, two in zip(
      old.addressable_shards, new.addressable_shards, strict=True
    ):
      here, there = (x.data.unsafe_buffer_pointer() for x in (one, two))
      assert here == there


def test_another_architecture_lies_in_the_same_way():
  layout = layout_of(dtype="bfloat16", cache="int8", weights="int8")
  other = dataclasses.replace(tiny.MODEL, num_layers=3)
  assert layout.of(other).model == dataclasses.replace(
    other, dtype="bfloat16", cache_dtype="int8", weight_dtype="int8"
  )


PROMPTS = [[3], [1, 5, 2, 9, 4], [7, 7], [2, 8, 1], [4] * 9, [6, 2], [5], [9]]


@TENSOR
def test_answers_are_those_of_one_device(params, tensor):
  options = {"max_new_tokens": 6, "eos_ids": (), "num_samples": 2}
  one = generate(params, PROMPTS, KEY, tiny.MODEL, **options)
  layout = layout_of(tensor=tensor)
  placed = layout.place(tiny.place(params, tiny.MODEL, tiny.mesh(**TRAINING)))
  with jax.set_mesh(layout.mesh):
    split = generate(placed, PROMPTS, KEY, layout.model, **options)
  np.testing.assert_array_equal(split.tokens, one.tokens)
  np.testing.assert_allclose(split.logps, one.logps, atol=5e-5)


@TENSOR
def test_slots_are_compiled_once_on_any_mesh(params, tensor, caplog):
  programs = slots.turn, slots.take_rows, slots.empty_slots, slots.read_into
  for each in programs:
    each.clear_cache()
  layout = layout_of(tensor=tensor)
  placed = layout.place(params)
  requests = [
    Request(np.array(prompt), number, range(3), GREEDY, 5)
    for number, prompt in enumerate(PROMPTS)
  ]
  with jax.set_mesh(layout.mesh), jax.log_compiles():
    answers = list(
      answer_requests(
        placed, requests, KEY, layout.model, eos_ids=(1,), slots=8
      )
    )
  assert len(answers) == 3 * len(PROMPTS)
  compiled = [record.getMessage() for record in caplog.records]
  for each in programs:
    start = f"Compiling jit({each.__name__}) "
    assert sum(line.startswith(start) for line in compiled) == 1, start
  one = generate(
    params,
    PROMPTS,
    KEY,
    tiny.MODEL,
    max_new_tokens=5,
    eos_ids=(1,),
    sampler=GREEDY,
  ).tokens
  for each in answers:
    answer = one[each.request, : len(each.tokens)]
    np.testing.assert_array_equal(each.tokens, answer)


@TENSOR
def test_no_token_gathers_weights_or_caches(tensor):
  config = dataclasses.replace(tiny.MODEL, num_kv_heads=4)
  layout = layout_of(config, tensor=tensor)
  rows, new = 16, 6
  sampler = Sampler(0.8, top_p=0.9)
  with jax.set_mesh(layout.mesh):
    compiled = run_batch.lower(
      layout.shapes(),
      np.zeros((8, 9), np.int32),
      np.ones(8, np.int32),
      row_keys(KEY, np.zeros(rows, np.int32), np.arange(rows)),
      sampling_rows([sampler] * rows),
      config=layout.model,
      eos_ids=(0,),
      max_new_tokens=new,
    ).compile()
  # A device's rows and heads of one layer of the smaller cache, the local one;
  # a gather of it, or of the smallest weight of a layer, would be larger.
  least = rows // (8 // tensor) * (4 // tensor) * new * 4 * 4
  moved = exchanges(compiled, new)
  assert all(item.payload < least for item in gathers(moved)), moved
  if tensor == 1:
    # Whether any row goes on, and whether any is random: a few flags.
    assert all(item.payload <= 16 for item in moved)


def exchanges(compiled, steps):
  """What devices send each other in a program, whose loop takes some steps."""
  counted = costs.count(
    hlo.parse(compiled.as_text()),
    groups.Slices([0] * 8),
    loop_lengths=(steps,),
  )
  return [item for item in counted.collectives if item.devices > 1]


def gathers(moved):
  return [x for x in moved if x.kind in ("all-gather", "all-to-all")]


@TENSOR
def test_slots_are_refilled_without_gathering_weights_or_caches(tensor):
  config = dataclasses.replace(tiny.MODEL, num_kv_heads=4)
  layout = layout_of(config, tensor=tensor)
  # Prompts are long here, so that a pool of them is more than anything else.
  groups_, share, room, new = 16, 2, 24, 6
  rows = groups_ * share
  none = np.zeros(rows, np.int32)
  sampling = sampling_rows([Sampler(0.8, top_p=0.9)] * rows)
  begin = slots.Begin(np.zeros(rows, bool), none, none, sampling, none, none)
  count = 8  # prompts that are read together
  weights = layout.shapes()
  with jax.set_mesh(layout.mesh):
    state = slots.empty_slots(
      KEY,
      config=layout.model,
      groups=groups_,
      rows_per_group=share,
      room=room,
      slots=new,
    )
    grown = slots.turn.lower(
      weights,
      state,
      begin,
      KEY,
      None,
      np.int32(new),
      np.int32(0),
      config=layout.model,
      eos_ids=(0,),
    ).compile()
    read = slots.read_into.lower(
      weights,
      state,
      np.zeros((count, room), np.int32),
      np.ones(count, np.int32),
      np.arange(count, dtype=np.int32),
      config=layout.model,
    ).compile()
  local = state.rows.cache.keys.nbytes // config.num_layers // 8
  moved = exchanges(grown, new)
  assert all(item.payload < local for item in gathers(moved)), moved
  # Which device has the group of a prompt is not known ahead, so that what was
  # read goes to all of those; the prompts that are there stay where they are.
  pool = state.shared.cache.keys.nbytes
  sent = [item.payload for item in gathers(exchanges(read, new))]
  assert max(sent) <= pool * count // groups_ // tensor


def test_fsdp_would_gather_every_weight_for_every_token():
  # What the test above looks for, and where: else it could never fail.
  mesh = tiny.mesh(**TRAINING)
  shapes = models.abstract_params(tiny.MODEL)
  params = tiny.place(
    jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes),
    tiny.MODEL,
    mesh,
  )
  with jax.set_mesh(mesh):
    compiled = run_batch.lower(
      params,
      np.zeros((8, 9), np.int32),
      np.ones(8, np.int32),
      row_keys(KEY, np.zeros(8, np.int32), np.arange(8)),
      sampling_rows([GREEDY] * 8),
      config=tiny.MODEL,
      eos_ids=(0,),
      max_new_tokens=6,
    ).compile()
  gathered = sum(
    item.payload * item.times
    for item in exchanges(compiled, 6)
    if item.kind == "all-gather" and item.times >= 6
  )
  layers = sum(x.size * 4 for x in jax.tree.leaves(params["layers"]))
  assert gathered > 6 * layers / 2
