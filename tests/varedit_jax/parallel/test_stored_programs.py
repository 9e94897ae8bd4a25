"""Programs on disk: they are loaded as they were; whatever is wrong with a file is no obstacle."""

import pathlib

import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np
import pytest

from varedit_jax.parallel import stored_programs


@pytest.fixture
def lowered() -> jax.stages.Lowered:
    return jax.jit(lambda x: 2 * x + 1).lower(jax.ShapeDtypeStruct((3,), np.float32))


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> pathlib.Path:
    monkeypatch.setenv("VAREDIT_CACHE", str(tmp_path))
    return tmp_path / "programs"


def test_what_is_kept_is_loaded(lowered: jax.stages.Lowered, cache: pathlib.Path) -> None:
    assert stored_programs.load("a") is None
    stored_programs.compile_and_save("a", lowered)
    loaded = stored_programs.load("a")
    assert loaded is not None
    assert np.asarray(loaded(jnp.arange(3.0))).tolist() == [1, 3, 5]
    assert loaded.out_info.shape == (3,)
    assert stored_programs.load("b") is None


@pytest.mark.parametrize("damage", [lambda data: b"", lambda data: data[:100], lambda data: b"\x80" + data[::-1]])
def test_a_damaged_file_is_removed(damage, lowered: jax.stages.Lowered, cache: pathlib.Path) -> None:
    stored_programs.compile_and_save("a", lowered)
    (cache / "a").write_bytes(damage((cache / "a").read_bytes()))
    assert stored_programs.load("a") is None
    assert not (cache / "a").exists()


def test_keys_tell_what_a_program_depends_on(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = [stored_programs.key_of("scale", 1), stored_programs.key_of("scale", 2)]
    with jax.default_matmul_precision("highest"):
        keys.append(stored_programs.key_of("scale", 1))
    monkeypatch.setenv("XLA_FLAGS", "--xla_dump_to=somewhere")
    keys.append(stored_programs.key_of("scale", 1))
    monkeypatch.undo()
    monkeypatch.setattr(stored_programs, "_source", lambda: "another version")
    keys.append(stored_programs.key_of("scale", 1))
    monkeypatch.undo()
    monkeypatch.setattr(stored_programs, "_cpu", lambda: 0)
    keys.append(stored_programs.key_of("scale", 1))
    monkeypatch.undo()
    assert len(set(keys)) == len(keys)
    assert stored_programs.key_of("scale", 1) == keys[0]


def test_nothing_is_kept_where_that_is_not_wanted(
    lowered: jax.stages.Lowered, cache: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VAREDIT_CACHE", "")
    stored_programs.compile_and_save("a", lowered)
    assert stored_programs.load("a") is None
    assert not cache.exists()


def test_no_room(lowered: jax.stages.Lowered, cache: pathlib.Path) -> None:
    """A directory that cannot be written is no mistake: the program is compiled again."""
    cache.write_text("a file")
    stored_programs.compile_and_save("a", lowered)
    assert stored_programs.load("a") is None


def test_those_used_longest_ago_go(
    lowered: jax.stages.Lowered, cache: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored_programs.compile_and_save("a", lowered)
    size = (cache / "a").stat().st_size
    monkeypatch.setattr(stored_programs, "_MOST_BYTES", int(2.5 * size))
    for key in "bcd":
        stored_programs.compile_and_save(key, lowered)
    assert sorted(path.name for path in cache.iterdir()) == ["c", "d"]


def test_what_came_from_the_cache_of_jax_is_not_written_down(
    lowered: jax.stages.Lowered, cache: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Cached:
        """Compiles as JAX does it that finds the program in its cache."""

        def compile(self) -> jax.stages.Compiled:
            jax.monitoring.record_event("/jax/compilation_cache/cache_hits")
            return lowered.compile()

    stored_programs.compile_and_save("a", Cached())
    assert stored_programs.load("a") is None
    stored_programs.compile_and_save("a", lowered)
    assert stored_programs.load("a") is not None
