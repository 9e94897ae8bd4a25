"""Types that all packages use."""

from collections.abc import Mapping
from typing import Any

import jax

Params = dict[str, Any]  # a tree of parameters, by part or module
Batch = Mapping[str, jax.Array]  # arrays with examples in front, by name
Metrics = Mapping[str, Any]  # scalars or vectors [K], by name
