"""Chat templates: the text is transformers', and what fails, asks for too much or never ends is one line."""

import os
import time

import pytest

from efficientllm.errors import UserError
from efficientllm.untrusted import template

pytestmark = pytest.mark.quick

USER = {"role": "user", "content": "What is 2 < 3 & \u00e9?"}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": [2.5, None, "x<y"]}}}
MESSAGES = [
    {"role": "system", "content": "  Be brief. "},
    USER,
    {"role": "assistant", "content": "", "reasoning_content": "2 is less", "tool_calls": [CALL]},
    {"role": "tool", "content": "3.5", "name": None},
    {"role": "assistant", "content": "Yes.\n"},
    USER,
]
TOOLS = [
    {"type": "function", "function": {"name": "add", "description": "sum \u2192", "parameters": {"b": 1, "a": True}}}
]
GOOD = {
    "chatml": """{% for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content | trim + '<|im_end|>\\n' }}
{% endfor %}
{% if add_generation_prompt %}
{{ '<|im_start|>assistant\\n' }}
{%- endif %}""",
    "llama": """{{- bos_token }}{%- if not date_string is defined %}{%- set date_string = strftime_now('%d %b %Y') %}
{%- endif %}{%- if messages[0]['role'] == 'system' %}{%- set system = messages[0]['content']|trim %}
{%- set messages = messages[1:] %}{%- else %}{%- set system = '' %}{%- endif %}Today: {{ date_string }} {{ system }}
{%- for message in messages %}{%- if message.role == 'tool' %}{%- continue %}{%- endif %}
<|{{ message['role'] }}|>{{ message['content'] }}{{ eos_token if loop.last else loop.index }}{%- endfor %}""",
    "qwen": """{%- if tools %}{%- for tool in tools %}{{ tool | tojson }}
{{ tool | tojson(indent=2) }}{%- endfor %}{%- endif %}
{%- set ns = namespace(last=0, multi=true) %}
{%- for message in messages[::-1] %}{%- if ns.multi and message.role == 'user' %}{%- set ns.multi = false %}
{%- set ns.last = (messages|length - 1) - loop.index0 %}{%- endif %}{%- endfor %}{{ ns.last }}
{%- for message in messages %}{%- if message.reasoning_content is defined and message.reasoning_content %}
<think>{{ message.thinking }}{{ message.reasoning_content.strip('\\n') }}</think>{%- endif %}
{%- for call in message.tool_calls or [] %}{{ call.function.arguments | tojson }}
{{ call.function.arguments.items() | list }}
{%- endfor %}{{ message.name is defined }}{%- endfor %}
{%- if enable_thinking is defined %}{{ enable_thinking }}{%- endif %}""",
    "generation": """{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}</s>
{% endgeneration %}{% else %}{{ m.content | upper }}{% endif %}{% endfor %}{{ dict(a=1) }}{{ range(3) | list }}""",
    "macros": """{% macro show(m, depth=0) %}{{ '%s|%05d' % (m.role, depth) }}{{ caller() if caller }}{% endmacro %}
{% for m in messages %}{% call show(m, loop.index) %}[{{ m.content.split() | join(',') }}]{% endcall %}{% endfor %}
{{ messages | map(attribute='role') | unique | sort | join(' ') }}{{ documents }}{{ '{:>8}'.format('x') }}""",
}
REFUSED = {
    "division": ("{{ 1 / 0 }}", "fails: ZeroDivisionError: division by zero, line 1"),
    "type": ("\n{{ 1 + 'a' }}", "fails: TypeError: .*, line 2"),
    "undefined": ("{{ x.y.z }}", "fails: UndefinedError: 'x' is undefined, line 1"),
    "syntax": ("{% if %}", "fails: TemplateSyntaxError: .*, line 1"),
    "range": ("{{ range(1000000000) | list }}", "fails: OverflowError: Range too big"),
    "recursion": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "fails: RecursionError"),
    "deep": ("{{ " + "(" * 10_000, "fails: RecursionError"),
    "include": ("{% include 'x' %}", "fails: TypeError: no loader"),
    "extends": ("{% extends 'x' %}", "fails: TypeError: no loader"),
    "import": ("{% import 'os' as os %}", "fails: TypeError: no loader"),
    "times": ("{{ 'a' * 10**10 }}", "fails: MemoryError"),
    "format": ("{{ '%999999999999d' % 1 }}", "fails: MemoryError"),
    "center": ("{{ 'a' | center(10**12) }}", "fails: MemoryError"),
    "indent": ("{{ messages | tojson(indent=10**11) }}", "fails: MemoryError"),
    "output": ("{{ 'a' * 5 * 10**7 }}", "a text of 50,000,000 characters; at most 33,554,432"),
    "doubling": (
        "{% set ns = namespace(a='x') %}{% for i in range(60) %}{% set ns.a = ns.a ~ ns.a %}{% endfor %}",
        "Memory",
    ),
    "lists": (
        "{% set ns = namespace(a=[1]) %}{% for i in range(60) %}{% set ns.a = ns.a + ns.a %}{% endfor %}",
        "Memory",
    ),
    "class": ("{{ ''.__class__.__mro__ }}", "fails: SecurityError"),
    "globals": ("{{ cycler.__init__.__globals__.os.system('touch pwned') }}", "fails: SecurityError"),
    "attr": ("{{ (''|attr('__class__')).x }}", "fails: SecurityError"),
    "own": ("{% set ns = namespace(__class__=1) %}", "fails: SecurityError"),
    "mutable": ("{{ messages.append(1) }}", "fails: SecurityError"),
    "said": (
        "{{ raise_exception('only\nusers') }}",
        r"refuses a conversation of user that begins 'What is 2.* \(only users\)",
    ),
}
ENDLESS = [
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{{ 9**(9**9) }}",
    "{{ lipsum(n=10**9) }}",
]


