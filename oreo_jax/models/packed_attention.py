"""Attention of packed rows: which implementation, and how it is split.

`IMPLEMENTATIONS` holds four that give the same result. The reference and the
blockwise one run everywhere, the other two call a kernel of one kind of
accelerator. The compiler cannot split a kernel, or a loop whose bounds depend
on the data, over the devices of a mesh. So all but the reference run under
`shard_map`: each device attends with its own rows and its own heads, and
nothing crosses the mesh.

Shapes: B batch, T time, N query heads, K key/value heads, H head width.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Literal

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from oreo_jax.config import ModelConfig
from oreo_jax.models import attention
from oreo_jax.models.attention import Attend
from oreo_jax.models.blockwise import attend_blockwise
from oreo_jax.sharding import batch_axes, batch_shards, free_axes

# Up to this many tokens a row, `auto` takes the reference on a CPU: there the
# blocks are as large as the row, and one product of it all is as fast.
_SHORT_ROW = 128
_LANES = 128  # of a TPU's vector unit; blocks of keys are multiples of it


def reference(
  segment_ids: jax.Array, *, sliding_window: int, block: int, platform: str
) -> Attend:
  """All scores at once, [B, N, T, T]; see `attention.attend`."""
  mask = attention.packed_mask(segment_ids, sliding_window=sliding_window)

  def attend(
    query: jax.Array, key: jax.Array, value: jax.Array, scale: float
  ) -> jax.Array:
    mixed = attention.attend(query, key, value, mask, scale=scale)
    return checkpoint_name(mixed, attention.MIXED)

  return attend


def blockwise(
  segment_ids: jax.Array, *, sliding_window: int, block: int, platform: str
) -> Attend:
  """One block of keys at a time, in plain JAX; see `attend_blockwise`."""
  # A CPU is fastest where a block of scores stays in its cache. Elsewhere each
  # turn of the loop costs the start of several kernels, so blocks are large.
  block = block or (64 if platform == "cpu" else 512)
  block = min(block, segment_ids.shape[1])

  def attend(
    query: jax.Array, key: jax.Array, value: jax.Array, scale: float
  ) -> jax.Array:
    def local(
      query: jax.Array, key: jax.Array, value: jax.Array, segments: jax.Array
    ) -> jax.Array:
      return attend_blockwise(
        query, key, value, segments, scale, sliding_window, block
      )

    return _on_each_device(local, query, key, value, segment_ids)

  return attend


def cudnn(
  segment_ids: jax.Array,
  *,
  sliding_window: int,
  block: int,
  platform: str,
) -> Attend:
  """CuDNN's fused attention on a GPU; the size of its blocks is its own.

  Its public door, `jax.nn.dot_product_attention`, knows causal masks and
  windows, but no segments: these go in as a mask [B, 1, T, T], which all heads
  and layers share. That is 1/N of the scores, which are never made. (cuDNN can
  read packed rows by the offsets of their segments, but JAX offers this in a
  private module only, and for Hopper GPUs only.) Off a GPU, XLA computes the
  same call.
  """
  mask = attention.packed_mask(segment_ids)
  implementation: Literal["cudnn", "xla"]
  implementation = "cudnn" if platform == "gpu" else "xla"

  def attend(
    query: jax.Array, key: jax.Array, value: jax.Array, scale: float
  ) -> jax.Array:
    _, length, _, width = query.shape
    fits = _fits_cudnn(query.dtype.name, length, width)
    if implementation == "cudnn" and not fits:
      raise ValueError(
        "query: cuDNN's attention expects bfloat16, an even number of tokens, "
        "and a head width that is a multiple of 8 and at most 128, got "
        f"{query.dtype}{list(query.shape)}; set --config.model.dtype=bfloat16 "
        "or --config.model.attention=blockwise"
      )

    def local(
      query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array
    ) -> jax.Array:
      return jax.nn.dot_product_attention(
        query,
        key,
        value,
        mask=mask[:, None],
        scale=scale,
        is_causal=True,
        local_window_size=(sliding_window - 1, 0) if sliding_window else None,
        implementation=implementation,
      )

    return _on_each_device(local, query, key, value, mask)

  return attend


def _fits_cudnn(dtype: str, length: int, width: int) -> bool:
  """Whether cuDNN's attention takes such queries, on any GPU since Ampere."""
  # The backward pass with a mask needs an even number of tokens. GPUs since
  # Hopper take heads of up to 256, which no model here has.
  return (
    dtype == "bfloat16" and length % 2 == 0 and width % 8 == 0 and width <= 128
  )


def splash(
  segment_ids: jax.Array, *, sliding_window: int, block: int, platform: str
) -> Attend:
  """JAX's "splash" kernel for TPUs; elsewhere Pallas interprets it, slowly.

  The kernel wants rows that are a multiple of its block, and blocks that are a
  multiple of 128 tokens. Rows are padded to that with segment 0, behind all
  other tokens, where no query sees them. A head of another width than 128
  works too: the compiler rounds it up to the 128 lanes of the chip, so a head
  of 64 costs as much as one of 128.
  """
  length = segment_ids.shape[1]
  if block % _LANES:
    raise ValueError(
      f"block: splash attention expects a multiple of {_LANES}, got {block}; "
      "set --config.model.attention_block=512, or 0 for its default"
    )
  # As few blocks as the largest size allows, and then the smallest blocks that
  # still cover the row: 640 tokens are two blocks of 384 and not of 512.
  count = math.ceil(length / (block or 512))
  block = math.ceil(length / count / _LANES) * _LANES

  def attend(
    query: jax.Array, key: jax.Array, value: jax.Array, scale: float
  ) -> jax.Array:
    # The kernel does not scale. In float32, as a scale such as 1/sqrt(128)
    # would round every query of bfloat16.
    query = (query.astype(jnp.float32) * scale).astype(query.dtype)
    local = functools.partial(
      _splash_rows,
      block=block,
      sliding_window=sliding_window,
      interpret=platform != "tpu",
    )
    return _on_each_device(local, query, key, value, segment_ids)

  return attend


