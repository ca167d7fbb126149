"""The training loop: the only stateful part of training.

Batch = f(seed, step) and state = f(state, batch), so a run that is stopped,
by hand, by a pre-emption or by a crash, goes on from its last checkpoint as if
nothing had happened.
"""

from __future__ import annotations

import contextlib
import math
import pathlib
import signal
import threading
from collections.abc import Callable, Mapping

import jax
from absl import logging
from jax.sharding import Mesh

from oreo_jax import hosts
from oreo_jax.allocator import return_freed_memory
from oreo_jax.data.loader import Loader
from oreo_jax.metrics import MetricsWriter
from oreo_jax.models import Params
from oreo_jax.progress import Progress
from oreo_jax.sharding import shard_batch
from oreo_jax.train.checkpoint import Checkpoints, abstract_like
from oreo_jax.train.meter import Meter, brief
from oreo_jax.train.roles import needs_base
from oreo_jax.train.setup import Setup
from oreo_jax.train.state import TrainState, init_state, state_shardings
from oreo_jax.train.step import make_train_step
from oreo_jax.train.trace import StepTrace


class DivergedError(RuntimeError):
  """The loss or a gradient is not a finite number any more."""


class PreemptedError(RuntimeError):
  """The run was asked to stop; its state is saved."""


def fit(
  base: Params,
  loader: Loader,
  setup: Setup,
  *,
  mesh: Mesh,
  directory: str | pathlib.Path,
  seed: int = 0,
  critic: Params | None = None,
  start: Callable[[], Params] | None = None,
  description: str = "train",
  measure: Callable[[TrainState, Params], dict[str, float]] | None = None,
) -> TrainState:
  """Trains until `setup.num_steps`, resuming from `directory` if it can.

  Args:
    base: the frozen base, which is the reference too, and the policy to start
      from unless `start` is given.
    loader: gives the batch of every step.
    setup: what is fixed during the stage.
    mesh: the device mesh, in force while this runs.
    directory: gets `checkpoints/`, `metrics.jsonl`, TensorBoard files and,
      with `stage.profile`, `profile/`.
    seed: of fresh adapters.
    critic: a value network to go on with.
    start: makes the policy to start from, where it is more exact than `base`.
      It is called if there is no checkpoint, and what it returns is let go.
    description: shown beside the progress bar.
    measure: (state, base) -> figures, called every `measure_every` steps and
      after the last; written beside the losses. It raises FloatingPointError
      where the network gives what is not a finite number.

  Returns:
    The state after the last step.

  Raises:
    ConfigError: if `stage.profile` names a step that the stage has not.
    DivergedError: when the loss, a gradient or what is measured is not
      finite; the last checkpoint stays.
    PreemptedError: after a SIGTERM to any process, with the state saved; all
      processes stop after the same step.
  """
  directory = pathlib.Path(directory)
  stage = setup.stage
  chief = hosts.is_chief()

  # --- State: fresh, or the newest checkpoint straight into its shards.
  def fresh(base: Params, critic: Params | None) -> TrainState:
    return init_state(jax.random.key(seed), setup, base, critic)

  shapes = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (base, critic)
  )
  abstract = jax.eval_shape(fresh, *shapes)
  shardings = state_shardings(setup, abstract, mesh)
  checkpoints = Checkpoints(
    directory / "checkpoints", keep=stage.keep_checkpoints
  )
  resumed = None
  if checkpoints.latest_step() is None:
    policy = start() if start else base
    state = jax.jit(fresh, out_shardings=shardings)(policy, critic)
    del policy
  else:
    state = checkpoints.restore(abstract_like(abstract, shardings))
    # The newest may be damaged: the state knows which step it is of.
    resumed = int(state.step)
    logging.info(
      "%s goes on at step %d of %d", description, resumed, setup.num_steps
    )
  done = resumed or 0

  # --- Step: compiled once, the state donated, the reference not.
  step_fn = make_train_step(setup, abstract, mesh)
  ref = base if needs_base(setup) else None

  # --- Loop. Nothing in it waits for the devices but what looks at results.
  with (
    checkpoints,
    MetricsWriter(directory, resume_step=resumed, enabled=chief) as writer,
    Progress(
      setup.num_steps, description, initial=done, enabled=chief
    ) as progress,
    StepTrace(
      stage.profile,
      directory / "profile",
      done=done,
      num_steps=setup.num_steps,
      enabled=chief,
    ) as trace,
    _StopRequest() as stop,
  ):
    meter = Meter(setup, mesh)
    first = done
    for step in range(first, setup.num_steps):
      done = step + 1
      with meter.span("data"):
        batch = setup.objective.batch(loader, step)
        batch = shard_batch(batch, mesh, rows=stage.batch_size)
      # The first call returns when the step is compiled, and not yet done.
      compiling = (
        meter.span("compile") if step == first else contextlib.nullcontext()
      )
      with trace.step(done, state), compiling:
        state, metrics = step_fn(state, ref, batch)
      if step == first:
        return_freed_memory()
      trace.end(done, metrics)
      meter.count(batch, metrics)
      last = done == setup.num_steps
      if last or done % stage.log_every == 0:
        figures = {k: float(v) for k, v in jax.device_get(metrics).items()}
        every = stage.measure_every
        try:
          _check_finite(figures, done, directory)
          if measure and (last or (every and done % every == 0)):
            with meter.span("measure"):
              figures |= _measured(measure, state, base, done, directory)
        finally:
          figures |= meter.read()
          # A row of figures that are not finite shows where it went wrong.
          writer.write(done, figures)
        progress.update(0, **brief(figures))
      progress.update()
      stopping = not last and stop.agreed(done, metrics)
      due = stage.checkpoint_every and done % stage.checkpoint_every == 0
      if due or last or stopping:
        # The figures of this very step may not have been looked at yet.
        _check_finite(metrics, done, directory)
        with meter.span("checkpoint"):
          checkpoints.save(done, state, wait=last or stopping)
      if stopping:
        raise PreemptedError(
          f"{description} was asked to stop and is saved at step {done}: run "
          "the same command again to go on"
        )
  return state


