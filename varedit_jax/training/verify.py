"""Finds numbers that are wrong without an error, as a faulty chip makes them: `guard.verify_every`.

Bits are compared of what has to be equal:

  - a step of the run is repeated on the same devices: what a device does not always get wrong
  - examples of its batch are worked on by other devices: what a device always gets wrong, too
  - copies of a part of the state on several devices, as over `data`: what went wrong in an update since they were alike

Where two differ, a third run decides. A whole step on other devices would not do: sums over devices are added in the
order of the chips, and for TPUs the compiler takes other collectives, so that sound chips could differ.

A digest of an array is the sum, modulo 2^32, of its elements' bits, each mixed with its index. One element that changes
always changes it; several leave it as it was once in 2^32 cases.
"""

import collections
import dataclasses
import functools
import socket
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from varedit_jax.config import RunConfig
from varedit_jax.errors import TemporaryError
from varedit_jax.parallel.agreement import gather
from varedit_jax.parallel.mesh import replicated
from varedit_jax.parallel.rules import path_name
from varedit_jax.scales import Pyramid
from varedit_jax.training.loss import BY_EXAMPLE
from varedit_jax.training.state import StepFn, TrainState
from varedit_jax.training.step import make_loss, make_text_features
from varedit_jax.types import Batch, Params

_MOST_NAMES = 4  # arrays or devices that a sentence names
_ADVICE = (
    "a chip, its memory or a link computes wrongly; this step is not saved, but earlier ones may be wrong, too: run "
    "the same command again without that host"
)


class Corrupted(TemporaryError):
    """Two computations that have to be equal are not."""

    def __init__(self, sentence: str, state: TrainState) -> None:
        """`state` is the one before the step."""
        super().__init__(sentence)
        self.state = state


class Digests(NamedTuple):
    """Digests of what every device of a run holds of a tree of arrays."""

    devices: list[Any]
    names: list[str]
    values: np.ndarray  # uint32 [devices, arrays]
    parts: np.ndarray  # int [devices, arrays]: devices with the same number hold copies of the same part of an array

    def apart(self) -> np.ndarray:
        """Returns True, [devices, arrays], where a device's copy is not that of most; of two that differ, for both."""
        found = np.zeros(self.values.shape, bool)
        for column, (values, parts) in enumerate(zip(self.values.T, self.parts.T, strict=True)):
            for part in np.unique(parts):
                held, counts = np.unique(values[parts == part], return_counts=True)
                if len(held) > 1:
                    usual = held[counts == counts.max()]
                    found[parts == part, column] = (values[parts == part] != usual[0]) | (len(usual) > 1)
        return found

    def where(self, differs: Any) -> str:
        """Returns in words the arrays and devices for which `differs` [devices, arrays] is True; a collective call."""
        arrays = [name for name, row in zip(self.names, differs.any(axis=0), strict=True) if row]
        devices = [device for device, row in zip(self.devices, differs.any(axis=1), strict=True) if row]
        everywhere = len(devices) == len(self.devices) > 1
        places = f"all {len(devices)} devices, as after a sum over them" if everywhere else _devices_text(devices)
        return f"{_listed(arrays)} on {places}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Examples:
    """The examples of a batch, each of which is worked on alone, by the devices of one share of the batch."""

    shares: Sequence[Sequence[Any]]  # devices that work on each share, in the order of the batch
    # (state, batch, places) -> uint32 [n, ...]: digests of each of n examples, computed by the devices `places` shares
    # further. Row i is the same example for all places, of share i * shares // n.
    numbers: Callable[[TrainState, Batch, int], np.ndarray]


