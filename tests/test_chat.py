"""Talking in the terminal: the answers are transformers', turn for turn, and every way to leave leaves."""

import io
import json

import pytest

from convert import peers
from data import kinds
from efficientllm import chat, convert
from efficientllm.infer.chat_session import Dialogue, Session, Times
from efficientllm.infer.samplers import Greedy

pytestmark = pytest.mark.xdist_group("chat")

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NEW = 10


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A folder of a random Llama with a tokenizer and a template, and what transformers loads of it."""
    folder = tmp_path_factory.mktemp("chat")
    tokenizer = kinds.save(folder, eos_token="<|im_end|>", add=["<|im_start|>"], template=CHATML)
    peers.torch.manual_seed(0)
    config = peers.transformers.LlamaConfig(
        **peers.ATTENTION | {"max_position_embeddings": 256},
        num_hidden_layers=2,
        vocab_size=len(tokenizer),
        eos_token_id=tokenizer.eos_token_id,
        initializer_range=0.2,
    )
    theirs = peers.transformers.LlamaForCausalLM(config).eval()
    ends = [tokenizer.eos_token_id, tokenizer.encode("the", add_special_tokens=False)[0]]
    theirs.generation_config.eos_token_id = ends
    theirs.save_pretrained(folder)
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == ends
    return folder, theirs, tokenizer


def generated(theirs, tokenizer, messages, new=NEW):
    """The answer that transformers' `generate` gives."""
    how = {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": True}
    inputs = tokenizer.apply_chat_template(messages, **how)
    options = {"do_sample": False, "max_new_tokens": new, "pad_token_id": 0}
    ids = theirs.generate(**inputs, **options)[0, inputs["input_ids"].shape[1] :].tolist()
    ends = theirs.generation_config.eos_token_id
    return tokenizer.decode(ids[:-1] if ids[-1] in ends else ids, skip_special_tokens=True)


def expected(theirs, tokenizer, questions, system=None):
    messages = [{"role": "system", "content": system}] if system else []
    answers = []
    for question in questions:
        messages.append({"role": "user", "content": question})
        answers.append(generated(theirs, tokenizer, messages))
        messages.append({"role": "assistant", "content": answers[-1]})
    return answers


def talk(monkeypatch, capsys, folder, text, *flags):
    """`(exit status, answers, what else was said)` of a chat that is given `text` by a pipe."""
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    status = chat.main([str(folder), "--config=infer:float32", f"--config.infer.max_new_tokens={NEW}", *flags])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_answers_are_those_of_transformers_turn_for_turn(model, monkeypatch, capsys):
    folder, theirs, tokenizer = model
    questions = ["the cat", "a dog?", "caf\u00e9 \U0001f469\u200d\U0001f467"]
    status, answers, printed = talk(
        monkeypatch, capsys, folder, "".join(f"{q}\n" for q in questions), "--system=Be brief"
    )
    assert status == 0 and answers == "".join(
        f"{text}\n" for text in expected(theirs, tokenizer, questions, "Be brief")
    )
    assert "3 answers: TTFT" in printed and "tokens/s; weights" in printed and "as float32, state" in printed
    assert "for 256 tokens" in printed


def test_what_was_said_is_forgotten_and_left(model, monkeypatch, capsys):
    folder, theirs, tokenizer = model
    first, *_ = expected(theirs, tokenizer, ["the cat"])
    status, answers, printed = talk(monkeypatch, capsys, folder, "the cat\n\n/reset\nthe cat\n/exit\nnever\n")
    assert (status, answers) == (0, f"{first}\n{first}\n") and "2 answers" in printed


def test_an_adapter_of_peft_answers_as_in_peft(model, monkeypatch, capsys, tmp_path):
    peft = pytest.importorskip("peft")
    folder, _, tokenizer = model
    base = peers.transformers.AutoModelForCausalLM.from_pretrained(folder)
    config = peft.LoraConfig(r=4, lora_alpha=16, target_modules="all-linear", init_lora_weights=False)
    config.base_model_name_or_path = str(folder)
    peers.torch.manual_seed(1)
    theirs = peft.get_peft_model(base, config).eval()
    theirs.save_pretrained(tmp_path / "adapter")
    questions = ["the cat", "a dog?"]
    status, answers, _ = talk(monkeypatch, capsys, tmp_path / "adapter", "".join(f"{q}\n" for q in questions))
    assert status == 0 and answers == "".join(f"{text}\n" for text in expected(theirs, tokenizer, questions))


@pytest.fixture(scope="module")
def session(model):
    source = convert.open_source(model[0])
    lm = source.lm(scan=False)
    return Session(lm, source.load(peers.abstract(lm), lm=lm), Greedy(), (-1,), 64)


def test_what_was_read_is_not_read_again(session, monkeypatch):
    """And the answer is the same; a conversation that differs from what was read is read anew."""
    read = []
    passes = session._engine._passes
    monkeypatch.setattr(
        session._engine, "_passes", lambda lengths, *rest: read.append(*lengths) or passes(lengths, *rest)
    )
    first = [1, 2, 3, 4, 5]
    *_, answer = session.answer(first, 4)
    longer = [*first, *answer, 7, 8, 9]
    *_, again = session.answer(longer, 4)
    assert read == [5, 3]
    session._carry = None
    *_, anew = session.answer(longer, 4)
    assert anew == again and read[2] == len(longer)
    *_, _ = session.answer([1, 2, 9, 4, 5, 6], 4)
    assert read[3] == 6


@pytest.mark.slow
def test_the_state_grows_with_the_conversation(model, monkeypatch):
    monkeypatch.setattr("efficientllm.infer.chat_session.SHORTEST", 16)
    source = convert.open_source(model[0])
    lm = source.lm(scan=False)
    small = Session(lm, source.load(peers.abstract(lm), lm=lm), Greedy(), (-1,), 100)
    lengths = []
    for count in (4, 20, 90):
        *_, answer = small.answer(list(range(1, count + 1)), 6)
        assert len(answer) == 6
        lengths.append(small.length)
    assert lengths == [16, 32, 100]


def test_an_answer_ends_where_it_is_told_to(session):
    *_, answer = session.answer([1, 2, 3], 30, lambda ids: len(ids) >= 2)
    assert 2 <= len(answer) < 30
    *_, more = session.answer([1, 2, 3, *answer, 4], 3)
    assert len(more) == 3


def test_the_oldest_turns_make_room(model, monkeypatch, capsys):
    folder, theirs, tokenizer = model
    long = "the cat sat on the mat and the dog ran home " * 5
    status, answers, printed = talk(monkeypatch, capsys, folder, f"{long * 9}\n{long}\n{long}\n{long * 9}\n{long}\n")
    first, second = expected(theirs, tokenizer, [long, long])
    roles = [("user", long), ("assistant", second), ("user", long)]
    third = generated(theirs, tokenizer, [{"role": role, "content": content} for role, content in roles])
    assert status == 0 and answers == f"{first}\n{second}\n{third}\n"
    assert printed.count("the oldest 1 question(s) and answer(s) are forgotten") == 1
    assert printed.count("write less, or set fewer") == 2 and "3 answers" in printed


def test_without_a_template_the_text_goes_on(model, monkeypatch, capsys, tmp_path):
    import shutil

    folder, theirs, tokenizer = model
    shutil.copytree(folder, tmp_path / "plain")
    (tmp_path / "plain" / "chat_template.jinja").unlink()
    status, answers, printed = talk(monkeypatch, capsys, tmp_path / "plain", "the cat\n")
    inputs = tokenizer("the cat", return_tensors="pt")
    ids = theirs.generate(**inputs, do_sample=False, max_new_tokens=NEW, pad_token_id=0)[0, len(inputs[0]) :].tolist()
    ids = ids[:-1] if ids[-1] in theirs.generation_config.eos_token_id else ids
    assert status == 0 and answers == tokenizer.decode(ids, skip_special_tokens=True) + "\n"
    assert "no chat template: the model continues the text" in printed


def test_a_turn_ends_where_the_template_ends_it(tmp_path):
    """Although it is no token that ends a text, as after tuning a base model on a template."""
    theirs = kinds.save(tmp_path, eos_token="<eos>", add=["<|im_start|>", "<|im_end|>"], template=CHATML)
    ours = kinds.ours(tmp_path)
    assert ours.end_ids == (theirs.eos_token_id,)
    dialogue = Dialogue(ours)
    assert dialogue.end_ids == (theirs.eos_token_id, theirs.convert_tokens_to_ids("<|im_end|>"))
    ids = dialogue.ask("a")
    messages = [{"role": "user", "content": "a"}]
    assert ids == theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)


