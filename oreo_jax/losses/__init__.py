"""Losses for offline reasoning, as pure functions of arrays.

Nothing here knows of models, configs or the rest of the package. The module
installs and imports with jax and numpy alone, so that any JAX project can use
it. Gradients stop here and nowhere else.
"""

from oreo_jax.losses.dqo import dqo_loss
from oreo_jax.losses.kl import alpha_loss, kl_k3
from oreo_jax.losses.logprobs import TokenLogprobs, token_logprobs
from oreo_jax.losses.metrics import summarize_metrics
from oreo_jax.losses.oreo import (
  oreo_loss,
  policy_loss,
  soft_bellman_residuals,
  value_loss,
)
from oreo_jax.losses.paths import count_positive
from oreo_jax.losses.preference import (
  DpoLoss,
  KtoLoss,
  SequenceLogps,
  dpo_loss,
  kto_loss,
  kto_z0,
  sequence_logps,
  split_pairs,
)
from oreo_jax.losses.regression import OreoLoss, Residuals
from oreo_jax.losses.segments import Count, count_mask
from oreo_jax.losses.supervised import sft_loss

__all__ = [
  "Count",
  "DpoLoss",
  "KtoLoss",
  "OreoLoss",
  "Residuals",
  "SequenceLogps",
  "TokenLogprobs",
  "alpha_loss",
  "count_mask",
  "count_positive",
  "dpo_loss",
  "dqo_loss",
  "kl_k3",
  "kto_loss",
  "kto_z0",
  "oreo_loss",
  "policy_loss",
  "sequence_logps",
  "sft_loss",
  "soft_bellman_residuals",
  "split_pairs",
  "summarize_metrics",
  "token_logprobs",
  "value_loss",
]
