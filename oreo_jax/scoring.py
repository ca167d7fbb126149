"""What networks say of packed sequences, on a mesh.

Held-out AUC during training, the analysis of trajectories, and worked examples
all ask the same: run some networks over sequences of any length, and hand back,
for every sequence, what they say of its action tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from oreo_jax import data, hosts, models
from oreo_jax.config import ModelConfig
from oreo_jax.models import Params
from oreo_jax.progress import Progress
from oreo_jax.sharding import (
  batch_sharding,
  replicated,
  rows_that_divide,
  shard_whole_batch,
)
from oreo_jax.train.forward import REF_LOGPS
from oreo_jax.train.head import token_logprobs

# (trees of parameters..., batch) -> arrays [B, T] by name, aligned on the
# predicted token.
Networks = Callable[..., dict[str, jax.Array]]

# Rows for sequences longer than the usual row are rounded up to this, so that
# few shapes are compiled.
_ROUND_UP = 64


class Scorer:
  """Runs networks over the same sequences, once or at every measurement.

  Sequences are packed into rows of `row_length`; those that are longer get
  rows of their own length. The networks are compiled once a shape.
  """

  def __init__(
    self,
    sequences: Sequence[data.Tokenized],
    networks: Networks,
    mesh: Mesh,
    *,
    row_length: int,
    batch_size: int,
    description: str = "",
  ):
    """Packs the sequences; nothing runs yet.

    Args:
      sequences: the trajectories, at least one.
      networks: (trees..., batch) -> {name: f32[B, T]}; pure.
      mesh: the device mesh.
      row_length: slots of a usual row.
      batch_size: rows of `row_length` that are run together.
      description: shown beside a progress bar; empty shows none.
    """
    self._count = len(sequences)
    self._mesh = mesh
    self._description = description
    # (loader, the place of each of its sequences among all)
    self._loaders: list[tuple[data.Loader, np.ndarray]] = []
    slots = np.array([len(s.tokens) - 1 for s in sequences])
    for fits in (slots <= row_length, slots > row_length):
      places = np.flatnonzero(fits)
      if not places.size:
        continue
      longest = int(slots[places].max())
      length = row_length
      if longest > row_length:
        length = -(-longest // _ROUND_UP) * _ROUND_UP
      rows = max(batch_size * row_length // length, 1)
      loader = data.make_loader(
        [sequences[place] for place in places.tolist()],
        batch_size=rows_that_divide(rows, mesh),
        row_length=length,
        shuffle=False,
      )
      self._loaders.append((loader, places))
    self._run = jax.jit(
      lambda trees, batch: networks(*trees, batch),
      in_shardings=(None, batch_sharding(mesh)),
      out_shardings=replicated(mesh),
    )

  def __call__(self, *trees: Any) -> list[dict[str, np.ndarray]]:
    """Returns, for every sequence in order, {name: f32[action tokens]}.

    Args:
      *trees: the parameters that the networks take before the batch.
    """
    scores: list[dict[str, np.ndarray]] = [{} for _ in range(self._count)]
    with Progress(
      self._count,
      self._description,
      unit="answer",
      enabled=bool(self._description) and hosts.is_chief(),
    ) as progress:
      for loader, places in self._loaders:
        for step in range(loader.num_steps):
          batch = loader.batch(step)
          rows = shard_whole_batch(batch, self._mesh)
          arrays = hosts.to_host(self._run(trees, rows))
          for row, members in enumerate(loader.sequence_indices(step)):
            for segment, member in enumerate(members, start=1):
              if member < 0:
                continue
              inside = batch.segment_ids[row] == segment
              inside &= batch.action_mask[row]
              scores[places[member]] = {
                name: array[row][inside] for name, array in arrays.items()
              }
              progress.update()
    return scores


def value_network(config: ModelConfig) -> Networks:
  """Returns networks (critic, batch) -> {"values": V before each token}."""

  def run(critic: Params, batch: data.Batch) -> dict[str, jax.Array]:
    return {"values": models.values(critic, _hidden(critic, batch, config))}

  return run


def policy_logps(
  config: ModelConfig, chunk_size: int, vocab_chunk: int
) -> Networks:
  """Returns networks (policy, batch) -> {"logps": log pi of each token}.

  Args:
    config: the architecture.
    chunk_size: positions of a chunk of the output head.
    vocab_chunk: columns of a chunk of it.
  """

  def run(policy: Params, batch: data.Batch) -> dict[str, jax.Array]:
    tokens = token_logprobs(
      _hidden(policy, batch, config),
      models.head_matrix(policy, config),
      batch.targets,
      mask=batch.action_mask,
      chunk_size=chunk_size,
      vocab_chunk=vocab_chunk,
      logit_scale=config.logit_scale,
    )
    return {"logps": tokens.logps}

  return run


def store_reference(
  sequences: Sequence[data.Group],
  base: Params,
  config: ModelConfig,
  mesh: Mesh,
  *,
  row_length: int,
  batch_size: int,
  chunk_size: int,
  vocab_chunk: int,
) -> list[data.Group]:
  """Gives every sequence the log-probabilities of the frozen reference.

  Args:
    sequences: what a loader packs; those longer than a row stay as they are.
    base: the reference.
    config: its architecture.
    mesh: the device mesh.
    row_length: slots of a row.
    batch_size: rows that are run together.
    chunk_size: positions of a chunk of the output head.
    vocab_chunk: columns of a chunk of it.

  Returns:
    The sequences with `train.forward.REF_LOGPS` among their extras, f32[L];
    that of the first token, which nothing predicts, is 0.
  """
  unique = data.unique_sequences(sequences, row_length=row_length)
  # A scorer says of action tokens what the networks say: here all are wanted.
  everything = [
    s._replace(action_mask=np.ones(len(s.tokens), bool))
    for s in unique.values()
  ]
  scorer = Scorer(
    everything,
    policy_logps(config, chunk_size, vocab_chunk),
    mesh,
    row_length=row_length,
    batch_size=batch_size,
    description="reference",
  )
  first = np.zeros(1, np.float32)
  logps = [np.concatenate([first, score["logps"]]) for score in scorer(base)]
  arrays = dict(zip(unique, logps, strict=True))
  return data.add_extra(sequences, REF_LOGPS, arrays)


def _hidden(
  params: Params, batch: data.Batch, config: ModelConfig
) -> jax.Array:
  return models.apply(
    params,
    batch.tokens,
    config,
    positions=batch.positions,
    segment_ids=batch.segment_ids,
  ).hidden
