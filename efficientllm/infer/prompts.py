"""Prompts from the config: texts, or a file of them; through the chat template of a model that has one."""

import json
import pathlib

from efficientllm.errors import UserError


def read(prompts):
    """The texts that `config.infer.prompts` names: a tuple of texts, or of one file: each line of a .txt, `prompt` of
    each record of a .jsonl. Raises UserError."""
    if len(prompts) != 1 or not prompts[0].endswith((".txt", ".jsonl")):
        return list(prompts)
    file = pathlib.Path(prompts[0])
    where = f"config.infer.prompts = {prompts[0]!r}"
    try:
        lines = [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{where} cannot be read: {error}") from None
    if file.suffix != ".jsonl":
        return lines
    try:
        return [json.loads(line)["prompt"] for line in lines]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{where}: every line must be a JSON object with 'prompt' ({error!r})") from None


def encode(texts, tokenizer, chat):
    """Lists of ids; with `chat`, of the conversation's template up to the assistant's turn."""
    if not chat:
        return [list(map(int, tokenizer.encode(text))) for text in texts]
    if tokenizer.chat is None:
        raise UserError("config.infer.chat = True: the tokenizer has no chat template")
    return [
        tokenizer.encode_template(tokenizer.chat([{"role": "user", "content": text}], add_generation_prompt=True))
        for text in texts
    ]


def check_lengths(prompts, new_tokens, most):
    """Raises UserError naming the prompt that does not fit into the model's `most` positions (None: no limit)."""
    for index, prompt in enumerate(prompts):
        if most and len(prompt) + new_tokens > most:
            raise UserError(
                f"config.infer.prompts: prompt {index} has {len(prompt)} tokens, with config.infer.max_new_tokens = "
                f"{new_tokens} {len(prompt) + new_tokens}; the model has {most} positions"
            )
