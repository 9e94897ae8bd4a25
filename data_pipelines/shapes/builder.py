"""The data set `shapes` as a TFDS builder: generated on demand, stored as ArrayRecord, without TensorFlow.

builder = Shapes(data_dir="data", train_examples=24000, test_examples=1000)
builder.download_and_prepare()
source = builder.as_data_source("train")
"""

import functools
import io
from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image

from data_pipelines.quiet_tfds import tfds
from data_pipelines.shapes.edits import Edit, Novelty, random_edit
from data_pipelines.shapes.scene import SIZE, Scene, render
from varedit_jax.errors import UserError

SPLITS = ("train", "test")
TRAIN_EXAMPLES = 24_000
TEST_EXAMPLES = 1_000
_CACHED_IMAGES = 4096  # cached during preparation, since many scenes recur


def example_novelty(split: str, index: int) -> Novelty:
    """Returns `train`, or in `test` `combination` for every tenth example and `scene` for the others.

    Uniform draws would give such a combination to 8 % of the edits of single objects.
    """
    if split == "train":
        return "train"
    return "combination" if index % 10 == 9 else "scene"


def example_edit(seed: int, split: str, index: int) -> Edit:
    """Returns edit `index` of a split, which does not depend on the size of the split."""
    rng = np.random.default_rng([seed, SPLITS.index(split), index])
    return random_edit(rng, example_novelty(split, index))


@functools.lru_cache(maxsize=_CACHED_IMAGES)
def _png(scene: Scene) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(render(scene)).save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()


class Shapes(tfds.core.GeneratorBasedBuilder):
    """Instruction-guided edits of images of colored shapes, with exact targets.

    The name of the builder's config contains the sizes and the seed, so data sets that differ in these get different
    directories.
    """

    name = "shapes"
    VERSION = tfds.core.Version("2.0.0")
    url_infos = None  # no checksums; TFDS would look for them with a package that it does not install

    def __init__(
        self,
        *,
        train_examples: int = TRAIN_EXAMPLES,
        test_examples: int = TEST_EXAMPLES,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        """Passes further arguments to the TFDS builder. Raises UserError for a split without examples or seed < 0."""
        if min(train_examples, test_examples) < 1 or seed < 0:
            raise UserError(
                f"shapes of {train_examples} training and {test_examples} test examples with seed {seed} cannot be "
                f"made; each split needs at least 1 example, and the seed is at least 0"
            )
        self.sizes = {"train": train_examples, "test": test_examples}
        self.seed = seed
        config = tfds.core.BuilderConfig(
            name=f"train{train_examples}_test{test_examples}_seed{seed}",
            description=f"{train_examples} training and {test_examples} test examples, seed {seed}.",
        )
        kwargs.setdefault("file_format", "array_record")
        super().__init__(config=config, **kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        image = tfds.features.Image(shape=(SIZE, SIZE, 3), dtype=np.uint8, encoding_format="png")
        return self.dataset_info_from_configs(
            description="Edits of colored shapes with exact targets: see data_pipelines/shapes.",
            features=tfds.features.FeaturesDict(
                {
                    "source": image,
                    "target": image,
                    "instruction": tfds.features.Text(),
                    "kind": tfds.features.Text(),
                    "source_scene": tfds.features.Text(),
                    "target_scene": tfds.features.Text(),
                    "novelty": tfds.features.Text(),
                    "example_id": tfds.features.Text(),
                }
            ),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        del dl_manager  # nothing is downloaded
        return {split: self._generate_examples(split) for split in SPLITS}

    def _generate_examples(self, split: str) -> Iterator[tuple[int, dict[str, Any]]]:
        for index in range(self.sizes[split]):
            edit = example_edit(self.seed, split, index)
            yield (
                index,
                {
                    "source": io.BytesIO(_png(edit.source)),
                    "target": io.BytesIO(_png(edit.target)),
                    "instruction": edit.instruction,
                    "kind": edit.kind,
                    "source_scene": edit.source.encode(),
                    "target_scene": edit.target.encode(),
                    "novelty": example_novelty(split, index),
                    "example_id": f"{split}-{self.seed}-{index}",
                },
            )
