"""The compile cache: a program of an earlier run is loaded, and its time is then no measurement."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficientllm.metrics import compiles
from efficientllm.runtime import compile_cache, user_cache


@pytest.fixture(autouse=True)
def of_no_user(tmp_path, monkeypatch):
    """A cache folder of the test's own, where JAX has none from the environment; programs of any size are kept."""
    monkeypatch.setenv(user_cache.VARIABLE, str(tmp_path / "cache"))
    monkeypatch.delenv(user_cache.PROGRAMS, raising=False)
    monkeypatch.setitem(compile_cache._OPTIONS, "jax_persistent_cache_min_compile_time_secs", 0)
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    jax.config.update("jax_compilation_cache_dir", before)


def _compile_and_run():
    """Compiles a program as a new process would, and runs it."""
    jax.clear_caches()
    return np.asarray(jax.jit(lambda x: jnp.sin(x @ x.T).sum(0))(jnp.arange(12.0).reshape(4, 3)))


def _files():
    folder = compile_cache.folder()
    return sorted(folder.glob("*-cache")) if folder.is_dir() else []


def test_a_later_run_loads_the_program():
    with compile_cache.of_run(True):
        first = _compile_and_run()
        assert compile_cache.loads() == 0
        assert compiles.time_reading(3.0, "a clock").value == 3.0
    assert _files()
    with compile_cache.of_run(True):
        assert compile_cache.loads() == 0
        second = _compile_and_run()
        assert compile_cache.loads() > 0
        reading = compiles.time_reading(0.1, "a clock")
    assert reading.value is None
    assert "config.compile_cache = False" in reading.reason
    np.testing.assert_array_equal(first, second)


def test_by_names_a_program_of_other_names_is_not_loaded():
    def compile_with(name):
        def sine(x):
            with jax.named_scope(name):
                return jnp.sin(x @ x.T).sum(0)

        jax.clear_caches()
        return jax.jit(sine).lower(jnp.ones((4, 3))).compile().as_text()

    with compile_cache.of_run(True):
        compile_with("before")
        assert "before" in compile_with("after")  # as the names are no part of the key
    with compile_cache.of_run(True, by_names=True):
        loads = []
        for _ in range(2):  # from one line of code, which is among the names
            assert "after" in compile_with("after")
            loads.append(compile_cache.loads())
    assert loads[0] == 0 < loads[1]
    assert not jax.config.jax_compilation_cache_include_metadata_in_key


def test_the_folder_is_closed_to_others():
    with compile_cache.of_run(True):
        pass
    assert compile_cache.folder().stat().st_mode & 0o777 == 0o700


def test_off_compiles_anew_and_writes_nothing():
    with compile_cache.of_run(True):
        _compile_and_run()
    before = _files()
    for file in before:
        file.unlink()
    with compile_cache.of_run(False):
        _compile_and_run()
        assert compile_cache.loads() == 0
    assert not _files()


def test_runs_of_a_sweep_compile(monkeypatch):
    monkeypatch.setenv(user_cache.PROGRAMS, "off")
    with compile_cache.of_run(True):
        _compile_and_run()
    assert not _files()


def test_options_are_as_before_after_a_run():
    names = ["jax_enable_compilation_cache", "jax_compilation_cache_dir", *compile_cache._OPTIONS]
    before = [getattr(jax.config, name) for name in names]
    for is_on in (True, False):
        with compile_cache.of_run(is_on):
            pass
        assert [getattr(jax.config, name) for name in names] == before


def test_a_cache_given_to_jax_is_used(tmp_path):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "given"))
    with compile_cache.of_run(True):
        assert jax.config.jax_compilation_cache_dir == str(tmp_path / "given")
    assert not compile_cache.folder().exists()


def test_a_folder_that_cannot_be_made_costs_the_cache_alone(tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(user_cache.VARIABLE, str(tmp_path / "file"))
    with caplog.at_level("WARNING"), compile_cache.of_run(True):
        _compile_and_run()
    assert "no compile cache" in caplog.text
