"""Weights to export or to edit with: a directory of weights, or a run."""

import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

from varedit_jax.config import EditingConfig, EditorConfig, RunConfig, SamplingConfig, from_dict
from varedit_jax.errors import UserError
from varedit_jax.parameters import abstract_params
from varedit_jax.storage.paths import PathLike, resolve, stamp
from varedit_jax.weights import native, run_directory
from varedit_jax.weights.directory import CONFIG, PARTS, is_weights_directory, read_editing_config, read_editor_config
from varedit_jax.weights.manifest import MANIFEST, read_manifest


class ExportSource(NamedTuple):
    """Weights to export or to edit with: those of a directory, or of a checkpoint of a run."""

    directory: pathlib.Path
    config: EditorConfig
    sampling: SamplingConfig
    editing: EditingConfig
    parts: tuple[str, ...]
    run: RunConfig | None  # None for a directory of weights, as is the step
    step: int | None
    manifest: dict[str, Any] | None
    ema: bool = False  # the EMA that a run kept, instead of its parameters

    def open(self, part: str) -> dict[str, native.Leaf]:
        """Arrays of a part by path, not yet read."""
        return native.open_part(self.directory, part, abstract_params(self.config, part), ema=self.ema, step=self.step)

    def stamp(self) -> list[Any]:
        """Values that are equal for the same weights: step, EMA or not, and `stamp` of their files."""
        described = (CONFIG, MANIFEST, *(f"{part}.safetensors" for part in self.parts))
        return [
            self.step,
            self.ema,
            *(stamp(self.directory / name) for name in described if (self.directory / name).is_file()),
        ]


def open_source(
    directory: PathLike, parts: Sequence[str] = (), weights: str = "model", step: int | None = None
) -> ExportSource:
    """Opens weights to export or to edit with; of a run, the parts that it trained. `parts` chooses among them.

    `weights` "ema" takes the EMA that a run kept, `step` an older checkpoint of it. Raises UserError if there are none,
    or a part is not among them.
    """
    root = resolve(directory)
    run = manifest = None
    if is_weights_directory(root):
        config, sampling = read_editor_config(root)
        editing = read_editing_config(root)
        found = tuple(part for part in PARTS if native.is_part(root, part))
        manifest = read_manifest(root)
        if step is not None:
            raise UserError(f"{root} is a directory of weights, which has no checkpoint of step {step}; give a run's")
    else:
        run = _read_run(root)
        config, sampling, editing = run.model, run.sampling, run.editing
        found = ("transformer", "text") if run.train_text else ("transformer",)
        step = _choose_step(root, step)
    lost = [part for part in parts if part not in found]
    if lost:
        raise UserError(f"{root} holds no {lost[0]} weights, but {', '.join(found)}")
    if weights == "ema" and (run is None or not run.optimizer.ema_decay):
        raise UserError(f"{root} holds no EMA of its parameters; only a run with optimizer.ema_decay keeps one")
    ema = weights == "ema"
    return ExportSource(root, config, sampling, editing, tuple(parts) or found, run, step, manifest, ema)


def _read_run(root: pathlib.Path) -> RunConfig:
    record = run_directory.read_config(root)
    if "train_text" not in record:
        raise UserError(f"{root} is a run of {record.get('name', 'something else')}, not of an editor")
    try:
        return from_dict(RunConfig, record)
    except (ValueError, TypeError) as error:
        raise UserError(f"{root}/config.json does not describe a run of this version: {error}") from error


def _choose_step(root: pathlib.Path, step: int | None) -> int:
    """The newest checkpoint, or that of `step`: all parts are read from the same one, also while the run goes on."""
    steps = run_directory.checkpoint_steps(root)
    if not steps:
        raise UserError(f"{root} has no checkpoint yet")
    if step is not None and step not in steps:
        raise UserError(f"{root} has no checkpoint of step {step}, but of {', '.join(map(str, steps))}")
    return steps[-1] if step is None else step
