"""Worker process that renders untrusted Jinja templates with limits of time and memory; started by `template`.

The environment is transformers' (its `chat_template_utils`): immutable sandbox, loop controls, `generation` blocks,
`tojson`, `raise_exception`, `strftime_now`. It must be a process: one instruction can make a string of 10^10 characters
or a power of 10^8 digits, and nothing inside Python interrupts that.

A message is eight bytes of length and JSON: `{"template", "values"}`, answered by `{"text", "marked"}` or
`{"error", "refused"}`.
"""

import datetime
import functools
import json
import os
import resource
import signal
import typing

import jinja2
import jinja2.ext
import jinja2.sandbox
import jinja2.utils

SECONDS = 3.0  # CPU time per text
MEMORY = 2**29  # bytes of address space
LONGEST = 2**25  # characters of a text
_NAME = "<template>"  # as Jinja calls what it compiles from a string


class Generation(jinja2.ext.Extension):
    """The block `{% generation %}`, which transformers renders unchanged and counts as the assistant's.

    `blocks` are the rendered pieces of the text so far, `marked` the `(start, end)` of the assistant's.
    """

    tags = {"generation"}
    blocks: list[str] = []
    marked: list[tuple[int, int]] = []

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller):
        text, start = caller(), sum(map(len, self.blocks))
        self.marked.append((start, start + len(text)))
        return text


class Namespace(jinja2.utils.Namespace):
    """`namespace()` that refuses names with a leading underscore."""

    def __init__(*args: typing.Any, **kwargs: typing.Any):
        self, args = args[0], args[1:]
        values = dict(*args, **kwargs)
        for name in values:
            _check_name(name)
        jinja2.utils.Namespace.__init__(self, values)

    def __setitem__(self, name, value):
        _check_name(name)
        jinja2.utils.Namespace.__setitem__(self, name, value)


def _check_name(name):
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace has no name {name!r}")


class Dict:
    """`dict()` without access to the attributes of the type."""

    def __call__(self, *args, **kwargs):
        return dict(*args, **kwargs)

    def fromkeys(self, *args: typing.Any, **kwargs: typing.Any) -> dict:
        return dict.fromkeys(*args, **kwargs)


def _raise_exception(message):
    raise jinja2.exceptions.TemplateError(message)


def _to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@functools.lru_cache(maxsize=16)
def _compiled(template):
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {
        "raise_exception": _raise_exception,
        "strftime_now": lambda form: datetime.datetime.now().strftime(form),
        "dict": Dict(),
        "namespace": Namespace,
    }
    return environment.from_string(template)


def answer(template: str, values: dict[str, typing.Any]) -> dict[str, typing.Any]:
    """Renders a template to `{"text", "marked"}`, or `{"error", "refused"}`.

    `refused` is True if the template itself called `raise_exception`.
    """
    Generation.blocks, Generation.marked = [], []
    try:
        for block in _compiled(template).generate(values):
            Generation.blocks.append(block)
        text = "".join(Generation.blocks)
    except BaseException as error:  # whatever the template's code raises is an error of the template
        message = " ".join(str(error).split())[:300]
        refused = type(error) is jinja2.exceptions.TemplateError
        kind = "" if refused else f"{type(error).__name__}: "
        where = "" if refused else _line(error)
        return {"error": f"{kind}{message}{where}", "refused": refused}
    if len(text) > LONGEST:
        return {"error": f"a text of {len(text):,} characters; at most {LONGEST:,} are taken", "refused": False}
    return {"text": text, "marked": Generation.marked}


def _line(error):
    line, trace = getattr(error, "lineno", None), error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == _NAME:
            line = trace.tb_lineno
        trace = trace.tb_next
    return "" if line is None else f", line {line}"


def _limit():
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C stops the run, which then closes the pipe
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # its default action ends the process
    for name, most in (("RLIMIT_AS", MEMORY), ("RLIMIT_FSIZE", 0), ("RLIMIT_CORE", 0)):
        resource.setrlimit(getattr(resource, name), (most, most))


def main() -> None:
    """Answers requests until the other end of the pipe is closed."""
    # Whatever a template prints must not come between the answers.
    source, target = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    _limit()
    while len(head := source.read(8)) == 8:
        request = json.loads(source.read(int.from_bytes(head, "little")))
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        data = json.dumps(answer(request["template"], request["values"])).encode()
        signal.setitimer(signal.ITIMER_PROF, 0)
        target.write(len(data).to_bytes(8, "little") + data)
        target.flush()


if __name__ == "__main__":
    main()