def test_records_without_a_template_are_spoken_as_they_are_tuned_on(tmp_path):
    from efficientllm.data import conversation

    kinds.save(tmp_path, eos_token="<eos>")
    ours = kinds.ours(tmp_path)
    dialogue = Dialogue(ours, "S", records=True)
    dialogue.ask("Q1")
    dialogue.answered([*ours.encode("A1"), ours.eos_id], "A1")
    ids = dialogue.ask("Q2")
    turns = [("system", "S"), ("user", "Q1"), ("assistant", "A1"), ("user", "Q2")]
    text = conversation.dump([{"role": role, "content": content} for role, content in turns])
    assert ids == conversation.encode(ours, text)[0]


def test_times_are_those_of_first_tokens_and_of_the_rest():
    seconds = iter([0.0, 2.0, 2.0, 3.0, 10.0, 10.5, 10.5, 12.5])
    times = Times(lambda: next(seconds))
    assert str(times) == "no answers"
    for counts in ([1, 5], [1, 5]):
        for _ in times.watched([0] * count for count in counts):
            pass
    assert str(times) == "2 answers: TTFT 2.000 s, 2.7 tokens/s"


@pytest.mark.parametrize(
    "argv, message",
    [
        (["/nowhere"], "config.model.pretrained = '/nowhere': no such file or folder"),
        (["--system=a"], "MODEL: one is needed, not 0"),
        (["a", "b"], "MODEL: one is needed, not 2"),
        (["a", "--workdir=x"], "--workdir=x: no such flag; flags: --system=TEXT"),
        (["a", "--config=moe"], "config.task = 'pretrain': a chat needs infer"),
        (["a", "--config.infer.smapler=greedy"], "did you mean"),
        (["a", "--config=infer:int3"], "int3"),
    ],
)
def test_bad_input_is_one_line_and_status_2(argv, message, capsys):
    assert chat.main(argv) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1, error