class Verifier:
    """Checks single steps of a run; all processes make the same calls."""

    def __init__(self, examples: Examples | None = None) -> None:
        """Without `examples`, or with one share of them, only whole steps are repeated."""
        self._examples = examples if examples is not None and len(examples.shares) > 1 else None

    def begin(self, step: int, run: StepFn, state: TrainState, batch: Batch, key: jax.Array) -> "Repeated":
        """Checks examples of a step's batch, and makes the step once on a copy of `state`.

        `run` may donate its state. There are two states at a time at most. Raises Corrupted naming the devices that
        do not agree with others.
        """
        if self._examples is not None:
            suspects = disagreeing(self._examples, state, batch)
            if suspects:
                raise Corrupted(
                    f"examples of step {step} give other numbers on other devices: {_devices_text(suspects)}, against "
                    f"two others each; {_ADVICE}",
                    state,
                )
        other = _results(*run(copied(state), batch, key))
        return Repeated(step, run, copied(state), batch, key, other)


@dataclasses.dataclass(frozen=True)
class Repeated:
    """A step that has been made on a copy of the state, before the run makes it."""

    step: int
    run: StepFn
    before: TrainState  # a copy of the state before the step
    batch: Batch
    key: jax.Array
    other: Digests  # of new state and metrics

    def compare(self, state: TrainState, metrics: Any) -> None:
        """Raises Corrupted if the state after the step of the run, or its metrics, differ in a bit from the copy's.

        So it does if devices differ that hold the same part of an array.
        """
        first = _results(state, metrics)
        apart = first.apart()
        if apart.any():
            raise Corrupted(
                f"after step {self.step} copies of the same numbers differ: {first.where(apart)}; {_ADVICE}",
                self.before,
            )
        if np.array_equal(first.values, self.other.values):
            return
        third = _results(*self.run(copied(self.before), self.batch, self.key))
        agrees = [np.array_equal(third.values, each.values) for each in (first, self.other)]
        verdict = "the step of the run" if agrees[0] else "the repetition" if agrees[1] else "neither"
        raise Corrupted(
            f"step {self.step} gave other bits when it was repeated: "
            f"{first.where(first.values != self.other.values)}; a third run agrees with {verdict}; {_ADVICE}",
            self.before,
        )


def disagreeing(examples: Examples, state: TrainState, batch: Batch) -> list[Any]:
    """Returns the devices whose numbers of an example differ from those of two others, the most frequent ones first.

    With two shares, and where no two of three agree, all devices that have worked on the example are returned.
    """
    first, second = (examples.numbers(state, batch, places) for places in (0, 1))
    if np.array_equal(first, second):
        return []
    third = examples.numbers(state, batch, 2)
    count, votes = len(examples.shares), collections.Counter[int]()
    for row, values in enumerate(zip(first, second, third, strict=True)):
        equal = [np.array_equal(values[i], values[j]) for i, j in ((1, 2), (0, 2), (0, 1))]
        if all(equal):
            continue
        share = row * count // len(first)
        alone = [place for place in range(3) if equal[place]] if count > 2 else []
        votes.update({(share + place) % count for place in alone or range(3)})
    most = max(votes.values())
    return [device for share, number in votes.most_common() if number == most for device in examples.shares[share]]


def _results(state: TrainState, metrics: Any) -> Digests:
    return digests({"state": state, "metrics": metrics})


