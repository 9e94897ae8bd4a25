"""Weights to export: a directory of weights, or a run."""

import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

from varedit_jax.config import EditorConfig, RunConfig, SamplingConfig, from_dict
from varedit_jax.errors import UserError
from varedit_jax.parameters import abstract_params
from varedit_jax.storage.paths import PathLike, resolve, stamp
from varedit_jax.weights import native, run_directory
from varedit_jax.weights.directory import CONFIG, PARTS, is_weights_directory, read_editor_config
from varedit_jax.weights.manifest import MANIFEST, read_manifest


class ExportSource(NamedTuple):
    """Weights to export: those of a directory, or of the newest checkpoint of a run."""

    directory: pathlib.Path
    config: EditorConfig
    sampling: SamplingConfig
    parts: tuple[str, ...]
    run: RunConfig | None  # None for a directory of weights, as is the step
    step: int | None
    manifest: dict[str, Any] | None
    ema: bool = False  # the EMA that a run kept, instead of its parameters

    def open(self, part: str) -> dict[str, native.Leaf]:
        """Arrays of a part by path, not yet read."""
        return native.open_part(self.directory, part, abstract_params(self.config, part), ema=self.ema)

    def stamp(self) -> list[Any]:
        """Values that are equal for the same weights: step, EMA or not, and `stamp` of their files."""
        described = (CONFIG, MANIFEST, *(f"{part}.safetensors" for part in self.parts))
        return [
            self.step,
            self.ema,
            *(stamp(self.directory / name) for name in described if (self.directory / name).is_file()),
        ]


def open_source(directory: PathLike, parts: Sequence[str] = (), weights: str = "model") -> ExportSource:
    """Opens weights to export; of a run, the parts that it trained. `parts` chooses among them.

    `weights` "ema" takes the EMA that a run kept. Raises UserError if there are none, or a part is not among them.
    """
    root = resolve(directory)
    run = step = manifest = None
    if is_weights_directory(root):
        config, sampling = read_editor_config(root)
        found = tuple(part for part in PARTS if native.is_part(root, part))
        manifest = read_manifest(root)
    else:
        record = run_directory.read_config(root)
        if "train_text" not in record:
            raise UserError(f"{root} is neither a directory of weights nor a run of an editor")
        run = from_dict(RunConfig, record)
        config, sampling = run.model, run.sampling
        found = ("transformer", "text") if run.train_text else ("transformer",)
        step = next(reversed(run_directory.checkpoint_steps(root)), None)
        if step is None:
            raise UserError(f"{root} has no checkpoint yet")
    lost = [part for part in parts if part not in found]
    if lost:
        raise UserError(f"{root} holds no {lost[0]} weights, but {', '.join(found)}")
    if weights == "ema" and (run is None or not run.optimizer.ema_decay):
        raise UserError(f"{root} holds no EMA of its parameters; only a run with optimizer.ema_decay keeps one")
    return ExportSource(root, config, sampling, tuple(parts) or found, run, step, manifest, ema=weights == "ema")
