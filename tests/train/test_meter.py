"""The figures of a row, on a clock that the test sets."""

import types

import jax.numpy as jnp
import pytest
from oracles import tiny

from oreo_jax.config import Config, SftConfig
from oreo_jax.train import OBJECTIVES, make_setup
from oreo_jax.train import meter as meters
from oreo_jax.train.flops import step_flops

ROWS, SLOTS = 4, 16


class Clock:
  def __init__(self):
    self.now = 0.0

  def __call__(self):
    return self.now


def make_meter():
  config = Config(model=tiny.MODEL, sft=SftConfig(batch_size=ROWS))
  clock = Clock()
  setup = make_setup(config, OBJECTIVES["sft"], 8)
  return meters.Meter(setup, tiny.mesh(), clock), clock, setup


def take_step(meter, clock, tokens, *, data=1.0, compute=3.0):
  with meter.span("data"):
    clock.now += data
  batch = [jnp.zeros((ROWS, SLOTS), jnp.int32)]
  metrics = {
    "batch/tokens": jnp.float32(tokens),
    "batch/action_tokens": jnp.float32(tokens / 4),
  }
  meter.count(batch, metrics)
  clock.now += compute


def test_figures_are_means_over_the_steps_of_a_row():
  meter, clock, setup = make_meter()
  take_step(meter, clock, 20)
  take_step(meter, clock, 60)
  figures = meter.read()
  assert figures["time/step_s"] == 4.0
  assert figures["time/data_s"] == 1.0
  assert figures["speed/tokens_per_s"] == 80 / 8
  assert figures["speed/action_tokens_per_s"] == 20 / 8
  assert figures["batch/fill"] == 80 / (2 * ROWS * SLOTS)
  assert figures["speed/step_flops"] == sum(
    step_flops(setup, ROWS, SLOTS).values()
  )
  # The next row starts from nothing.
  take_step(meter, clock, 40, compute=1.0)
  assert meter.read()["speed/tokens_per_s"] == 20.0


@pytest.mark.parametrize("name", ["compile", "measure", "checkpoint"])
def test_what_is_no_step_does_not_count_in_the_time_of_a_step(name):
  meter, clock, _ = make_meter()
  with meter.span(name):
    clock.now += 100.0
  take_step(meter, clock, 40)
  figures = meter.read()
  assert figures[f"time/{name}_s"] == 100.0
  assert figures["time/step_s"] == 4.0
  take_step(meter, clock, 40)
  assert f"time/{name}_s" not in meter.read()


def test_mfu_is_the_share_of_the_known_peak(monkeypatch):
  monkeypatch.setattr(meters, "peak_flops", lambda mesh: 1e6)
  meter, clock, setup = make_meter()
  take_step(meter, clock, 40)
  figures = meter.read()
  flops = sum(step_flops(setup, ROWS, SLOTS).values())
  assert figures["speed/mfu"] == pytest.approx(flops / 4.0 / 1e6)
  assert meters.brief({"loss": 1.0, **figures}).keys() == {
    "loss",
    "tok/s",
    "mfu",
    "GiB",
  }


def mesh_of(*devices):
  return types.SimpleNamespace(
    devices=types.SimpleNamespace(
      flat=[types.SimpleNamespace(**device) for device in devices]
    )
  )


@pytest.mark.parametrize(
  "devices, chips",
  [
    ([{"device_kind": "cpu", "id": 0}], None),
    (
      [{"device_kind": "NVIDIA H100 80GB HBM3", "id": i} for i in range(8)],
      8 * 989e12,
    ),
    (
      [
        {"device_kind": "TPU v5 lite", "id": i, "coords": (i, 0, 0)}
        for i in range(4)
      ],
      4 * 197e12,
    ),
    # Two cores of one chip, then the same place in another slice.
    (
      [
        {
          "device_kind": "TPU v4",
          "id": i,
          "coords": (0, 0, 0),
          "slice_index": i // 2,
        }
        for i in range(4)
      ],
      2 * 275e12,
    ),
  ],
)
def test_peak_is_that_of_the_chips(devices, chips):
  assert meters.peak_flops(mesh_of(*devices)) == chips


def test_memory_is_the_devices_own_where_they_say(monkeypatch):
  devices = [
    types.SimpleNamespace(memory_stats=lambda: {"peak_bytes_in_use": 2**30}),
    types.SimpleNamespace(memory_stats=lambda: {"peak_bytes_in_use": 2**31}),
  ]
  monkeypatch.setattr(meters.jax, "local_devices", lambda: devices)
  assert meters.peak_memory() == {"memory/device_peak_gib": 2.0}
