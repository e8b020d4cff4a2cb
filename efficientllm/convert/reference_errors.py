"""Errors of transformers while it loads a model to compare with."""

import contextlib
import typing

from efficientllm.convert.files import quantized, stored_form
from efficientllm.convert.source import Source
from efficientllm.errors import UserError


@contextlib.contextmanager
def loading(source: Source) -> typing.Iterator[None]:
    """Raises UserError with the remedy where transformers cannot load quantized files: it needs a package or a GPU."""
    try:
        yield
    except (ImportError, RuntimeError, ValueError) as error:
        if not source.config.get(quantized.KEY):
            raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"{source.path}: {quantized.KEY}.quant_method = {stored_form.stored_form(source)!r}: transformers cannot "
            f"load it here ({reason}); write it dequantized, python -m efficientllm.convert {source.path} "
            "--out=FOLDER, and check that folder"
        ) from None
