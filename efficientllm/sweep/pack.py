"""Packs the rows of a sweep's folder into a file to commit: `python -m efficientllm.sweep.pack DIR --rows=FILE`.

  DIR          the folder of a sweep, or of runs
  --rows=FILE  NAME.rows.jsonl (or .rows.jsonl.gz); rows that it holds stay, each run once

`python -m efficientllm.sweep --rows=FILE` does the same while it runs.
"""

import sys
from collections.abc import Sequence

from efficientllm.errors import UserError
from efficientllm.record import rows_file
from efficientllm.runtime import console
from efficientllm.untrusted import files


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line `argv` and returns the exit status: 0, or 2 for bad input."""
    console.print_all_letters()
    argv = sys.argv[1:] if argv is None else argv
    if not argv or {"-h", "--help"} & set(argv):
        print(__doc__.strip())
        return 0 if argv else 2
    try:
        parser = console.Parser("efficientllm.sweep.pack")
        parser.add_argument("out")
        parser.add_argument("--rows", required=True)
        options = parser.parse_args(argv)
        rows_file.check_name("--rows", options.rows)
        if not files.is_there(options.out):
            raise UserError(f"{options.out}: no such folder; give the folder of a sweep")
        print(f"{rows_file.pack_rows(options.out, options.rows)} rows in {options.rows}")
    except UserError as error:
        print(f"efficientllm: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
