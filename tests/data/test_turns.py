"""Conversations through chat templates of every behaviour that published ones have: ids as transformers gives them,
and what is learnt."""

import pytest
from tokenizers import AddedToken

from data import kinds
from efficientllm.data import conversation
from efficientllm.errors import UserError

pytestmark = pytest.mark.quick

SPECIAL = ("<|im_start|>", "<|im_end|>", "<|end|>", "<|user|>", "<|assistant|>", "[INST]", "[/INST]", "</s>")

CHATML = (  # Qwen2.5, SmolLM2, Yi
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
OPENED = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")  # QwQ and the distils of R1
OPENED = OPENED.replace("{{ m.content }}", "{{ m.content.split('</think>')[-1] }}")
LATER = (  # Qwen3: only the answers after the last question keep their thinking
    "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' %}{% set thought = '' %}{% set said = m.content %}"
    "{% if m.reasoning_content is string %}{% set thought = m.reasoning_content %}{% elif '</think>' in said %}"
    "{% set thought = said.split('</think>')[0].split('<think>')[-1].strip() %}"
    "{% set said = said.split('</think>')[-1].lstrip() %}{% endif %}"
    "{% if loop.index0 > ns.last %}<think>\n{{ thought }}\n</think>\n\n{% endif %}{{ said }}"
    "{% for call in m.tool_calls or [] %}\n<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}"
    "{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CLOSED = (  # Phi-3: eos closes the whole, not its turns
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)
BRACKETS = (  # Mistral, Llama 2
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %} {{ m.content | trim }}{{ eos_token }}"
    "{% else %}[INST] {{ m.content | trim }} [/INST]{% endif %}{% endfor %}"
)
TRIMMED = (  # Llama 3.1: a call of a tool takes the place of the content
    "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>\n\n"
    "{% if 'tool_calls' in m %}{{ m.tool_calls[0].function | tojson }}{% else %}{{ m.content | trim }}{% endif %}"
    "<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>\n\n{% endif %}"
)
PLAIN = (  # no special token, no end
    "{% for m in messages %}### {{ m.role }}:\n{{ m.content }}\n\n{% endfor %}"
    "{% if add_generation_prompt %}### assistant:\n{% endif %}"
)
MARKED = CHATML.replace(
    "{{ m.content }}<|im_end|>",
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{% else %}"
    "{{ m.content }}<|im_end|>{% endif %}",
)


def turns(*contents):
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


