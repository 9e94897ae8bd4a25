"""`Editor`: load once, edit images by instructions."""

import collections
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from varedit_jax import hardware
from varedit_jax.config import EditingConfig, EditorConfig, SamplingConfig, per_scale
from varedit_jax.errors import UserError
from varedit_jax.images import ImageSource, read_image
from varedit_jax.parallel.compilation_cache import keep_programs
from varedit_jax.placement import Placement, fit, restore, restore_released
from varedit_jax.sampling import loading, pipeline
from varedit_jax.sampling.guidance import guided_scales
from varedit_jax.sampling.pipeline import Pairs, Source, Text
from varedit_jax.scales import SQUARE, Pyramid, aspects_to_use, editor_pyramid, image_size, nearest_aspect
from varedit_jax.storage.paths import PathLike
from varedit_jax.text.vocabulary import Vocabulary
from varedit_jax.types import Params

MOST_IMAGES = 64  # that are edited together, whatever the memory


class Editor:
    """A tokenizer, a text encoder and a transformer, ready to edit.

    Programs are compiled for numbers of images and of text tokens, each padded to a power of two, and for the scales
    that are guided, whatever the guidance, temperature, top-p and seed (sampling/pipeline.py). Calls from several
    threads give what each would give alone.
    """

    def __init__(
        self,
        config: EditorConfig,
        params: Params,
        sampling: SamplingConfig | None = None,
        editing: EditingConfig | None = None,
        vocabulary: Vocabulary | None = None,
        max_batch: int = 0,
    ) -> None:
        """Takes parameters {"tokenizer", "text", "transformer"}, or abstract ones to compile for, and their use.

        max_batch: images that are edited together at most; 0: as many as there is memory for.
        """
        keep_programs()
        self.config = config
        # jax.Arrays keep their sharding, which may include devices of other processes.
        placed = (jax.Array, jax.ShapeDtypeStruct)
        self.params = jax.tree.map(lambda leaf: leaf if isinstance(leaf, placed) else jax.device_put(leaf), params)
        self.sampling = sampling or SamplingConfig()
        self.editing = editing or EditingConfig()
        self.vocabulary = vocabulary or Vocabulary.load()
        self.max_batch = max_batch
        self._compiled: set[Any] = set()  # what requests have needed, so that the next ones need not ask every program

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
        sampling: SamplingConfig | Sequence[SamplingConfig] | None = None,
        aspect: str = "",
    ) -> list[np.ndarray]:
        """Edited images, each at the size of its source: uint8 [height, width, 3].

        Args:
          images: paths, PIL images or uint8 arrays, of any sizes.
          instructions: one per image.
          seeds: one per image; a seed gives the same result alone and in any batch. 0, 1, 2, ... by default.
          sampling: instead of the editor's own: one, or one per image.
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
                [sampling[index] for index in order] if isinstance(sampling, Sequence) else sampling,
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
        sampling: SamplingConfig | Sequence[SamplingConfig] | None = None,
        pyramid: Pyramid | None = None,
        every_scale: bool = False,
    ) -> np.ndarray:
        """Edits images that already have the model's size: uint8 [B, y, x, 3] -> uint8 [1 or K, B, y, x, 3].

        With `every_scale` the first axis holds the image after each scale, otherwise the final one alone. On a mesh the
        images are split over its devices, all processes call it with the same ones, and each gets all results.
        """
        pyramid = pyramid or editor_pyramid(self.config)
        each = self._sampling(sampling, len(images), pyramid)
        self._check(instructions, seeds)
        most = self._most_images(pyramid, guided_scales(each, pyramid.scales) > 0)
        parts = []
        for start in range(0, len(images), most):
            part = slice(start, start + most)
            request = images[part], *self._tokens(instructions[part]), seeds[part], each[part], pyramid, every_scale
            self._compile(*request)
            parts.append(np.asarray(self._stages(pipeline.run, *request))[:, : len(images[part])])
        return np.concatenate(parts, axis=1)

    def prepare(
        self,
        images: np.ndarray,
        instructions: Sequence[str],
        seeds: Sequence[int],
        sampling: SamplingConfig | Sequence[SamplingConfig] | None = None,
        pyramid: Pyramid | None = None,
        every_scale: bool = False,
    ) -> None:
        """Compiles the programs that `edit_fitted` needs for such a request, with these or other parameters."""
        pyramid = pyramid or editor_pyramid(self.config)
        each = self._sampling(sampling, len(images), pyramid)
        self._compile(images, *self._tokens(instructions), seeds, each, pyramid, every_scale)

    def warm_up(
        self,
        images: Sequence[int] = (1,),
        text_tokens: int = 1,
        sampling: SamplingConfig | None = None,
        pyramids: Sequence[Pyramid] = (),
    ) -> None:
        """Compiles all programs of edits ahead, several at a time, so that none is compiled while somebody waits.

        Args:
          images: numbers of images that are edited together.
          text_tokens: of the longest instruction; shorter ones of the same bucket need nothing else.
          sampling: one with guidance in the same scales as those to come; the editor's own by default.
          pyramids: of the aspects; the square alone by default.
        """
        room = pipeline.text_bucket(text_tokens, self._most_tokens)
        with pipeline.compiling() as prepare:
            for pyramid in pyramids or (editor_pyramid(self.config),):
                for count in images:
                    fitted = np.zeros((count, *image_size(self.config, pyramid), 3), np.uint8)
                    ids_BT, length_B = np.ones((count, room), np.int32), np.full((count,), text_tokens, np.int32)
                    each = self._sampling(sampling, count, pyramid)
                    self._stages(prepare, fitted, ids_BT, length_B, range(count), each, pyramid, False)

    # --- the stages, whose results a caller may keep

    def encode_source(self, images: np.ndarray, pyramid: Pyramid | None = None) -> Source:
        """Encodes images that already have the model's size, uint8 [n, y, x, 3]."""
        pyramid = pyramid or editor_pyramid(self.config)
        return pipeline.encode_source(
            pipeline.run, self.params["tokenizer"], images, self.config, self.editing, pyramid
        )

    def encode_text(self, instructions: Sequence[str]) -> Text:
        """Encodes instructions. Raises UserError for one that cannot be used."""
        self._check(instructions, ())
        return pipeline.encode_text(
            pipeline.run, self.params["text"], *self._tokens(instructions), self.config, self.editing
        )

    def prefill(self, source: Source, text: Text, guided: bool = True) -> Pairs:
        """Each source with the instruction at its place; a single one of either goes with all of the other.

        Without `guided` half the memory and time; then no sampling from it can have guidance.
        """
        return pipeline.prefill(pipeline.run, self.params["transformer"], source, text, self.config, guided)

    def sample(
        self,
        pairs: Pairs,
        seeds: Sequence[int],
        sampling: SamplingConfig | Sequence[SamplingConfig] | None = None,
    ) -> np.ndarray:
        """Edits of pairs, or several of a single pair, one for each seed: uint8 [n, y, x, 3]."""
        self._check((), seeds)
        each = self._sampling(sampling, len(seeds), pairs.pyramid)
        bits = pipeline.sample(pipeline.run, self.params["transformer"], pairs, seeds, each, self.config)
        how = self.config, self.editing, pairs.pyramid
        images = pipeline.decode(pipeline.run, self.params["tokenizer"], bits, *how, every_scale=False)
        return np.asarray(images)[-1, : len(seeds)]

    def _stages(
        self,
        run: pipeline.Run,
        images: np.ndarray,
        ids_BT: np.ndarray,
        length_B: np.ndarray,
        seeds: Sequence[int],
        sampling: Sequence[SamplingConfig],
        pyramid: Pyramid,
        every_scale: bool,
    ) -> Any:
        """All stages by `run`: the images, with padding."""
        request = images, ids_BT, length_B, seeds, sampling
        return pipeline.edit(run, self.params, *request, self.config, self.editing, pyramid, every_scale)

    def _compile(
        self,
        images: np.ndarray,
        ids_BT: np.ndarray,
        length_B: np.ndarray,
        seeds: Sequence[int],
        sampling: Sequence[SamplingConfig],
        pyramid: Pyramid,
        every_scale: bool,
    ) -> None:
        """Compiles the programs of a request, several at a time, unless one that needs the same has come before."""
        mesh, guided = jax.sharding.get_mesh(), guided_scales(sampling, pyramid.scales)
        need = mesh, pipeline.bucket(mesh, len(images)), ids_BT.shape[1], guided, pyramid, every_scale
        if need not in self._compiled:
            with pipeline.compiling() as prepare:
                self._stages(prepare, images, ids_BT, length_B, seeds, sampling, pyramid, every_scale)
            self._compiled.add(need)

    def _tokens(self, instructions: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Token ids padded to a bucket, and their lengths."""
        ids_BT, length_B = self.vocabulary.encode(instructions, self._most_tokens)
        return ids_BT[:, : pipeline.text_bucket(int(length_B.max()), self._most_tokens)], length_B

    def _sampling(
        self, sampling: SamplingConfig | Sequence[SamplingConfig] | None, count: int, pyramid: Pyramid
    ) -> list[SamplingConfig]:
        """One config for each image. Raises UserError for one that does not fit the pyramid, or another number."""
        each = sampling if isinstance(sampling, Sequence) else [sampling or self.sampling] * count
        if len(each) != count:
            raise UserError(f"{len(each)} sampling configs for {count} images: give one, or one of each")
        for config in each:
            for value in (config.guidance, config.temperature):
                try:
                    per_scale(value, pyramid.scales)
                except ValueError as error:
                    raise UserError(str(error)) from error
        return list(each)

    def _most_images(self, pyramid: Pyramid, guided: bool) -> int:
        """How many images are edited together: `max_batch`, or what the device has memory for."""
        if self.max_batch:
            return self.max_batch
        mesh = jax.sharding.get_mesh()
        if not mesh.empty:  # all processes have to say the same
            return MOST_IMAGES
        most = hardware.free_memory(jax.local_devices()[0]) // pipeline.image_bytes(self.config, pyramid, guided)
        return min(MOST_IMAGES, 1 << max(int(most).bit_length() - 1, 0))

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