def test_help_and_nothing(capsys):
    assert (chat.main(["--help"]), chat.main([])) == (0, 2)
    assert "efficientllm.chat MODEL" in capsys.readouterr().out


@pytest.mark.slow  # a process of its own, in a terminal
def test_ctrl_c_stops_an_answer_and_twice_leaves(model):
    import os
    import pty
    import select
    import subprocess
    import sys
    import time

    parent, child = pty.openpty()
    argv = [sys.executable, "-m", "efficientllm.chat", str(model[0]), "--config=infer:float32"]
    argv += ["--config.infer.max_new_tokens=200", "--config.infer.sampler=sample(temperature=1.0)"]
    done = subprocess.Popen(argv, stdin=child, stdout=child, stderr=child, start_new_session=True)
    os.close(child)
    seen = ""

    def until(text, seconds=240):
        nonlocal seen
        end = time.monotonic() + seconds
        while text not in seen:
            assert time.monotonic() < end and select.select([parent], [], [], 5) is not None, seen
            if select.select([parent], [], [], 1)[0]:
                seen += os.read(parent, 4096).decode(errors="replace")
        seen = seen.partition(text)[2]

    until("leaves, Ctrl-C stops an answer")
    until("> ")
    os.write(parent, b"the cat\n")
    until("\n")  # the echo
    time.sleep(1)
    done.send_signal(2)
    until("> ")
    done.send_signal(2)
    until("Ctrl-C once more")
    done.send_signal(2)
    until("1 answer: TTFT")
    assert done.wait(60) == 130
    os.close(parent)
