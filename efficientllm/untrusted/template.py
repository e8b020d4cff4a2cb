"""Sandboxed chat templates: renders them as transformers does, in a process with limits of time and memory.

One worker process serves all templates of a run. It starts with the first, and again after a template has ended it.
"""

import atexit
import contextlib
import json
import os
import pathlib
import subprocess
import sys
import threading
import typing

from efficientllm.errors import UserError
from efficientllm.untrusted.template_worker import SECONDS

_WORKER = pathlib.Path(__file__).with_name("template_worker.py")
Message = dict[str, typing.Any]
_REASONING = ("reasoning_content", "thinking", "reasoning")
_lock = threading.Lock()
_worker: tuple[int, subprocess.Popen] | None = None  # process id of the parent, and the process


class Refusal(UserError):
    """Refusal of a conversation by the template itself: of its roles, or their order."""


def render(template: str, messages: list[Message], where: str = "the chat template", **values: typing.Any) -> str:
    """Renders a conversation to text. Arguments and errors are those of `render_marked`."""
    return render_marked(template, messages, where, **values)[0]


def render_marked(
    template: str,
    messages: list[Message],
    where: str = "the chat template",
    tools: list | None = None,
    documents: list | None = None,
    add_generation_prompt: bool = False,
    **values: typing.Any,
) -> tuple[str, list[tuple[int, int]]]:
    """Renders a conversation as `apply_chat_template` does.

    Returns the text, and the `(start, end)` of each part that `{% generation %}` marks as the assistant's. `values` are
    further variables of the template: special tokens by name, `enable_thinking`. Raises Refusal, or UserError for a
    template that fails or exceeds its time or memory. Both begin with `where`.
    """
    if not isinstance(template, str):
        raise UserError(f"{where}: is a {type(template).__name__}; the text of a template is needed")
    context = {"messages": [_complete(message) for message in messages], "tools": tools, "documents": documents}
    context |= {"add_generation_prompt": add_generation_prompt} | values
    request = json.dumps({"template": template, "values": context}, default=lambda value: f"<{type(value).__name__}>")
    with _lock:
        answer = _request(request.encode())
    if answer is None:
        raise UserError(f"{where} takes more than {SECONDS:g} s, or its memory, for a text")
    if "text" in answer:
        return answer["text"], [tuple(span) for span in answer["marked"]]
    if answer["refused"]:
        roles = ", ".join(str(message.get("role")) for message in messages)
        begin = repr(messages[0].get("content"))[:60] if messages else "with nothing"
        raise Refusal(f"{where} refuses a conversation of {roles} that begins {begin} ({answer['error']})")
    raise UserError(f"{where} fails: {answer['error']}")


def _complete(message):
    """A message as transformers passes it to a template: without nulls, its reasoning under all names in use."""
    message = {key: value for key, value in message.items() if value is not None}
    reasoning = next((message[key] for key in _REASONING if key in message), None)
    return message if reasoning is None else {"thinking": reasoning, **message, "reasoning_content": reasoning}


def _request(data):
    """Sends a request to the worker and returns its answer; None if the worker died of it."""
    process = _process()
    try:
        process.stdin.write(len(data).to_bytes(8, "little") + data)
        process.stdin.flush()
        head = process.stdout.read(8)
        return json.loads(process.stdout.read(int.from_bytes(head, "little")))
    except (OSError, ValueError):
        close()
        return None
    except BaseException:  # Ctrl-C between a request and its answer
        close()
        raise


def _process():
    """The worker of this process, started if needed. A fork starts its own."""
    global _worker
    if _worker is None or _worker[0] != os.getpid():
        command = [sys.executable, "-P", "-W", "ignore", str(_WORKER)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        _worker = os.getpid(), subprocess.Popen(command, **pipes)
    return _worker[1]


@atexit.register
def close() -> None:
    """Ends the worker, if there is one. The next template starts another."""
    global _worker
    worker, _worker = _worker, None
    if worker is None or worker[0] != os.getpid():
        return
    process = worker[1]
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        with contextlib.suppress(OSError):
            pipe.close()
