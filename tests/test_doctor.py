"""The doctor says what is there, and a remedy for what is not."""

import json

from efficientllm import doctor


def test_every_finding_that_is_wanting_says_why(capsys):
    assert doctor.main(["--json"]) == 0
    found = {each["name"]: each for each in json.loads(capsys.readouterr().out)}
    assert {"device", "accelerator", "energy", "  rapl", "memory", "peaks", "attention kernels", "C++ compiler"} <= set(
        found
    )
    assert found["device"]["found"].startswith("8 x cpu") and not found["accelerator"]["ok"]
    assert not found["energy"]["ok"] and "meter" in found["energy"]["fix"]
    assert "mfu is null" in found["peaks"]["found"] and "GFLOP/s" in found["  measured"]["found"]
    for extra in (each for name, each in found.items() if name.startswith("extra")):
        assert extra["ok"] or extra["fix"].startswith("pip install")


def test_it_fits_a_screen(capsys):
    assert doctor.main([]) == 0
    assert len(capsys.readouterr().out.splitlines()) < 40


def test_an_unknown_flag_is_one_line(capsys):
    assert doctor.main(["--jsn"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