def _check_finite(
  metrics: Mapping[str, jax.Array | float], step: int, directory: pathlib.Path
) -> None:
  # The loss is that before the update, which a bad gradient has spoilt.
  for name, figure in metrics.items():
    watched = name == "loss" or name.startswith("grad_norm/")
    if watched and not math.isfinite(float(figure)):
      raise _diverged(f"{name} is {float(figure)}", step, directory)


def _measured(
  measure: Callable[[TrainState, Params], dict[str, float]],
  state: TrainState,
  base: Params,
  step: int,
  directory: pathlib.Path,
) -> dict[str, float]:
  try:
    return measure(state, base)
  except FloatingPointError as error:
    # The loss was finite: it was the last update that spoilt the weights.
    raise _diverged(str(error), step, directory) from error


def _diverged(what: str, step: int, directory: pathlib.Path) -> DivergedError:
  return DivergedError(
    f"{what} at step {step}; lower the learning rate "
    "(--config.<stage>.lr, --config.train.critic_lr). The last good "
    f"checkpoint is in {directory / 'checkpoints'}"
  )


class _StopRequest:
  """Turns SIGTERM, a scheduler's notice, into a flag the loop looks at."""

  def __init__(self) -> None:
    self._requested = False
    self._agreement = hosts.StopAgreement()
    self._previous: Callable | int | None = None

  def __enter__(self) -> _StopRequest:
    # Handlers can be set in the main thread only.
    if threading.current_thread() is threading.main_thread():
      self._previous = signal.signal(signal.SIGTERM, self._request)
    return self

  def __exit__(self, *unused_error: object) -> None:
    if self._previous is not None:
      signal.signal(signal.SIGTERM, self._previous)

  def agreed(self, step: int, metrics: Mapping[str, jax.Array]) -> bool:
    """Returns whether to stop after this step, the same on every process."""
    return self._agreement.reached(step, self._requested, metrics)

  def _request(self, unused_signal: int, unused_frame: object) -> None:
    self._requested = True
