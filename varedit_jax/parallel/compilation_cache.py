"""Where JAX keeps compiled programs between processes."""

import os

import jax
from jax.experimental.compilation_cache import compilation_cache

_LEAST_SECONDS = 0.1  # of a compilation whose program is kept


def directory() -> str:
    """Returns `VAREDIT_CACHE`, or varedit_jax in the user's directory for caches; "" where VAREDIT_CACHE is empty."""
    caches = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return os.environ.get("VAREDIT_CACHE", os.path.join(caches, "varedit_jax"))


def keep_programs() -> None:
    """Sets the directory of JAX's compilation cache, unless one is set already, or none is wanted."""
    where = directory()
    if not where or jax.config.values["jax_compilation_cache_dir"]:  # JAX_COMPILATION_CACHE_DIR, too
        return
    jax.config.update("jax_compilation_cache_dir", os.path.join(os.path.abspath(where), "compiled"))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", _LEAST_SECONDS)
    compilation_cache.reset_cache()  # what was compiled before has opened none


def move_to(where: str) -> None:
    """Sets the directory in place of that which has been in use."""
    compilation_cache.reset_cache()
    compilation_cache.set_cache_dir(where)
