"""`Editor`: load once, edit images by instructions."""

import collections
import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from varedit_jax.config import EditingConfig, EditorConfig, SamplingConfig, per_scale
from varedit_jax.errors import UserError
from varedit_jax.images import ImageSource, read_image
from varedit_jax.parallel.compiler_options import jit_everywhere
from varedit_jax.parallel.constrain import batch_only
from varedit_jax.parallel.mesh import replicated, whole_batch
from varedit_jax.parallel.programs import Programs
from varedit_jax.placement import Placement, fit, restore, restore_released
from varedit_jax.sampling import loading, sampler
from varedit_jax.scales import SQUARE, Pyramid, aspects_to_use, editor_pyramid, image_size, nearest_aspect
from varedit_jax.storage.paths import PathLike
from varedit_jax.text.vocabulary import Vocabulary
from varedit_jax.types import Params


class Editor:
    """A tokenizer, a text encoder and a transformer, ready to edit.

    Compiled programs are cached by number of images, size and sampling configuration.
    """

    def __init__(
        self,
        config: EditorConfig,
        params: Params,
        sampling: SamplingConfig | None = None,
        editing: EditingConfig | None = None,
        vocabulary: Vocabulary | None = None,
    ) -> None:
        """Takes parameters {"tokenizer", "text", "transformer"}, or abstract ones to compile for, and their use."""
        self.config = config
        # jax.Arrays keep their sharding, which may include devices of other processes.
        placed = (jax.Array, jax.ShapeDtypeStruct)
        self.params = jax.tree.map(lambda leaf: leaf if isinstance(leaf, placed) else jax.device_put(leaf), params)
        self.sampling = sampling or SamplingConfig()
        self.editing = editing or EditingConfig()
        self.vocabulary = vocabulary or Vocabulary.load()

    @classmethod
    def load(
        cls,
        where: PathLike,
        *,
        dtype: str | None = None,
        mesh: jax.sharding.Mesh | None = None,
        weights: str = "model",
        step: int | None = None,
        tokenizer: PathLike = "",
        text: PathLike = "",
    ) -> "Editor":
        """Loads a directory of weights or a checkpoint of a run; arguments and errors as of `loading.load`."""
        return cls(
            *loading.load(where, dtype=dtype, mesh=mesh, weights=weights, step=step, tokenizer=tokenizer, text=text)
        )

    def edit(
        self,
        images: Sequence[ImageSource],
        instructions: Sequence[str],
        seeds: Sequence[int] | None = None,
        sampling: SamplingConfig | None = None,
        aspect: str = "",
    ) -> list[np.ndarray]:
        """Edited images, each at the size of its source: uint8 [height, width, 3].

        Args:
          images: paths, PIL images or uint8 arrays, of any sizes.
          instructions: one per image.
          seeds: one per image; a seed gives the same result alone and in any batch. 0, 1, 2, ... by default.
          sampling: instead of the editor's own.
          aspect: "square" shows the model a square, padded with white at the right or bottom, and returns it, as
            VAREdit's published code does; "auto" the nearest of the 15 templates, a template this one; by default the
            nearest of those that the weights were trained on, or "auto" if they do not record any.

        Raises:
          UserError: an image, instruction, seed or aspect that cannot be used, or numbers of them that differ.
        """
        seeds = list(range(len(images))) if seeds is None else list(seeds)
        if not len(images) == len(instructions) == len(seeds):
            raise UserError(
                f"{len(images)} images, {len(instructions)} instructions and {len(seeds)} seeds: give one of each"
            )
        templates = aspects_to_use(aspect, self.editing.aspects)
        back = restore_released if templates == (SQUARE,) else restore
        self._check(instructions, seeds)  # all, before the first group is edited
        groups: dict[Pyramid, list[tuple[int, np.ndarray, Placement]]] = collections.defaultdict(list)
        for index, image in enumerate(images):
            array = read_image(image)
            height, width = array.shape[:2]
            pyramid = editor_pyramid(self.config, nearest_aspect(height, width, templates))
            fitted, placement = fit(array, image_size(self.config, pyramid))
            groups[pyramid].append((index, fitted, placement))
        results: dict[int, np.ndarray] = {}
        for pyramid, members in groups.items():
            order = [index for index, _, _ in members]
            edited = self.edit_fitted(
                np.stack([fitted for _, fitted, _ in members]),
                [instructions[index] for index in order],
                [seeds[index] for index in order],
                sampling,
                pyramid,
            )
            for (index, _, placement), image in zip(members, edited[-1], strict=True):
                results[index] = back(image, placement)
        return [results[index] for index in range(len(images))]

    def edit_fitted(
        self,
        images: np.ndarray,
        instructions: Sequence[str],
        seeds: Sequence[int],
        sampling: SamplingConfig | None = None,
        pyramid: Pyramid | None = None,
        every_scale: bool = False,
    ) -> np.ndarray:
        """Edits images that already have the model's size: uint8 [B, y, x, 3] -> uint8 [1 or K, B, y, x, 3].

        With `every_scale` the first axis holds the image after each scale, otherwise the final one alone. On a mesh the
        images are split over its devices, all processes call it with the same ones, and each gets all results.
        """
        run, request = self._program(images, instructions, seeds, sampling, pyramid, every_scale)
        return np.asarray(run(self.params, *request))[:, : len(images)]

    def prepare(
        self, images: np.ndarray, instructions: Sequence[str], seeds: Sequence[int], every_scale: bool = False
    ) -> None:
        """Compiles the program that `edit_fitted` needs for such a request, with these or other parameters."""
        run, request = self._program(images, instructions, seeds, every_scale=every_scale)
        run.prepare(self.params, *request)

    def _program(
        self,
        images: np.ndarray,
        instructions: Sequence[str],
        seeds: Sequence[int],
        sampling: SamplingConfig | None = None,
        pyramid: Pyramid | None = None,
        every_scale: bool = False,
    ) -> tuple[Programs, tuple[Any, ...]]:
        """Returns the program of a request, and its arguments after the parameters."""
        pyramid = pyramid or editor_pyramid(self.config)
        sampling = sampling or self.sampling
        for value in (sampling.guidance, sampling.temperature):
            try:
                per_scale(value, pyramid.scales)
            except ValueError as error:
                raise UserError(str(error)) from error
        self._check(instructions, seeds)
        limit = self._most_tokens
        ids_BT, length_B = self.vocabulary.encode(instructions, limit)
        # Padded to a power of two, so that few programs are compiled.
        room = min(limit, max(16, 1 << int(length_B.max() - 1).bit_length()))
        request: tuple[np.ndarray, ...] = (images, ids_BT[:, :room], length_B, np.asarray(seeds, np.uint32))
        mesh = jax.sharding.get_mesh()
        more = whole_batch(mesh, len(images)) - len(images)  # copies of the last image
        request = tuple(np.pad(x, [(0, more)] + [(0, 0)] * (x.ndim - 1), mode="edge") for x in request)
        return _compiled(self.config, pyramid, sampling, every_scale, mesh), request

    @property
    def _most_tokens(self) -> int:
        return min(self.config.text.max_tokens, self.config.transformer.unconditional_rows)

    def _check(self, instructions: Sequence[str], seeds: Sequence[int]) -> None:
        """Raises UserError for the first instruction or seed that cannot be used."""
        for instruction in instructions:
            self.vocabulary.check_instruction(instruction, self._most_tokens)
        for seed in seeds:
            if not 0 <= seed < 2**32:
                raise UserError(f"the seed {seed} cannot be used; give a whole number from 0 to {2**32 - 1}")


