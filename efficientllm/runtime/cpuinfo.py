"""What Linux says of the first processor."""

import pathlib

FILE = pathlib.Path("/proc/cpuinfo")


def first_processor() -> dict[str, str]:
    """Reads the first value of each key, such as `model name` and `flags`; without the file it is empty."""
    lines = FILE.read_text().splitlines() if FILE.exists() else []
    pairs = (line.partition(":") for line in reversed(lines))
    return {key.strip(): value.strip() for key, _, value in pairs}
