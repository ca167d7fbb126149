"""The real training step, compiled by the TPU's compiler without a TPU."""

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies

from oreo_jax.aot import hlo, kernels
from oreo_jax.config import Config, MeshConfig, ModelConfig, TrainConfig
from oreo_jax.data.packing import Batch
from oreo_jax.models import abstract_params, logical_axes
from oreo_jax.sharding import batch_sharding, make_mesh, shardings_of
from oreo_jax.train import get_objective, init_state, make_train_step
from oreo_jax.train.setup import make_setup

pytest.importorskip(
  "libtpu", reason="the TPU's compiler is not here: pip install libtpu"
)

ROWS, LENGTH = 16, 640


def compiled_step(mesh_config, **settings):
  """Returns the text of the program that a v5e:4x4 would run."""
  config = Config(
    model=ModelConfig(
      vocab_size=256,
      embed_dim=256,
      num_layers=2,
      num_heads=4,
      dtype="bfloat16",
      remat="full",
      **settings,
    ),
    mesh=mesh_config,
    train=TrainConfig(batch_size=ROWS),
  )
  setup = make_setup(config, get_objective("oreo"), num_steps=10)
  topology = topologies.get_topology_desc(
    platform="tpu", topology_name="v5e:4x4"
  )
  mesh = make_mesh(config.mesh, topology.devices)
  shapes = abstract_params(config.model)
  shardings = shardings_of(logical_axes(config.model), shapes, mesh)
  base = jax.tree.map(
    lambda x, sharding: jax.ShapeDtypeStruct(
      x.shape, x.dtype, sharding=sharding
    ),
    shapes,
    shardings,
  )
  # Outside the mesh: within it, optax would make a real array of its counter.
  key = jax.random.key(0)
  state = jax.eval_shape(lambda base: init_state(key, setup, base), base)
  step = make_train_step(setup, state, mesh)

  def rows_of(dtype):
    return jax.ShapeDtypeStruct(
      (ROWS, LENGTH), dtype, sharding=batch_sharding(mesh)
    )

  batch = Batch(
    *(rows_of(jnp.int32) for _ in range(4)),
    *(rows_of(jnp.bool_) for _ in range(2)),
    rows_of(jnp.float32),
  )
  with jax.set_mesh(mesh):
    return step.lower(state, base, batch).compile().as_text()


# Heads of 64 over tensor=4 with two keys, which two devices share each; and a
# sliding window, which is another mask of the kernel.
@pytest.mark.slow
@pytest.mark.parametrize(
  "mesh,settings",
  [
    (MeshConfig(fsdp=16), {"num_kv_heads": 2, "head_dim": 128}),
    (
      MeshConfig(fsdp=4, tensor=4),
      {"num_kv_heads": 2, "head_dim": 64, "sliding_window": 300},
    ),
  ],
)
def test_step_on_tpus_runs_the_splash_kernel(mesh, settings, monkeypatch):
  monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
  monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
  text = compiled_step(mesh, **settings)
  # Policy, critic and reference forwards, and two backward passes.
  for kernel in ("fwd", "dq", "dkv"):
    assert f"splash_mha_{kernel}" in text
  # 640 tokens are padded to two blocks of 384. No scores of a row anywhere.
  for length in (LENGTH, 768):
    assert f"{length},{length}]" not in text
  # What `oreo aot` says a kernel costs. A device has 1 row of 4 heads, or 4
  # rows of 1 head. Three of the four pairs of blocks are computed: the window
  # reaches into the first block from the second.
  pair = 2 * 384 * 384 * settings["head_dim"]
  products = {"fwd": 2, "dq": 3, "dkv": 4}
  for computation in hlo.parse(text).computations.values():
    for item in filter(kernels.is_kernel, computation.values()):
      phase = item.name.split("_")[2]
      flops = kernels.flops_of(computation, item)
      assert flops == 4 * 3 * products[phase] * pair
