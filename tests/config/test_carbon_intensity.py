"""`config.metrics.carbon` and `config.metrics.price`: what they may be."""

import pytest

from efficientllm import main
from efficientllm.config.carbon_intensity import CarbonIntensity, read_carbon

pytestmark = pytest.mark.quick


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", None),
        ("381 g/kWh, Ember 2025, Germany", CarbonIntensity(381.0, "Ember 2025, Germany")),
        (" 0 g / KWH ,my roof", CarbonIntensity(0.0, "my roof")),
        ("12.5g/kWh, a grid", CarbonIntensity(12.5, "a grid")),
    ],
)
def test_grams_and_their_source(text, expected):
    assert read_carbon(text) == expected


@pytest.mark.parametrize(
    ("flag", "says"),
    [
        ("carbon=381", "is no carbon intensity; write grams and where they are from, such as"),
        ("carbon=-1 g/kWh, me", "is no carbon intensity"),
        ("carbon=0.381 kg/kWh, me", "is no carbon intensity"),
        ("carbon=381 g/kWh", "does not say where the figure is from"),
        ("carbon=381 g/kWh, ", "does not say where the figure is from"),
        ("carbon=381000 g/kWh, me", "is more than 10,000 g/kWh"),
        ("price=-1", "must be at least 0"),
        ("price=nan", "must be at least 0"),
        ("price=free", "must be at least 0"),
    ],
)
def test_bad_values_are_one_line(flag, says, capsys):
    assert main.main(["--config=configs/base.py", f"--config.metrics.{flag}"]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith(f"efficientllm: config.metrics.{flag.partition('=')[0]} = ")
    assert says in lines[0]