def _splash_rows(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  segment_ids: jax.Array,
  *,
  block: int,
  sliding_window: int,
  interpret: bool,
) -> jax.Array:
  """Runs the splash kernel over rows [B, T, heads, H] of one device."""
  # Here and not above: importing Pallas takes a fifth of a second, which every
  # start on another machine would pay for nothing.
  from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel as kernels,
  )
  from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_mask as masks,
  )

  length, heads = query.shape[1:3]
  padding = -length % block
  # The kernel takes one row, heads first: [heads, T, H].
  query, key, value = (
    jnp.pad(x.transpose(0, 2, 1, 3), ((0, 0), (0, 0), (0, padding), (0, 0)))
    for x in (query, key, value)
  )
  segment_ids = jnp.pad(segment_ids, ((0, 0), (0, padding)))
  shape = (length + padding, length + padding)
  # Both masks are functions of the two positions, which the kernel evaluates a
  # block at a time; blocks that are hidden as a whole are not run.
  mask: masks.Mask = masks.CausalMask(shape)
  if sliding_window:
    mask = masks.LocalMask(shape, (sliding_window - 1, 0), offset=0)
  # Not cached: the kernel holds arrays that belong to the trace they are made
  # in. Every device has its own heads, so none of them are shared out here.
  kernel = kernels.make_splash_mha(
    masks.MultiHeadMask([mask] * heads),
    head_shards=1,
    q_seq_shards=1,
    block_sizes=kernels.BlockSizes(
      block_q=block,
      block_kv=block,
      block_q_dkv=block,
      block_kv_dkv=block,
      block_q_dq=block,
      block_kv_dq=block,
    ),
    residual_checkpoint_name=attention.MIXED,
    interpret=interpret,
  )
  segments = kernels.SegmentIds(segment_ids, segment_ids)
  mixed = jax.vmap(kernel)(query, key, value, segments)
  return mixed[:, :, :length].transpose(0, 2, 1, 3)


IMPLEMENTATIONS: Mapping[str, Callable[..., Attend]] = {
  "reference": reference,
  "blockwise": blockwise,
  "cudnn": cudnn,
  "splash": splash,
}


def attend_packed(config: ModelConfig, segment_ids: jax.Array) -> Attend:
  """Returns the attention of packed rows that the config asks for.

  Args:
    config: the architecture; `attention` names an implementation, or leaves it
      to the backend ("auto").
    segment_ids: i32[B, T], 0 = padding, k > 0 = k-th sequence of the row.

  Returns:
    A function of the queries, keys and values of these rows: causal, and within
    a segment only. Padding sees padding; what it gives is never read.
  """
  platform = _platform()
  name = config.attention
  if name == "auto":
    name = _fastest(config, segment_ids.shape[1], platform)
  return IMPLEMENTATIONS[name](
    segment_ids,
    sliding_window=config.sliding_window,
    block=config.attention_block,
    platform=platform,
  )


def _platform() -> str:
  """Returns the kind of device that is compiled for: cpu, gpu or tpu."""
  # Not the default backend, where there is a mesh: a step can be compiled ahead
  # of time for a mesh of TPUs on a machine that has none.
  device = jax.sharding.get_abstract_mesh().abstract_device
  return device.platform if device else jax.default_backend()


def _fastest(config: ModelConfig, length: int, platform: str) -> str:
  """Returns the name of what `auto` stands for."""
  if platform == "tpu":
    return "splash"
  if platform == "gpu" and _fits_cudnn(config.dtype, length, config.head_dim):
    return "cudnn"
  return "reference" if length <= _SHORT_ROW else "blockwise"


def _on_each_device(
  local: Callable[..., jax.Array],
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  by_row: jax.Array,
) -> jax.Array:
  """Calls `local` on every device with the rows and heads that it holds.

  Args:
    local: (query, key, value, by_row) -> mixed values.
    query: [B, T, N, H].
    key: [B, T, K, H].
    value: [B, T, K, H].
    by_row: [B, ...], what all heads share.

  Returns:
    [B, T, N, H].
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.size == 1:
    return local(query, key, value, by_row)
  # What does not divide stays whole, as it does in `sharding.constrain_batch`
  # and `sharding.shardings_of`: then each device computes all of it.
  rows = batch_axes(mesh) if query.shape[0] % batch_shards(mesh) == 0 else None
  tensor = mesh.shape["tensor"]
  heads = "tensor" if query.shape[2] % tensor == 0 else None
  if heads:
    # 12 queries and 2 keys on 4 devices: 3 queries of one key each. The keys
    # are repeated to 4, so that a device gets the one its queries look at.
    copies = tensor // math.gcd(tensor, key.shape[2])
    key, value = (jnp.repeat(x, copies, axis=2) for x in (key, value))
  spec = PartitionSpec(rows, None, heads)
  # All axes are taken over: in `local` there is none that `constrain_batch`
  # could refer to. Pallas does
  # not say over which axes its results vary, hence no check of that.
  return jax.shard_map(
    local,
    in_specs=(spec, spec, spec, PartitionSpec(rows)),
    out_specs=spec,
    axis_names=set(free_axes(mesh)),
    check_vma=False,
  )(query, key, value, by_row)
