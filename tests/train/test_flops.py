"""Model FLOPs against what the compiler counts in the step it made."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from oracles import tiny

from oreo_jax import models
from oreo_jax.config import (
  Config,
  CriticConfig,
  LoraConfig,
  ModelConfig,
  SftConfig,
  TrainConfig,
)
from oreo_jax.data.packing import Batch
from oreo_jax.models.presets import preset
from oreo_jax.train import OBJECTIVES, init_state, make_setup, make_train_step
from oreo_jax.train.flops import step_flops
from oreo_jax.train.objectives.kto import KtoBatch
from oreo_jax.train.roles import BASE, needs_base, roles_of

# Wide enough that products of matrices outweigh all else. Layers unrolled and
# attention in one piece, since the compiler counts the body of a loop once, and
# nothing computed again.
MODEL = ModelConfig(
  vocab_size=512,
  embed_dim=256,
  num_layers=3,
  num_heads=4,
  num_kv_heads=2,
  head_dim=64,
  mlp_dim=512,
  unroll=3,
  attention="reference",
  remat="none",
)
ROWS, SLOTS = 4, 128


@pytest.fixture(autouse=True, scope="module")
def _compile_well():
  # Without optimisation the compiler keeps products that nobody reads.
  jax.config.update("jax_disable_most_optimizations", False)
  yield
  jax.config.update("jax_disable_most_optimizations", True)


def make(objective, *, model=MODEL, critic="separate", lora=None, **changes):
  config = Config(
    model=dataclasses.replace(model),
    critic=CriticConfig(kind=critic),
    lora=lora or LoraConfig(),
  )
  stage = {"batch_size": ROWS, **changes}
  if objective == "sft":
    config.sft = SftConfig(**stage)
  else:
    config.train = TrainConfig(objective=objective, **stage)
  config.validate()
  return make_setup(config, OBJECTIVES[objective], 8, max_segments=4)


def compiled_flops(setup):
  """What the compiler says of the step, compiled from shapes alone."""

  def shape(dtype):
    return jax.ShapeDtypeStruct((ROWS, SLOTS), dtype)

  tokens, mask = shape(jnp.int32), shape(jnp.bool_)
  batch = Batch(tokens, tokens, tokens, tokens, mask, mask, shape(jnp.float32))
  if setup.objective.name == "kto":
    batch = KtoBatch(batch, batch)
  base = models.abstract_params(setup.model)
  state = jax.eval_shape(
    lambda base: init_state(jax.random.key(0), setup, base), base
  )
  mesh = tiny.mesh()
  with jax.set_mesh(mesh):
    step = make_train_step(setup, state, mesh)
    ref = base if needs_base(setup) else None
    return step.lower(state, ref, batch).compile().cost_analysis()["flops"]


ADAPTERS = LoraConfig(policy=True, rank=8)


@pytest.mark.parametrize(
  "setup",
  [
    pytest.param(make("sft"), marks=pytest.mark.slow),
    make("oreo"),
    make("oreo", critic="lora", lora=ADAPTERS),
    pytest.param(
      make(
        "oreo",
        critic="lora",
        lora=dataclasses.replace(ADAPTERS, last_layers=1),
      ),
      marks=pytest.mark.slow,
    ),
    pytest.param(make("oreo", critic="shared"), marks=pytest.mark.slow),
    pytest.param(make("oreo", ema_decay=0.9), marks=pytest.mark.slow),
    pytest.param(make("value", critic="shared"), marks=pytest.mark.slow),
    pytest.param(make("kto"), marks=pytest.mark.slow),
    pytest.param(
      make(
        "value",
        critic="lora",
        lora=LoraConfig(rank=8, last_layers=2, targets=("gate", "up")),
      ),
      marks=pytest.mark.slow,
    ),
  ],
  ids=lambda setup: f"{setup.objective.name}-{setup.critic_kind}",
)
def test_model_flops_are_what_the_compiler_counts(setup):
  counted = sum(step_flops(setup, ROWS, SLOTS, causal=False).values())
  # In the lowest layer with adapters all networks on the base still have the
  # same input, and the compiler finds that the base's own part of q, k and v
  # is the same product in each. The closed form counts it for each.
  on_base = sum(role.trunk(setup) == BASE for role in roles_of(setup))
  heads = MODEL.num_heads + 2 * MODEL.num_kv_heads
  product = 2 * MODEL.embed_dim * heads * MODEL.head_dim
  counted -= max(on_base - 1, 0) * product * ROWS * SLOTS
  # Beside products the compiler counts norms, softmax and AdamW: 1 to 2%.
  assert compiled_flops(setup) == pytest.approx(counted, rel=0.025)


def test_a_model_trained_whole_costs_six_flops_a_weight():
  # 1.54e9 weights with the head's, 1.31e9 of them in the layers (model card).
  model = preset("Qwen/Qwen2.5-Math-1.5B")
  setup = make("sft", model=model)
  flops = step_flops(setup, 1, 2048)
  attention = 3 * 4 * 12 * 128 * (2048 + 1) / 2 * model.num_layers
  assert flops.keys() == {"policy"}
  assert flops["policy"] / 2048 - attention == pytest.approx(
    6 * 1.54e9, rel=0.005
  )


def test_layers_that_networks_share_are_counted_once():
  lora = dataclasses.replace(ADAPTERS, last_layers=1)
  flops = step_flops(make("oreo", critic="lora", lora=lora), ROWS, SLOTS)
  plain = step_flops(make("oreo"), ROWS, SLOTS)["reference"]
  head = 2 * MODEL.embed_dim * MODEL.vocab_size * ROWS * SLOTS
  layer = (plain - head) / MODEL.num_layers
  assert flops["trunk"] == pytest.approx(2 * layer)
  assert flops["reference"] == pytest.approx(layer + head)
  kept = step_flops(
    make("oreo", critic="lora", lora=lora, keep_trunk=True), ROWS, SLOTS
  )
  assert kept == {**flops, "trunk": 0.0}


def test_roles_cost_what_they_do():
  full = step_flops(make("oreo"), ROWS, SLOTS)
  # Forward alone, and forward with a backward pass twice its size.
  assert full["policy"] == pytest.approx(3 * full["reference"])
  head = 6 * MODEL.embed_dim * (MODEL.vocab_size - 1) * ROWS * SLOTS
  assert full["critic"] == pytest.approx(full["policy"] - head)
  # Layers without adapters below the adapted ones have no backward pass.
  costs = [
    step_flops(
      make("oreo", critic="lora", lora=dataclasses.replace(ADAPTERS, **layers)),
      ROWS,
      SLOTS,
    )["critic"]
    for layers in ({"last_layers": 1}, {"last_layers": 2}, {"last_layers": 3})
  ]
  assert costs[1] - costs[0] == pytest.approx(costs[2] - costs[1])


@pytest.mark.parametrize("window", [0, 3, 8, 100])
def test_attention_counts_each_query_its_own_keys(window):
  model = dataclasses.replace(MODEL, sliding_window=window)
  causal, dense = (
    step_flops(make("sft", model=model), 1, 8, causal=causal)["policy"]
    for causal in (True, False)
  )
  keys = sum(min(t, window or 8) for t in range(1, 9))
  a_key = 3 * 4 * MODEL.num_heads * MODEL.head_dim * MODEL.num_layers
  assert dense - causal == pytest.approx(a_key * (64 - keys))
