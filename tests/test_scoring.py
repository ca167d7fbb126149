import numpy as np
import pytest
from oracles import tiny

from oreo_jax.scoring import Scorer


@pytest.mark.parametrize("row_length", [16, 4])
def test_every_sequence_gets_what_is_said_of_its_own_tokens(row_length):
  # With rows of 4 slots most sequences are longer and get rows of their own.
  sequences = tiny.draw_sequences(12, seed=4)
  mesh = tiny.mesh(data=2)
  scorer = Scorer(
    sequences,
    lambda shift, batch: {"targets": batch.targets + shift},
    mesh,
    row_length=row_length,
    batch_size=3,
  )
  for shift in (0, 5):
    scores = scorer(np.int32(shift))
    assert len(scores) == 12
    for sequence, score in zip(sequences, scores, strict=True):
      want = sequence.tokens[sequence.action_mask] + shift
      np.testing.assert_array_equal(score["targets"], want)
