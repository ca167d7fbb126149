"""oreo_jax: offline multi-step reasoning with OREO, in JAX.

After `import oreo_jax`, its modules are attributes: `oreo_jax.losses`. Each is
imported when it is first asked for, so that `import oreo_jax` costs nothing and
`oreo_jax.losses` needs jax and numpy alone.
"""

import importlib
import importlib.util
import types

__version__ = "0.1.0"


def __getattr__(name: str) -> types.ModuleType:
  module = f"{__name__}.{name}"
  if name.startswith("_") or importlib.util.find_spec(module) is None:
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
  return importlib.import_module(module)


def __dir__() -> list[str]:
  import pkgutil  # only interactive sessions list the modules

  modules = [module.name for module in pkgutil.iter_modules(__path__)]
  return sorted([*globals(), *modules])
