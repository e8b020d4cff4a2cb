"""Converts and checks checkpoints.

  python -m efficientllm.convert SOURCE --out=FOLDER [--dtype=bfloat16] [--merge=ADAPTER]
  python -m efficientllm.convert SOURCE --out=FOLDER --quant=FORM [--data=TEXT]
  python -m efficientllm.convert check SOURCE

  SOURCE    a folder of safetensors, a GGUF file, 'owner/name' of the Hugging Face hub, smollm2-135m, the folder of a
            run that trained or tuned, or of an adapter; DiT or Wan of diffusers; DiT with the published names; a text
            encoder's of transformers (CLIP, T5 v1.1, UMT5); a vision-language model's (Qwen2.5-VL, Qwen2-VL, LLaVA,
            InternVL)
  --out     a new folder that transformers or diffusers loads: config.json, safetensors, the tokenizer's files
  --merge   a folder of an adapter that peft or a tuning run wrote: it is merged into the kernels
  --dtype   float32, float16 or bfloat16 (default: what SOURCE holds; float32 for a GGUF file)
  --quant   writes quantized weights: bfloat16, float16, int8(...), int4(...), nf4(...), as config.quant; the folder is
            ours, for config.model.pretrained with config.quant = stored
  --data    the text that int4(method='gptq') and 'awq' are calibrated on (default: python_docs())

check runs SOURCE here and in transformers, and prints the largest logit difference and the mean KL, of a
vision-language model on pictures that it draws (InternVL in OpenGVLab's layout: in the class of transformers, which is
given its tensors); DiT or Wan here and in diffusers, and prints the largest difference of
predictions; a text encoder in transformers, and prints that of its hidden vectors. It needs torch.
Exit status: 0 ok, 1 check found more than rounding errors, 2 bad input.
"""

import pathlib
import sys
from collections.abc import Sequence

from efficientllm.errors import UserError
from efficientllm.runtime import console
from efficientllm.runtime.stopping import stoppable


@stoppable
def main(argv: Sequence[str] | None = None) -> int:
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
    options = parser.parse_args(argv)
    from efficientllm.convert import check, open_source

    differences, are_equal = check.compare_outputs(open_source(options.source))
    for name, value in differences.items():
        print(f"{name.replace('_', ' '):24}{value:.6g}")
    return 0 if are_equal else 1


def _convert(argv):
    parser = console.Parser("efficientllm.convert")
    parser.add_argument("source")
    parser.add_argument("--out", required=True)
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"))
    parser.add_argument("--merge")
    parser.add_argument("--quant")
    parser.add_argument("--data")
    options = parser.parse_args(argv)
    _check_flags(options)
    from efficientllm.convert import convert, open_source, write
    from efficientllm.convert.hf_config import families

    source = open_source(options.source)
    if options.quant:
        return _round(source, options)
    if options.merge:
        from efficientllm.convert import merge_into, run_folder

        merge_into(source, run_folder.newest_run(pathlib.Path(options.merge)), options.out, options.dtype)
    else:
        convert(source, options.out, options.dtype)
    family = families.family_name(write.written_config(options.out))
    print(f"{options.source} -> {options.out}: {family}, {options.dtype or source.stored_dtype}")
    return 0


def _check_flags(options):
    """Raises UserError for invalid flags, before anything is opened."""
    from efficientllm.config import path_rules, value_rules

    for flag in ("source", "out", "merge"):
        if (path := getattr(options, flag)) is not None:
            path_rules.check_path("SOURCE" if flag == "source" else f"--{flag}", path)
        if path == "":
            raise UserError(f"{'SOURCE' if flag == 'source' else f'--{flag}'} is empty")
    if options.quant is not None:
        value_rules.check_spec("quant", options.quant, "--quant")
    if options.data is not None:
        value_rules.check_spec("data", options.data, "--data")
    if options.data and not options.quant:
        raise UserError("--data is the text that --quant is calibrated on; give --quant, or leave it")
    if options.quant and (options.merge or options.dtype):
        raise UserError("--quant goes with neither --merge nor --dtype: write the merged folder first, then round that")


def _round(source, options):
    from efficientllm.convert import write_quantized

    size = write_quantized.convert_quantized(source, options.quant, options.out, options.data or "python_docs()")
    print(f"{options.source} -> {options.out}: {options.quant}, weights of {size / 1e6:,.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