@functools.cache
def _compiled(
    config: EditorConfig, pyramid: Pyramid, sampling: SamplingConfig, every_scale: bool, mesh: jax.sharding.Mesh
) -> Programs:
    """Returns the programs of such calls."""
    return Programs("edit", jitted_edit(config, pyramid, sampling, every_scale, mesh).lower, mesh)


def jitted_edit(
    config: EditorConfig, pyramid: Pyramid, sampling: SamplingConfig, every_scale: bool, mesh: jax.sharding.Mesh
) -> Any:
    """Returns the jitted function of the parameters and of a request: images, token ids, lengths and seeds."""

    def edit(params: Params, images: jax.Array, ids_BT: jax.Array, length_B: jax.Array, seeds_B: jax.Array) -> Any:
        images, ids_BT, length_B, seeds_B = map(batch_only, (images, ids_BT, length_B, seeds_B))
        keys_B = jax.vmap(jax.random.key)(seeds_B)
        return sampler.edit(
            params,
            images,
            ids_BT,
            length_B,
            keys_B,
            config=config,
            pyramid=pyramid,
            sampling=sampling,
            every_scale=every_scale,
        )

    if mesh.empty:
        return jit_everywhere(edit)
    return jit_everywhere(edit, mesh.devices.flat[0], out_shardings=replicated(mesh))


def abstract_request(
    config: EditorConfig, pyramid: Pyramid, mesh: jax.sharding.Mesh, images: int, text_tokens: int
) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Returns the arguments of `jitted_edit` after the parameters, for so many images, as abstract arrays."""
    batch = whole_batch(mesh, images)
    shapes = (
        ((batch, *image_size(config, pyramid), 3), np.uint8),
        ((batch, text_tokens), np.int32),
        ((batch,), np.int32),
        ((batch,), np.uint32),
    )
    return tuple(jax.ShapeDtypeStruct(shape, dtype, sharding=replicated(mesh)) for shape, dtype in shapes)
