"""Preset configs that `--config=NAME` finds: `configs/*.py` of the repository.

A wheel holds copies in this folder (see `setup.py`); a checkout reads the originals.
"""

import pathlib

_CHECKOUT = pathlib.Path(__file__).resolve().parents[3] / "configs"
if (_CHECKOUT / "base.py").is_file():
    __path__.append(str(_CHECKOUT))


def find(name: str) -> pathlib.Path | None:
    """The file of the preset `name`, or None."""
    files = (pathlib.Path(folder) / f"{name}.py" for folder in __path__)
    return next((file for file in files if name.isidentifier() and file.is_file()), None)


def names() -> list[str]:
    """Sorted names of all presets."""
    files = {file.stem for folder in __path__ for file in pathlib.Path(folder).glob("*.py")}
    return sorted(files - {"__init__"})