@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("name", GOOD)
def test_the_text_is_that_of_transformers(name, add):
    from transformers.utils.chat_template_utils import render_jinja_template

    values = {"bos_token": "<s>", "eos_token": "</s>", "enable_thinking": False}
    plain = [{key: value for key, value in message.items() if value is not None} for message in MESSAGES]
    (expected,), _ = render_jinja_template([plain], TOOLS, None, GOOD[name], add_generation_prompt=add, **values)
    text = template.render(GOOD[name], MESSAGES, tools=TOOLS, add_generation_prompt=add, **values)
    assert text == expected and len(text) > 80


@pytest.mark.parametrize("name", REFUSED)
def test_a_template_that_fails_is_one_line(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text, message = REFUSED[name]
    with pytest.raises(UserError, match=f"^the chat template .*{message}") as error:
        template.render(text, [USER])
    assert "\n" not in str(error.value) and not os.listdir(tmp_path)
    assert isinstance(error.value, template.Refusal) == (name == "said")
    assert template.render("{{ messages[0].role }}", [USER]) == "user"  # and the next is rendered


@pytest.mark.parametrize("text", ENDLESS)
def test_one_that_does_not_end_is_ended(text, monkeypatch, tmp_path):
    script = tmp_path / "quick.py"
    script.write_text(template._WORKER.read_text().replace("SECONDS = 3.0", "SECONDS = 0.3"))
    monkeypatch.setattr(template, "_WORKER", script)
    template.close()
    started = time.monotonic()
    with pytest.raises(UserError, match="takes more than 3 s, or its memory"):
        template.render(text, [USER])
    assert time.monotonic() - started < 30
    assert template.render("{{ messages[0].role }}", [USER]) == "user"
    template.close()


@pytest.mark.parametrize("value", [None, 3, ["x"], {"default": "x"}])
def test_what_is_no_text_is_refused(value):
    with pytest.raises(UserError, match="the text of a template is needed"):
        template.render(value, [USER])


def test_what_is_no_plain_value_is_named_only():
    assert template.render("{{ image }}{{ text }}", [], image=object(), text="\ud800") == "<object>\ud800"
