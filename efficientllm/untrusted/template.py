"""Chat templates of others, rendered as transformers renders them, in a process with limits of time and memory.

One process serves all templates of a run; it is started when the first is rendered, and again where one has ended it.
"""

import atexit
import contextlib
import json
import os
import pathlib
import subprocess
import sys
import threading

from efficientllm.errors import UserError
from efficientllm.untrusted.template_worker import SECONDS

_WORKER = pathlib.Path(__file__).with_name("template_worker.py")
_REASONING = ("reasoning_content", "thinking", "reasoning")
_lock = threading.Lock()
_worker = None


class Refusal(UserError):
    """The template itself refuses the conversation: its roles, or their order."""


def render(template, messages, where="the chat template", **values):
    """The text of a conversation, as `render_marked`, whose arguments and errors it has."""
    return render_marked(template, messages, where, **values)[0]


def render_marked(
    template, messages, where="the chat template", tools=None, documents=None, add_generation_prompt=False, **values
):
    """The text that a template makes of a conversation, a list of dicts, as `apply_chat_template` gives it, and the
    `(start, end)` of what it marks by `{% generation %}` as the assistant's.

    `values` are what else the template sees: the special tokens by name, `enable_thinking`. Raises Refusal, or
    UserError for a template that fails, or takes more than its time or memory; both begin with `where`.
    """
    if not isinstance(template, str):
        raise UserError(f"{where}: a {type(template).__name__}, where a template's text is needed")
    context = {"messages": [_completed(message) for message in messages], "tools": tools, "documents": documents}
    context |= {"add_generation_prompt": add_generation_prompt} | values
    request = json.dumps({"template": template, "values": context}, default=lambda value: f"<{type(value).__name__}>")
    with _lock:
        answer = _ask(request.encode())
    if answer is None:
        raise UserError(f"{where} takes more than {SECONDS:g} s, or its memory, for a text")
    if "text" in answer:
        return answer["text"], [tuple(span) for span in answer["marked"]]
    if answer["refused"]:
        roles = ", ".join(str(message.get("role")) for message in messages)
        begin = repr(messages[0].get("content"))[:60] if messages else "with nothing"
        raise Refusal(f"{where} refuses a conversation of {roles} that begins {begin} ({answer['error']})")
    raise UserError(f"{where} fails: {answer['error']}")


def _completed(message):
    """A message as transformers gives it to a template: without nulls, its reasoning under the names in use."""
    message = {key: value for key, value in message.items() if value is not None}
    reasoning = next((message[key] for key in _REASONING if key in message), None)
    return message if reasoning is None else {"thinking": reasoning, **message, "reasoning_content": reasoning}


def _ask(data):
    """The answer to a request; None where the process ended over it."""
    process = _process()
    try:
        process.stdin.write(len(data).to_bytes(8, "little") + data)
        process.stdin.flush()
        head = process.stdout.read(8)
        return json.loads(process.stdout.read(int.from_bytes(head, "little")))
    except (OSError, ValueError):
        close()
        return None
    except BaseException:  # Ctrl-C between a question and its answer
        close()
        raise


def _process():
    """The worker of this process; a fork has none yet."""
    global _worker
    if _worker is None or _worker[0] != os.getpid():
        command = [sys.executable, "-P", "-W", "ignore", str(_WORKER)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        _worker = os.getpid(), subprocess.Popen(command, **pipes)
    return _worker[1]


@atexit.register
def close():
    """Ends the process, if there is one; the next template starts another."""
    global _worker
    held, _worker = _worker, None
    if held is None or held[0] != os.getpid():
        return
    process = held[1]
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        with contextlib.suppress(OSError):
            pipe.close()
