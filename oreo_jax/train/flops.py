"""How many floating-point operations a training step asks for.

Model FLOPs, as in the PaLM paper (arXiv 2204.02311, appendix B): the products
of matrices that the mathematics of the step needs, a multiplication and an
addition counted as two. What a program does beside them is left out: norms,
softmax, optimisers, and whatever rematerialisation computes twice. So two
programs for the same step have the same model FLOPs, and the share of a chip's
peak that they come to (MFU) says which of them is better.

A product with W weights costs a token

    2 W   forward,
    2 W   for the gradient of its input,
    2 W   for the gradient of its weights.

A network whose weights are all trained pays all three (the 6 N of a model of N
weights outside the embedding), a frozen one the first, and one with adapters
the first two, from the lowest adapted layer up, beside all three of its
adapters. Attention has no weights: its two products cost 4 N H a key and query
forward and twice that backward.
"""

from __future__ import annotations

from oreo_jax.config import ModelConfig, TrainConfig
from oreo_jax.train.roles import BASE, Role, roles_of, trunk_depth
from oreo_jax.train.setup import Setup

# The projections of a layer in the order in which activations pass them.
# Gradients pass them the other way round.
_ORDER = (("q", "k", "v"), ("o",), ("gate", "up"), ("down",))


def step_flops(
  setup: Setup, rows: int, length: int, *, causal: bool = True
) -> dict[str, float]:
  """Returns the model FLOPs of one training step by role.

  Padding counts as tokens do: a step computes it like them.

  Args:
    setup: what is fixed during the stage.
    rows: of the whole batch, B.
    length: slots of a row, T.
    causal: count the keys up to each query's own; otherwise all T of the row,
      as an attention does that masks what it has computed.

  Returns:
    FLOPs of each network that is run, and under "trunk" those of the layers
    that several of them share; their sum is the step's.
  """
  tokens = rows * length
  # `prepare` may run the networks over another batch of the same size.
  passes = 1 + setup.objective.extra_forwards
  flops = {
    role.name: tokens
    * (
      passes * _forward(role, setup, length, causal)
      + _backward(role, setup, length, causal)
    )
    for role in roles_of(setup)
    if role.head
  }
  shared = trunk_depth(setup)
  if shared:
    # With `keep_trunk` its states come with the batch, but not with the one
    # that `prepare` makes.
    stage = setup.stage
    is_kept = isinstance(stage, TrainConfig) and stage.keep_trunk
    layers = shared * (passes - is_kept)
    flops["trunk"] = tokens * layers * _layer(setup.model, length, causal)
  return flops


def _forward(role: Role, setup: Setup, length: int, causal: bool) -> float:
  """Returns the FLOPs of a token's forward pass above the shared layers."""
  config, trunk = role.config(setup), role.trunk(setup)
  head = 2 * _head_weights(role, config)
  if trunk and trunk != BASE:
    return head  # the trunk is another role's, which has been run
  shared = trunk_depth(setup) if trunk == BASE else 0
  return (config.num_layers - shared) * _layer(config, length, causal) + head


def _layer(config: ModelConfig, length: int, causal: bool) -> float:
  """Returns the FLOPs of a token's way through one layer."""
  weights = sum(_weights(config).values())
  adapters = sum(_adapter_weights(config).values())
  return 2 * (weights + adapters) + _attention(config, length, causal)


def _backward(role: Role, setup: Setup, length: int, causal: bool) -> float:
  """Returns the FLOPs of a token's backward pass."""
  if role.optimizer is None:
    return 0.0
  config, trunk = role.config(setup), role.trunk(setup)
  head_weights = _head_weights(role, config)
  if not trunk:
    return 2 * _forward(role, setup, length, causal)
  # A value head has weights that are trained; a vocabulary is the base's.
  of_head = 2 * head_weights if role.head == "value" else 0.0
  if not config.lora_rank:
    # Of the role's own there is the head alone. If its trunk is the policy's,
    # the gradient goes on into the trunk, whose own role counts that.
    return of_head + (0.0 if trunk == BASE else 2 * head_weights)
  of_head += 2 * head_weights
  if trunk != BASE:
    return of_head

  weights, adapters = _weights(config), _adapter_weights(config)
  layer = (
    2 * sum(weights.values())
    + 4 * sum(adapters.values())
    + 2 * _attention(config, length, causal)
  )
  layers = config.lora_layers or config.num_layers
  return layers * layer - _saved_below(config, length, causal) + of_head


def _saved_below(config: ModelConfig, length: int, causal: bool) -> float:
  """Returns what the lowest adapted layer's backward pass does not need.

  Nothing is trained below it, so gradients end at the first of its adapters.
  """
  weights, adapters = _weights(config), _adapter_weights(config)
  first = next(
    place
    for place, names in enumerate(_ORDER)
    if set(names) & set(config.lora_targets)
  )
  saved = 0.0
  for names in _ORDER[: first + 1]:
    for name in names:
      inputs, _ = _sizes(config)[name]
      saved += 2 * weights[name]
      if adapters[name]:
        saved += 2 * config.lora_rank * inputs
  if first > 0:
    saved += 2 * _attention(config, length, causal)
  return saved


def _sizes(config: ModelConfig) -> dict[str, tuple[int, int]]:
  """Returns inputs and outputs of each projection of a layer."""
  c = config
  heads, kv_heads = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
  return {
    "q": (c.embed_dim, heads),
    "k": (c.embed_dim, kv_heads),
    "v": (c.embed_dim, kv_heads),
    "o": (heads, c.embed_dim),
    "gate": (c.embed_dim, c.mlp_dim),
    "up": (c.embed_dim, c.mlp_dim),
    "down": (c.mlp_dim, c.embed_dim),
  }


def _weights(config: ModelConfig) -> dict[str, int]:
  """Returns the weights of each projection of a layer."""
  return {
    n: inputs * outputs for n, (inputs, outputs) in _sizes(config).items()
  }


def _adapter_weights(config: ModelConfig) -> dict[str, int]:
  """Returns the weights of each projection's adapter; 0 without one."""
  return {
    name: config.lora_rank * (inputs + outputs)
    if name in config.lora_targets
    else 0
    for name, (inputs, outputs) in _sizes(config).items()
  }


def _head_weights(role: Role, config: ModelConfig) -> int:
  return config.embed_dim * (1 if role.head == "value" else config.vocab_size)


def _attention(config: ModelConfig, length: int, causal: bool) -> float:
  """Returns the FLOPs of a token's scores and mixed values in one layer."""
  keys = float(length)
  if causal:
    # Query t sees t keys, or the last `window` of them.
    window = min(config.sliding_window or length, length)
    keys = window - window * (window - 1) / (2 * length)
  return 4 * config.num_heads * config.head_dim * keys
