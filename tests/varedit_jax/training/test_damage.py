"""Checkpoints that changed on the disk: noticed, set aside, and the run goes on from the one before."""

import json
import pathlib
from collections.abc import Callable

import grain
import jax
import pytest

from tests.varedit_jax.training.runs import Outcome, Run, assert_same, assert_same_outcome, outcome
from tests.varedit_jax.training.test_checkpoint import make_iterator, make_state, save
from varedit_jax.errors import UserError
from varedit_jax.storage import files
from varedit_jax.training import checksums
from varedit_jax.training.checkpoint import Checkpoints
from varedit_jax.training.state import TrainState
from varedit_jax.weights.run_directory import checkpoint_steps


def largest(checkpoint: pathlib.Path) -> pathlib.Path:
    """The largest file of the arrays of a checkpoint."""
    return max((checkpoint / "state").rglob("d/*"), key=lambda path: path.stat().st_size)


def flip(checkpoint: pathlib.Path) -> str:
    """One bit in the middle of an array."""
    path = largest(checkpoint)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    return f"the checksum of {path.relative_to(checkpoint)} differs"


def truncate(checkpoint: pathlib.Path) -> str:
    path = largest(checkpoint)
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-1])
    return f"{path.relative_to(checkpoint)} has {size - 1} of {size} bytes"


def remove(checkpoint: pathlib.Path) -> str:
    path = largest(checkpoint)
    path.unlink()
    return f"{path.relative_to(checkpoint)} is missing"


def lose_place(checkpoint: pathlib.Path) -> str:
    path = checkpoint / "data" / "process_0-of-1.json"
    path.unlink()
    return "data/process_0-of-1.json is missing"


def restore(workdir: pathlib.Path) -> tuple[TrainState, grain.DatasetIterator]:
    iterator = make_iterator()
    with Checkpoints(workdir) as checkpoints:
        return checkpoints.restore(jax.eval_shape(make_state), iterator), iterator


@pytest.mark.parametrize("damage", [flip, truncate, remove, lose_place])
def test_the_run_goes_back_to_the_checkpoint_before(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str], damage: Callable[[pathlib.Path], str]
) -> None:
    """One line says which step and which file; what is damaged is kept elsewhere."""
    save(tmp_path, 1, 2, 3)
    said = damage(tmp_path / "checkpoints" / "3")
    assert_same(restore(tmp_path)[0], make_state(seed=2))
    assert capsys.readouterr().err == (
        f"{tmp_path}/checkpoints/3 is damaged: {said}; it is kept in {tmp_path}/damaged, and the run goes back to the "
        f"checkpoint of step 2\n"
    )
    assert checkpoint_steps(tmp_path) == [1, 2] and (tmp_path / "damaged" / "3" / "state").is_dir()
    save(tmp_path, 3)  # made again, and damaged again
    damage(tmp_path / "checkpoints" / "3")
    damage(tmp_path / "checkpoints" / "2")
    assert_same(restore(tmp_path)[0], make_state(seed=1))
    assert sorted(path.name for path in (tmp_path / "damaged").iterdir()) == ["2", "3", "3_"]


def test_a_draft_of_another_process_is_no_file_of_the_checkpoint(tmp_path: pathlib.Path) -> None:
    """What another process is writing when the checksums are made is gone when they are compared."""
    save(tmp_path, 1)
    checkpoint = tmp_path / "checkpoints" / "1"
    with files.replacing(checkpoint / "manifest_1-of-2.json") as draft:
        draft.write(b'{"files": {}}')
        draft.flush()
        assert any(path.name.endswith(".draft") for path in checkpoint.iterdir())
        checksums.write(checkpoint)
    assert not checksums.find_damage(checkpoint)
    flip(checkpoint)
    assert "the checksum of" in checksums.find_damage(checkpoint)


def test_the_last_checkpoint_stays_where_it_is(tmp_path: pathlib.Path) -> None:
    save(tmp_path, 1)
    said = flip(tmp_path / "checkpoints" / "1")
    for _ in range(2):
        with pytest.raises(UserError, match=f"checkpoints/1 is damaged: {said}; there is no checkpoint before it: bri"):
            restore(tmp_path)
    assert checkpoint_steps(tmp_path) == [1]


def test_a_checkpoint_without_checksums_is_read(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of an older version. What cannot be read at all is set aside there, too."""
    save(tmp_path, 1, 2)
    for step in (1, 2):
        (tmp_path / "checkpoints" / str(step) / "manifest_0-of-1.json").unlink()
    assert_same(restore(tmp_path)[0], make_state(seed=2))
    (tmp_path / "checkpoints" / "2" / "manifest_resumed_0-of-1.json").unlink()
    (tmp_path / "checkpoints" / "2" / "state" / "_METADATA").write_text("{")
    assert_same(restore(tmp_path)[0], make_state(seed=1))
    assert "checkpoints/2 cannot be read" in capsys.readouterr().err


def test_files_without_checksums_get_them_when_they_have_been_restored(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A process was killed before it wrote its manifest: what others wrote is compared, and then there is all of it."""
    save(tmp_path, 1, 2)
    checkpoint = tmp_path / "checkpoints" / "2"
    manifest = checkpoint / "manifest_0-of-1.json"
    entries = json.loads(manifest.read_text())
    missing = {name: entries["files"].pop(name) for name in sorted(entries["files"])[::2]}
    manifest.write_text(json.dumps(entries))
    assert missing and entries["files"]
    assert_same(restore(tmp_path)[0], make_state(seed=2))
    said = f"checkpoints/2 had no checksums of {len(missing)} files, {min(missing)} first; they get them now"
    assert said in capsys.readouterr().err
    assert json.loads((checkpoint / "manifest_resumed_0-of-1.json").read_text())["files"] == missing
    assert not checksums.unlisted(checkpoint)
    assert_same(restore(tmp_path)[0], make_state(seed=2))
    assert not capsys.readouterr().err
    (checkpoint / min(missing)).unlink()
    assert checksums.find_damage(checkpoint) == f"{min(missing)} is missing"


def test_checksums_that_were_written_in_part_are_kept(tmp_path: pathlib.Path) -> None:
    """A process is killed again, and later ones write the rest to the manifest of the same name."""
    save(tmp_path, 1)
    checkpoint = tmp_path / "checkpoints" / "1"
    (checkpoint / "manifest_0-of-1.json").unlink()
    names = checksums.unlisted(checkpoint)
    for part in (names[:2], names[2:]):
        checksums.write_unlisted(checkpoint, part)
    assert not checksums.unlisted(checkpoint)


def test_a_run_with_a_damaged_checkpoint_ends_as_if_nothing_had_been(tmp_path: pathlib.Path, whole: Outcome) -> None:
    run = Run(tmp_path)
    run(stop_after=11)
    assert checkpoint_steps(tmp_path) == [10, 11]
    flip(tmp_path / "checkpoints" / "11")
    assert_same_outcome(outcome(run, *run()), whole)
