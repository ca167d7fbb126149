"""Eight-bit whole numbers with a scale, in place of floats.

x is about n * s with n = round(x / s) from -127 to 127 and s = max |x| / 127
over what shares the scale, so that no entry is off by more than s / 2. There is
no offset: 0 stays 0, and a product of n needs only one multiplication by s
afterwards.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

_MOST = 127.0


def quantize(
  x: jax.Array, axes: int | tuple[int, ...]
) -> tuple[jax.Array, jax.Array]:
  """Returns (n i8, the shape of x; s f32, without the axes).

  Args:
    x: floats.
    axes: the dimensions over which entries share a scale.
  """
  x = x.astype(jnp.float32)
  scale = jnp.max(jnp.abs(x), axis=axes, keepdims=True) / _MOST
  # Where all entries are 0 any scale will do.
  scale = jnp.where(scale > 0, scale, 1.0)
  return jnp.round(x / scale).astype(jnp.int8), jnp.squeeze(scale, axes)


def quantize_weights(params: dict[str, Any]) -> dict[str, Any]:
  """Returns the weights of a model with `weight_dtype=int8`.

  Projections, embedding and head become int8, with a scale for each output; the
  embedding with one for each token, which is an output where it is the head
  too. Norms, biases, adapters and a value head stay as they are.

  Args:
    params: as `init` returns them.
  """
  layers = {}
  for name, group in params["layers"].items():
    layers[name] = group
    if "kernel" in group:
      # Layers come first, then what is contracted: two dimensions of `o`.
      contracted = (1, 2) if name == "o" else (1,)
      kernel, scale = quantize(group["kernel"], contracted)
      layers[name] = {**group, "kernel": kernel, "scale": scale}
  rest = {}
  for name, axis in (("embedding", 1), ("head", 0)):
    if name in params:
      rest[name], rest[f"{name}_scale"] = quantize(params[name], axis)
  return {**params, **rest, "layers": layers}
