"""Checkpoints of others.

  python -m efficientllm.convert SOURCE --out=FOLDER [--dtype=bfloat16] [--merge=ADAPTER]
  python -m efficientllm.convert SOURCE --out=FOLDER --quant=FORM [--data=TEXT]
  python -m efficientllm.convert check SOURCE

  SOURCE    a folder of safetensors, a GGUF file, 'owner/name' of the Hugging Face hub, smollm2-135m, the folder of a
            run that trained or tuned, or of an adapter
  --out     a new folder that transformers loads: config.json, safetensors, the tokenizer's files
  --merge   a folder of an adapter that peft or a tuning run wrote: what it adds is added to the kernels
  --dtype   float32, float16 or bfloat16 (default: what SOURCE holds; float32 for a GGUF file)
  --quant   writes rounded weights: bfloat16, float16, int8(...), int4(...), nf4(...), as config.quant; the folder is
            ours, for config.model.pretrained with config.quant = stored
  --data    the text that int4(method='gptq') and 'awq' are calibrated on (default: python_docs())

check reads SOURCE with both, and prints the greatest difference of logits and the mean KL divergence; it needs torch.
Exit status: 0 ok, 1 check found more than rounding, 2 bad input.
"""

import json
import pathlib
import sys

from efficientllm.errors import UserError
from efficientllm.runtime import console
from efficientllm.runtime.stopping import stoppable

TOLERANCE = 1e-3  # of the greatest logit: float32 rounding over some dozens of layers


@stoppable
def main(argv=None):
    """Runs the command line `argv` and returns the exit status."""
    console.print_all_letters()
    argv = sys.argv[1:] if argv is None else argv
    if not argv or {"-h", "--help"} & set(argv):
        print(__doc__.strip())
        return 0 if argv else 2
    try:
        return _check(argv[1:]) if argv[0] == "check" else _convert(argv)
    except UserError as error:
        print(f"efficientllm: {error}", file=sys.stderr)
        return 2


def _check(argv):
    parser = console.Parser("efficientllm.convert")
    parser.add_argument("source")
    given = parser.parse_args(argv)
    from efficientllm.convert import check, open_source

    found = check.compare_logits(open_source(given.source))
    for name, value in found.items():
        print(f"{name.replace('_', ' '):24}{value:.6g}")
    return 0 if found["max_logit_difference"] <= TOLERANCE * found["max_logit"] else 1


def _convert(argv):
    parser = console.Parser("efficientllm.convert")
    parser.add_argument("source")
    parser.add_argument("--out", required=True)
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"))
    parser.add_argument("--merge")
    parser.add_argument("--quant")
    parser.add_argument("--data")
    given = parser.parse_args(argv)
    _check_flags(given)
    from efficientllm.convert import convert, open_source

    source = open_source(given.source)
    if given.quant:
        return _round(source, given)
    if given.merge:
        from efficientllm.convert import merge_into, run_folder

        merge_into(source, run_folder.newest_run(pathlib.Path(given.merge)), given.out, given.dtype)
    else:
        convert(source, given.out, given.dtype)
    family = json.loads((pathlib.Path(given.out) / "config.json").read_text())["model_type"]
    print(f"{given.source} -> {given.out}: {family}, {given.dtype or source.stored_dtype}")
    return 0


def _check_flags(given):
    """Refuses what no source could be converted with, before anything is opened."""
    from efficientllm.config import value_rules

    for flag in ("source", "out", "merge"):
        if (path := getattr(given, flag)) is not None:
            value_rules.check_path("SOURCE" if flag == "source" else f"--{flag}", path)
        if path == "":
            raise UserError(f"{'SOURCE' if flag == 'source' else f'--{flag}'} is empty")
    if given.quant is not None:
        value_rules.check_spec("quant", given.quant, "--quant")
    if given.data is not None:
        value_rules.check_spec("data", given.data, "--data")
    if given.data and not given.quant:
        raise UserError("--data is the text that --quant is calibrated on; give --quant, or leave it")
    if given.quant and (given.merge or given.dtype):
        raise UserError("--quant goes with neither --merge nor --dtype: write the merged folder first, then round that")


def _round(source, given):
    from efficientllm.convert import write_quantized

    size = write_quantized.convert_quantized(source, given.quant, given.out, given.data or "python_docs()")
    print(f"{given.source} -> {given.out}: {given.quant}, weights of {size / 1e6:,.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
