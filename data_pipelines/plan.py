"""The plan of batches: the examples of a batch are a pure function of the step.

Each epoch is shuffled anew and shows every example as often as the weight of its data set says. A batch is of one
bucket (an aspect template), so that its images have one shape. The examples of a bucket form one sequence across
epochs, cut into batches of `batch_size`: a remainder at the end of an epoch begins the bucket's first batch of the
next one, and no example is dropped or repeated.

A plan may be amended at a step: from there on it shows other examples of the same data, as after some were lost. Steps
before give what they gave, and each bucket goes on behind the last example that it showed. Removing examples does not
change the order of the others, so where weights are whole numbers every other example still comes once a pass; with
other weights an epoch begins elsewhere in a pass, and a few examples of the pass under way come twice or not at all.

The plan is stateless: the examples of a step follow in closed form from the seed, the columns and the step number, the
same in every process and on every machine. Randomness comes from a hash (SplitMix64) instead of a generator, whose
stream might change with a release.
"""

import bisect
import collections
import dataclasses
import hashlib
import math
import threading
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

_PASS, _EPOCH, _STEPS = 1, 2, 3  # domains of hashes


class Rows(NamedTuple):
    """The examples of one global batch."""

    bucket: int
    indices: NDArray[np.int64]  # [B]
    passes: NDArray[np.int64]  # [B] how often each was shown before; seeds its augmentation


class Plan(Protocol):
    """Batches by step."""

    @property
    def steps(self) -> int | None:
        """Number of batches; None if endless."""

    def digest(self, step: int | None = None) -> str:
        """Returns what equal plans have in common: in the steps before `step`, or in all."""

    def __call__(self, step: int) -> Rows:
        """Returns the examples of a step."""


def mix(*values: ArrayLike) -> NDArray[np.uint64]:
    """Returns a hash of integers, broadcast: SplitMix64's finalizer chained over the values."""
    state: Any = np.uint64(0)
    with np.errstate(over="ignore"):
        for value in values:
            state = (state ^ np.asarray(value).astype(np.uint64)) + np.uint64(0x9E3779B97F4A7C15)
            state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            state = state ^ (state >> np.uint64(31))
    return state


def _shuffled(*key: ArrayLike) -> NDArray[np.int64]:
    """Returns the permutation that sorts by hash."""
    return np.argsort(mix(*key), kind="stable")