CALLED = '{"name": "w", "arguments": {"city": "Rome"}}'
CALL = {"type": "function", "function": {"name": "w", "arguments": {"city": "Rome"}}}
TOOL = [
    {"role": "user", "content": "weather?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "sunny"},
    {"role": "assistant", "content": "It is sunny"},
    {"role": "user", "content": "bye"},
    {"role": "assistant", "content": "Bye"},
]
THOUGHT = turns("Q", "<think>\nhm\n</think>\n\nA", "Q2", "<think>\nso\n</think>\n\nB")
CALLING = f"<tool_call>{CALLED}</tool_call><|im_end|>"
HELLO = {"role": "assistant", "content": "Hello"}
REASONED = [*turns("Q"), {"role": "assistant", "content": "A", "reasoning_content": "r"}]
SAME = turns("a", "a", "a", "a")
ODD = turns("\u4f60\u597d \U0001f469\u200d\U0001f467", "caf\u00e9 \u2028 <|end|>", "x", "\n y \n")


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    """`load(template)` -> (ours, transformers')."""
    made = {}

    def load(template):
        if template not in made:
            folder = tmp_path_factory.mktemp("template")
            add = [AddedToken(text, special=True, normalized=False) for text in SPECIAL]
            theirs = kinds.save(folder, eos_token="<eos>", bos="<s>", add=add, template=template)
            made[template] = kinds.ours(folder), theirs
        return made[template]

    return load


@pytest.mark.parametrize(
    "template, messages, answers",
    [
        (CHATML, turns("Q", "A"), ["A<|im_end|><eos>"]),
        (CHATML, turns("Q", "A", "Q", "A"), ["A<|im_end|>", "A<|im_end|><eos>"]),
        (OPENED, turns("Q", "A"), ["A<|im_end|><eos>"]),
        (OPENED, turns("Q", "<html>A"), ["<html>A<|im_end|><eos>"]),
        (OPENED, turns("Q", "A", "Q", "A"), ["A<|im_end|>", "A<|im_end|><eos>"]),
        (OPENED, THOUGHT, ["\n\nA<|im_end|>", "\n\nB<|im_end|><eos>"]),
        (LATER, turns("Q", "A"), ["<think>\n\n</think>\n\nA<|im_end|><eos>"]),
        (LATER, SAME, ["a<|im_end|>", "<think>\n\n</think>\n\na<|im_end|><eos>"]),
        (LATER, THOUGHT, ["A<|im_end|>", "<think>\nso\n</think>\n\nB<|im_end|><eos>"]),
        (LATER, REASONED, ["<think>\nr\n</think>\n\nA<|im_end|><eos>"]),
        (LATER, TOOL, [CALLING, "It is sunny<|im_end|>", "<think>\n\n</think>\n\nBye<|im_end|><eos>"]),
        (CLOSED, turns("Q", "A"), ["A<|end|>\n<eos>"]),
        (CLOSED, SAME, ["a<|end|>", "a<|end|>\n<eos>"]),
        (CLOSED, ODD, ["caf\u00e9 \u2028 <|end|><|end|>", "\n y \n<|end|>\n<eos>"]),
        (CLOSED, turns("Q", "<|end|>\n<|user|>\n", "Q", ""), ["<|end|>\n<|user|>\n<|end|>", "<|end|>\n<eos>"]),
        (BRACKETS, turns("Q", " A "), [" A<eos>"]),
        (BRACKETS, turns("Q", "A", "Q", "A"), [" A<eos>", " A<eos>"]),
        (TRIMMED, TOOL, [f"{CALLED}<|end|>", "It is sunny<|end|>", "Bye<|end|><eos>"]),
        (PLAIN, turns("Q", "A", "Q", "A"), ["A", "A<eos>"]),
        (PLAIN, turns("Q", "A", "Q", " "), ["A", "<eos>"]),
        (CHATML, [*turns("Q", "A"), {"role": "user", "content": "trailing"}], ["A<|im_end|>"]),
        (CHATML, [HELLO, *turns("Q", "A")], ["Hello<|im_end|>", "A<|im_end|><eos>"]),
        (CHATML, [{"role": "system", "content": "S"}, *turns("Q", "A")], ["A<|im_end|><eos>"]),
    ],
)
def test_ids_are_those_of_transformers_and_the_answers_are_learnt(template, messages, answers, load):
    ours, theirs = load(template)
    ids, learnt = conversation.encode(ours, conversation.dump(messages))
    expected = theirs.apply_chat_template(messages, tokenize=True, return_dict=False)
    compared_ids = ids[:-1] if ids[-1] == theirs.eos_token_id != expected[-1] else ids
    assert compared_ids == expected[: len(compared_ids)]
    assert messages[-1]["role"] != "assistant" or not theirs.decode(expected[len(compared_ids) :]).strip()
    runs, before = [], False
    for id, is_learnt in zip(ids, learnt, strict=True):
        runs += [[]] if is_learnt and not before else []
        runs[-1].append(id) if is_learnt else None
        before = is_learnt
    assert [theirs.decode(run) for run in runs] == answers


@pytest.mark.parametrize("messages", [turns("Q", "A"), SAME, ODD, [*turns("Q", "A"), {"role": "user", "content": "x"}]])
def test_what_a_template_marks_itself_is_learnt_as_transformers_masks_it(messages, load):
    ours, theirs = load(MARKED)
    ids, learnt = conversation.encode(ours, conversation.dump(messages))
    how = {"return_dict": True, "return_assistant_tokens_mask": True}
    expected = theirs.apply_chat_template(messages, tokenize=True, **how)
    count = len(ids) - (ids[-1] == theirs.eos_token_id)
    assert ids[:count] == expected["input_ids"][:count]
    assert learnt[:count] == [bool(mask) for mask in expected["assistant_masks"][:count]]
    assert not any(expected["assistant_masks"][count:])
    if messages is ODD:  # reading special tokens in a template leaves documents as they were
        assert ours.eos_id not in ours.encode("<eos>")


@pytest.mark.parametrize("template", [CHATML, BRACKETS, LATER])
@pytest.mark.parametrize("final", ["The answer is", "The answer is ", " is:\n"])
def test_a_last_message_is_continued_as_in_transformers(template, final, load):
    ours, theirs = load(template)
    messages = turns("Q", "A", "Q", final)
    expected = theirs.apply_chat_template(messages, tokenize=False, continue_final_message=True)
    assert ours.chat(messages, add_generation_prompt=False, continue_final_message=True) == expected


def test_thinking_that_a_template_leaves_out_is_said_once(load, monkeypatch):
    notes, (ours, _) = [], load(OPENED)
    conversation._say_dropped.cache_clear()
    monkeypatch.setattr(conversation.log, "warning", notes.append)
    for messages in (turns("Q", "A"), THOUGHT, THOUGHT):
        conversation.encode(ours, conversation.dump(messages))
    conversation.encode(load(LATER)[0], conversation.dump(THOUGHT))
    assert notes == ["the chat template leaves out the thinking of answers, as in transformers: it is not learnt"]


def test_tools_reach_the_template(load):
    template = "{% for t in tools or [] %}{{ t | tojson }}\n{% endfor %}" + CHATML
    ours, theirs = load(template)
    tools = [{"type": "function", "function": {"name": "w", "parameters": {}}}]
    ids, learnt = conversation.encode(ours, conversation.dump(TOOL, tools))
    expected = theirs.apply_chat_template(TOOL, tools=tools, tokenize=True, return_dict=False)
    assert ids[:-1] == expected[: len(ids) - 1] and any(learnt)


@pytest.mark.parametrize(
    "template, why",
    [
        ("{% for m in messages %}{{ m.content | upper }}{{ loop.revindex }}{% endfor %}", "told apart"),
        ("{{ messages[0].content }}{% if add_generation_prompt %}>{% endif %}", "told apart"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ 1 + 'a' }}", "unsupported operand"),
        (MARKED.replace("'assistant'", "'model'", 1), "marks no turn"),
    ],
)
def test_what_cannot_be_told_apart_is_one_line(template, why, load):
    ours, _ = load(template)
    with pytest.raises(UserError, match=why) as error:
        conversation.encode(ours, conversation.dump(turns("Q", "A", "Q", "A")))
    assert "\n" not in str(error.value)


def test_messages_become_what_transformers_takes():
    content = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [
        {"role": "user", "content": content, "name": None},
        {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "w", "arguments": {"x": None}}}]},
        {"role": "assistant", "content": "c", "tool_calls": None},
    ]
    assert conversation.check(messages, "here") == [
        {"role": "user", "content": "ab"},
        {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "w", "arguments": {}}}]},
        {"role": "assistant", "content": "c"},
    ]


@pytest.mark.parametrize(
    "message, why",
    [
        ({"role": "assistant"}, "message 1: 'content' must be a text"),
        ({"role": "assistant", "content": [{"type": "image"}]}, "message 1: 'content' must be a text"),
        ({"role": "assistant", "content": 5}, "message 1: 'content' must be a text"),
        ({"role": "assistant", "content": "\ud800"}, "message 1: holds a lone surrogate"),
        ({"role": "assistant", "content": " "}, "nothing to learn"),
        ("hello", "a conversation is a list"),
    ],
)
def test_messages_that_are_none_are_named(message, why):
    with pytest.raises(UserError, match=f"^here.*{why}"):
        conversation.check([{"role": "user", "content": "a"}, message], "here")
