"""Tests lie where their modules lie."""

import pytest

import runs

pytestmark = pytest.mark.quick
OF_THE_WHOLE = {"contract", "fuzz", "golden"}  # of more than one module


def test_every_folder_of_tests_is_a_folder_of_the_package():
    tests = runs.ROOT / "tests"
    folders = {str(file.parent.relative_to(tests)) for file in tests.rglob("test_*.py")} - {"."} - OF_THE_WHOLE
    assert [folder for folder in sorted(folders) if not (runs.ROOT / "efficientllm" / folder).is_dir()] == []
    assert [folder for folder in sorted(folders) if not (tests / folder / "__init__.py").exists()] == []