@dataclasses.dataclass(frozen=True)
class _Group:
    """The examples of one data set in one bucket, shown pass after pass."""

    members: NDArray[np.int32]
    weight: Fraction  # passes per epoch

    def until(self, epoch: int) -> int:
        """Returns the number of examples shown before an epoch."""
        return math.floor(epoch * self.weight * len(self.members))

    def shown(self, epoch: int, seed: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Returns the members shown in an epoch, in any order, and the pass of each."""
        first, last, size = self.until(epoch), self.until(epoch + 1), len(self.members)
        pieces, passes = [], []
        for number in range(first // size, -(-last // size)):
            start, stop = max(first - number * size, 0), min(last - number * size, size)
            whole = stop - start == size
            members = self.members if whole else self.members[_shuffled(seed, _PASS, number, self.members)]
            pieces.append(members[start:stop])
            passes.append(np.full(stop - start, number, np.int32))
        if not pieces:
            return self.members[:0], self.members[:0]
        return np.concatenate(pieces), np.concatenate(passes)


def _epoch_of(value: int, first: Callable[[int], int]) -> int:
    """Returns the last epoch whose `first` value is at most `value`."""
    beyond = 1
    while first(beyond) <= value:
        beyond *= 2
    return bisect.bisect_right(range(beyond), value, key=first) - 1


class Shuffled:
    """An endless plan for training."""

    steps = None

    def __init__(
        self,
        buckets: NDArray[np.integer[Any]],
        datasets: NDArray[np.integer[Any]],
        weights: Sequence[float],
        batch_size: int,
        seed: int,
        kept: NDArray[np.bool_] | None = None,
        amends: "tuple[Shuffled, int] | None" = None,
    ) -> None:
        """Groups the examples.

        Args:
          buckets: [n], bucket of each example, from 0.
          datasets: [n], index of each example into `weights`.
          weights: of each data set, average passes per epoch over its examples; 0.5 shows every example in every
            second epoch, rather than the same half in each.
          batch_size: global, over all processes.
          seed: of all randomness.
          kept: [n], False for examples that are never shown; None keeps all.
          amends: the plan before, and the step from which this one takes its place: `amended` makes it.

        Raises ValueError if no example is ever shown.
        """
        self._args = buckets, datasets, tuple(weights), batch_size, seed, kept, amends
        self._batch_size, self._seed = batch_size, seed
        exact = [Fraction(str(weight)) for weight in weights]
        codes = np.asarray(datasets).astype(np.int32) * (int(np.max(buckets, initial=0)) + 1) + buckets
        shown = np.arange(len(codes)) if kept is None else np.flatnonzero(kept)
        order = shown[np.argsort(codes[shown], kind="stable")].astype(np.int32)
        groups: dict[int, list[_Group]] = collections.defaultdict(list)
        for members in np.split(order, np.flatnonzero(np.diff(codes[order])) + 1):
            if len(members) and exact[datasets[members[0]]] > 0:
                groups[int(buckets[members[0]])].append(_Group(members, exact[datasets[members[0]]]))
        if not groups:
            raise ValueError(f"none of {len(codes)} examples is ever shown with weights {tuple(weights)}")
        self._groups = {bucket: groups[bucket] for bucket in sorted(groups)}
        digest = hashlib.sha256(repr((len(codes), tuple(map(str, exact)), batch_size, seed)).encode())
        digest.update(order.tobytes() + codes[order].tobytes())
        # Cached orders of epochs: about the last two of each bucket.
        self._orders: collections.OrderedDict[tuple[int, int], Any] = collections.OrderedDict()
        self._lock = threading.Lock()
        self._before: Shuffled | None
        self._before, self._first = amends or (None, 0)
        self._starts = dict.fromkeys(self._groups, 0)  # examples of each bucket's sequence that are passed over
        if self._before is not None:
            digest.update(f"{self._before.digest()} {self._first}".encode())
            self._starts = self._entries(self._before)
        self._digest = digest.hexdigest()[:16]

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process groups the examples itself."""
        return Shuffled, self._args

    def amended(self, step: int, kept: NDArray[np.bool_]) -> "Shuffled":
        """Returns the plan that shows the examples `kept` [n] from `step` on, in place of amendments from there on.

        Raises ValueError if none of them is ever shown.
        """
        if self._before is not None and step <= self._first:
            return self._before.amended(step, kept)
        return Shuffled(*self._args[:5], kept, (self, step))

    def digest(self, step: int | None = None) -> str:
        """Returns what equal plans have in common: in the steps before `step`, or in all."""
        if step is None or self._before is None or step > self._first:
            return self._digest
        return self._before.digest(step)

    def _until(self, epoch: int, bucket: int) -> int:
        """Returns the number of a bucket's examples shown before an epoch."""
        return sum(group.until(epoch) for group in self._groups[bucket])

    def _batches(self, epoch: int, bucket: int) -> int:
        """Returns the number of a bucket's batches, since the plan took effect, before an epoch."""
        return max(0, self._until(epoch, bucket) - self._starts[bucket]) // self._batch_size

    def first_step(self, epoch: int) -> int:
        """Returns the first step of an epoch; that of the last amendment, if the epoch had begun before it."""
        return self._first + sum(self._batches(epoch, bucket) for bucket in self._groups)

    def epoch(self, step: int) -> int:
        """Returns the epoch of a step."""
        if self._before is not None and step < self._first:
            return self._before.epoch(step)
        return _epoch_of(step, self.first_step)

    def __call__(self, step: int) -> Rows:
        """Returns the examples of a step, from 0."""
        if self._before is not None and step < self._first:
            return self._before(step)
        epoch, buckets = self._epoch_so_far(step)
        bucket = int(self._buckets(epoch)[len(buckets)])
        start = self._shown(epoch, buckets, bucket)
        return Rows(bucket, *self._slice(bucket, start, start + self._batch_size))

    def _epoch_so_far(self, step: int) -> tuple[int, NDArray[np.int64]]:
        """Returns the epoch of a step, and the bucket of each of its steps before."""
        epoch = self.epoch(step)
        return epoch, self._buckets(epoch)[: step - self.first_step(epoch)]

    def _shown(self, epoch: int, buckets: NDArray[np.int64], bucket: int) -> int:
        """Returns the place of a bucket's next example in its sequence, after those steps of an epoch."""
        batches = self._batches(epoch, bucket) + int(np.count_nonzero(buckets == bucket))
        return self._starts[bucket] + batches * self._batch_size

    def _buckets(self, epoch: int) -> NDArray[np.int64]:
        """Returns the bucket of each step of an epoch."""
        return self._kept((epoch, -1), lambda: self._draw_buckets(epoch))

    def _draw_buckets(self, epoch: int) -> NDArray[np.int64]:
        counts = [self._batches(epoch + 1, bucket) - self._batches(epoch, bucket) for bucket in self._groups]
        buckets = np.repeat(np.array(list(self._groups), np.int64), counts)
        return buckets[_shuffled(self._seed, _STEPS, epoch, np.arange(len(buckets)))]

    def _slice(self, bucket: int, start: int, stop: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Returns indices and passes of a slice of a bucket's endless sequence."""
        epoch = _epoch_of(start, lambda epoch: self._until(epoch, bucket))
        found: list[Any] = []
        while start < stop:
            indices, passes = self._order(epoch, bucket)
            begin = self._until(epoch, bucket)
            piece = slice(start - begin, stop - begin)
            found.append((indices[piece], passes[piece]))
            start += len(found[-1][0])
            epoch += 1
        return tuple(np.concatenate(column).astype(np.int64) for column in zip(*found, strict=True))  # type: ignore

    def _entries(self, before: "Shuffled") -> dict[int, int]:
        """Returns, for each bucket, the place in its sequence behind all that the plan before has shown."""
        epoch, buckets = before._epoch_so_far(self._first)
        return {
            bucket: self._entry(*before._next(bucket, before._shown(epoch, buckets, bucket)), bucket)
            if bucket in before._groups
            else self._until(epoch, bucket)
            for bucket in self._groups
        }

    def _next(self, bucket: int, place: int) -> tuple[int, NDArray[np.uint64]]:
        """Returns the epoch and the hash of the example at a place of a bucket's sequence."""
        epoch = _epoch_of(place, lambda epoch: self._until(epoch, bucket))
        indices, passes = self._order(epoch, bucket)
        within = place - self._until(epoch, bucket)
        return epoch, mix(self._seed, _EPOCH, epoch, passes[within], indices[within])

    def _entry(self, epoch: int, hashed: NDArray[np.uint64], bucket: int) -> int:
        """Returns the place of the first example of an epoch whose hash is not below `hashed`."""
        indices, passes = self._order(epoch, bucket)
        return self._until(epoch, bucket) + int(
            np.searchsorted(mix(self._seed, _EPOCH, epoch, passes, indices), hashed)
        )

    def _order(self, epoch: int, bucket: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Returns a bucket's examples in the order of an epoch, by hash, and their passes."""
        return self._kept((epoch, bucket), lambda: self._draw_order(epoch, bucket))

    def _draw_order(self, epoch: int, bucket: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        groups = [group.shown(epoch, self._seed) for group in self._groups[bucket]]
        indices, passes = (np.concatenate(column) for column in zip(*groups, strict=True))
        order = _shuffled(self._seed, _EPOCH, epoch, passes, indices)
        return indices[order], passes[order]

    def _kept(self, key: tuple[int, int], make: Any) -> Any:
        """Returns the cached value of a key, computed by `make` on first use; evicts the least recently used."""
        with self._lock:
            if key not in self._orders:
                self._orders[key] = make()
            self._orders.move_to_end(key)
            while len(self._orders) > 2 * len(self._groups) + 2:
                self._orders.popitem(last=False)
            return self._orders[key]


class InOrder:
    """A plan that shows each example once, in stored order, in full batches of each bucket.

    Batches are in the order of their last examples. If no bucket fills one, the only batch repeats the examples of the
    largest bucket.
    """

    def __init__(
        self, buckets: NDArray[np.integer[Any]], batch_size: int, kept: NDArray[np.bool_] | None = None
    ) -> None:
        """`buckets` [n] and `kept` [n] are those of `Shuffled`."""
        shown = np.arange(len(buckets)) if kept is None else np.flatnonzero(kept)
        found = []
        for bucket in np.unique(buckets[shown]):
            members = shown[buckets[shown] == bucket]
            found.append(members[: len(members) - len(members) % batch_size].reshape(-1, batch_size))
        batches = np.concatenate(found) if found else np.zeros((0, batch_size), np.int64)
        if len(shown) and not len(batches):
            present, counts = np.unique(buckets[shown], return_counts=True)
            batches = np.resize(shown[buckets[shown] == present[np.argmax(counts)]], (1, batch_size))
        self._batches = batches[np.argsort(batches[:, -1])]
        self._buckets = np.asarray(buckets)[self._batches[:, 0]]
        self._digest = hashlib.sha256(self._batches.tobytes() + self._buckets.tobytes()).hexdigest()[:16]

    def digest(self, step: int | None = None) -> str:
        """Returns what equal plans have in common."""
        del step
        return self._digest

    @property
    def steps(self) -> int:
        """Number of full batches."""
        return len(self._batches)

    def __call__(self, step: int) -> Rows:
        """Returns the examples of a step, from 0."""
        indices = self._batches[step]
        return Rows(int(self._buckets[step]), indices, np.zeros_like(indices))
