"""What the tokens of each scale see of a sequence: prefixes, and the scale-aligned reference (model.md, section 6)."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from varedit_jax.resize import area_resize
from varedit_jax.scales import Pyramid

SMALL_GROUP = 256  # queries; with cuDNN, neighboring groups below it share one masked matmul


@dataclasses.dataclass(frozen=True)
class Visibility:
    """The prefix that the tokens of each scale see in one block, as static slices of [source S][targets L]."""

    pyramid: Pyramid
    conditioning: str
    scale_aligned: bool  # this block uses the scale-aligned reference (block 0 of "sar")

    @property
    def source_tokens(self) -> int:
        """S."""
        return self.pyramid.source_tokens(self.conditioning)

    def source_groups(self) -> list[tuple[slice, slice]]:
        """Query tokens of the source and the keys they see: the source only, never the target."""
        if self.conditioning != "full":
            return [(slice(0, self.source_tokens), slice(0, self.source_tokens))]
        return [(tokens, slice(0, tokens.stop)) for tokens in self.pyramid.slices()]

    def keys(self, x_BHMD: jax.Array, scale: int, target_stop: int) -> jax.Array:
        """Keys (or values) visible to `scale`: its part of the source, then targets [0, target_stop).

        x_BHMD is the buffer [source S][targets ...]; the result is [B, H, visible, D].
        """
        source = self.source_tokens
        if self.is_prefix:
            return x_BHMD[:, :, : source + target_stop]
        if self.scale_aligned:
            reference = self._reference(x_BHMD[:, :, :source], scale)  # SAR
        else:
            reference = x_BHMD[:, :, : self.pyramid.offsets[scale + 1]]
        return jnp.concatenate([reference, x_BHMD[:, :, source : source + target_stop]], axis=2)

    @property
    def is_prefix(self) -> bool:
        """What every scale sees is a prefix of [source S][targets L]."""
        return not self.scale_aligned and self.conditioning != "full"

    def all_keys(self, x_BHMD: jax.Array) -> jax.Array:
        """Keys (or values) of the whole sequence that any of its tokens sees, in the order of `visibility_mask`.

        [source][targets]; with SAR, the references of all scales but the last lie between them (the last reference is
        the source itself).
        """
        if not self.scale_aligned:
            return x_BHMD
        source_BHSD, targets_BHLD = jnp.split(x_BHMD, [self.source_tokens], axis=2)
        references = [self._reference(source_BHSD, scale) for scale in range(self.pyramid.scales - 1)]
        return jnp.concatenate([source_BHSD, *references, targets_BHLD], axis=2)

    def _reference(self, x_BHSD: jax.Array, scale: int) -> jax.Array:
        """ref_k of SAR: the source's keys or values, area-resized per head and channel to the grid of `scale`."""
        batch, heads, _, head_size = x_BHSD.shape
        x_BHhwD = x_BHSD.reshape(batch, heads, *self.pyramid.last, head_size)
        resized = area_resize(x_BHhwD.astype(jnp.float32), self.pyramid.grids[scale])
        return resized.reshape(batch, heads, -1, head_size).astype(x_BHSD.dtype)


def visibility_mask(visibility: Visibility) -> np.ndarray:
    """The same visibility as a dense mask, bool [S + L, M], over the keys that `Visibility.all_keys` gives.

    The fast kernels take from it which keys to skip.
    """
    source, pyramid = visibility.source_tokens, visibility.pyramid
    references = pyramid.offsets[-2] if visibility.scale_aligned else 0
    targets = source + references
    mask = np.zeros((source + pyramid.target_tokens, targets + pyramid.target_tokens), bool)
    for queries, keys in visibility.source_groups():
        mask[queries, keys] = True
    for scale, tokens in enumerate(pyramid.slices()):
        queries = slice(source + tokens.start, source + tokens.stop)
        if visibility.scale_aligned and scale < pyramid.scales - 1:
            seen = slice(source + tokens.start, source + tokens.stop)  # the source on this scale's grid
        else:
            seen = slice(0, pyramid.offsets[scale + 1] if visibility.conditioning == "full" else source)
        mask[queries, seen] = True
        mask[queries, targets : targets + tokens.stop] = True
    return mask


@dataclasses.dataclass(frozen=True)
class QueryGroup:
    """Queries that see the same keys, or small scales that share one matmul under a mask."""

    queries: slice
    keys: tuple[slice, ...]  # pieces of `Visibility.all_keys`
    mask: np.ndarray | None  # bool [queries, keys]; None if every query sees every key


def query_groups(visibility: Visibility, tokens: int, small: int = SMALL_GROUP) -> list[QueryGroup]:
    """The first `tokens` queries in groups: scales of `small` tokens or more alone, smaller neighbors together."""
    mask = visibility_mask(visibility)[:tokens]
    starts = [queries.start for queries, _ in visibility.source_groups()]
    starts += [visibility.source_tokens + tokens.start for tokens in visibility.pyramid.slices()]
    stops = [*starts[1:], len(mask)]
    groups: list[list[int]] = []
    for start, stop in zip(starts, stops, strict=True):
        if groups and stop - start < small and groups[-1][2]:
            groups[-1][1] = stop
        elif start < tokens:
            groups.append([start, stop, int(stop - start < small)])
    found = []
    for start, stop, _ in groups:
        rows = mask[start:stop]
        seen = np.flatnonzero(np.diff(rows.any(axis=0), prepend=False, append=False))
        keys = tuple(slice(int(first), int(end)) for first, end in seen.reshape(-1, 2))
        piece = np.concatenate([rows[:, key] for key in keys], axis=1)
        found.append(QueryGroup(slice(start, stop), keys, None if piece.all() else piece))
    return found