def digests(tree: Any) -> Digests:
    """Returns the digests of a tree of arrays, on one device or one mesh; each device works on what it holds."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    names, arrays = [path_name(path) for path, _ in leaves], tuple(leaf for _, leaf in leaves)
    shardings = [leaf.sharding for leaf in arrays]
    if not isinstance(shardings[0], NamedSharding):
        values = jax.device_get(_digests(arrays))
        return Digests(list(shardings[0].device_set), names, values, np.zeros(values.shape, int))
    mesh = shardings[0].mesh
    run = _on_mesh(mesh, tuple(sharding.spec for sharding in shardings))
    parts = np.stack([_parts(sharding, leaf.shape) for sharding, leaf in zip(shardings, arrays, strict=True)], axis=1)
    return Digests(list(mesh.devices.flat), names, jax.device_get(run(arrays)), parts)


@functools.cache
def _parts(sharding: NamedSharding, shape: tuple[int, ...]) -> np.ndarray:
    """Returns the number of the part of an array that each device of the mesh holds, [devices]."""
    places = sharding.devices_indices_map(shape)
    return np.unique([str(places[device]) for device in sharding.mesh.devices.flat], return_inverse=True)[1]


@functools.cache
def _on_mesh(mesh: Mesh, specs: tuple[PartitionSpec, ...]) -> Any:
    """Returns the function from arrays with these shardings to their digests on every device, [devices, arrays]."""
    each = jax.shard_map(
        _digests, mesh=mesh, in_specs=(specs,), out_specs=PartitionSpec(mesh.axis_names), check_vma=False
    )
    return jax.jit(each, out_shardings=replicated(mesh))


@jax.jit
def _digests(arrays: tuple[jax.Array, ...]) -> jax.Array:
    return jnp.stack([digest(x) for x in arrays])[None]


def digest(x: jax.Array, kept: int = 0) -> jax.Array:
    """Returns the digest of an array, uint32, or of its parts along the first `kept` axes."""
    bits = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
    x = x.astype(jnp.uint8) if x.dtype == jnp.bool_ else x
    words = jax.lax.bitcast_convert_type(x, bits).astype(jnp.uint32)
    index = jnp.zeros(x.shape, jnp.uint32)
    for axis in range(kept, x.ndim):  # without a reshape, which would move what is tiled
        index = index * np.uint32(x.shape[axis]) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    # Mixed one to one, as in MurmurHash3: in a plain weighted sum, two signs that change would cancel.
    mixed = words + index * np.uint32(0x9E3779B9)
    mixed = (mixed ^ (mixed >> 16)) * np.uint32(0x85EBCA6B)
    mixed = (mixed ^ (mixed >> 13)) * np.uint32(0xC2B2AE35)
    return jnp.sum(mixed ^ (mixed >> 16), axis=tuple(range(kept, x.ndim)), dtype=jnp.uint32)


def copied(state: TrainState) -> TrainState:
    """Returns a copy of a state, where it lies."""
    places = jax.tree.map(lambda leaf: leaf.sharding, state)
    copy: TrainState = jax.jit(_copy, out_shardings=places)(state)
    return copy


def _copy(state: TrainState) -> TrainState:
    return jax.tree.map(jnp.copy, state)


def make_numbers(config: RunConfig, pyramid: Pyramid) -> Callable[[Params, Params, Batch], jax.Array]:
    """Returns `(params, frozen, batch) -> uint32 [B, 2]` of the examples of a microbatch.

    Of each example the bits of its loss, without noise and drop, and the digest of the loss's gradient with respect to
    the features of its text, which goes back through all blocks. Nothing in them is summed over examples. The
    microbatch is every `optimizer.accumulation`-th example of the batch.
    """
    parts = config.optimizer.accumulation
    loss_fn: Callable[..., Any] = make_loss(config, pyramid, training=False, by_example=True)
    text_features = make_text_features(config)

    def numbers(params: Params, frozen: Params, batch: Batch) -> jax.Array:
        batch = {name: x.reshape(-1, parts, *x.shape[1:])[:, 0] for name, x in batch.items()}
        features_BTE = text_features(params, frozen, batch)

        def loss(features_BTE: jax.Array) -> Any:
            return loss_fn(params, frozen, {**batch, "text_features": features_BTE}, jax.random.key(0))

        gradient_BTE, metrics = jax.grad(loss, has_aux=True)(features_BTE)
        return jnp.stack([digest(metrics[BY_EXAMPLE[0]], kept=1), digest(gradient_BTE, kept=1)], axis=1)

    return numbers


def _devices_text(devices: Sequence[Any]) -> str:
    """Names devices with their hosts; all processes call it."""
    hosts = gather(socket.gethostname())
    return _listed(
        f"device {device.id} ({device.device_kind}, process {device.process_index} on {hosts[device.process_index]})"
        for device in devices
    )


def _listed(names: Iterable[str]) -> str:
    found = list(names)
    more = f" and {len(found) - _MOST_NAMES} more" if len(found) > _MOST_NAMES else ""
    return ", ".join(found[:_MOST_NAMES]) + more
