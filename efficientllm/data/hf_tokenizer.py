"""Hugging Face tokenizers loaded by transformers, with their chat templates and end tokens."""

import dataclasses
import functools
import importlib.util
import json
import os
import pathlib
import re
import typing
import warnings

from efficientllm.data import cache
from efficientllm.data.tokenizers import FastTokenizer
from efficientllm.errors import FieldError, UserError
from efficientllm.registry import register
from efficientllm.typing import PathLike
from efficientllm.untrusted import files, gguf_header, json_text, template

GENERATION, CONFIG = "generation_config.json", "config.json"
_ADDED = re.compile(r'"added_tokens"\s*:\s*(?=\[)')
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_MOST = 1 << 30  # bytes of a tokenizer.json, which has been loaded already
_WHERE = "the tokenizer's chat template"
_GGUF_ENDS = ("eos_token_id", "eot_token_id", "eom_token_id")


@register("tokenizer", "hf")
@dataclasses.dataclass(frozen=True)
class HuggingFace:
    """The tokenizer that `transformers` loads from `path`: a folder, the name of a repository on the hub, or a GGUF
    file."""

    path: str

    def fit(self, corpus: typing.Any) -> FastTokenizer:
        """Loads the tokenizer. Raises UserError if there is none, or if it lacks eos or a fast implementation."""
        try:
            return self._load()
        except UserError as error:
            raise FieldError("tokenizer", str(error)) from error

    def _load(self):
        where, folder = f"hf(path={self.path!r})", self._folder()
        loaded = load_with_transformers(folder, where)
        if not loaded.is_fast or loaded.eos_token_id is None:
            missing = "eos token" if loaded.is_fast else "fast implementation"
            raise UserError(f"{where}: has no {missing}; name another tokenizer")
        _check_ids(loaded, folder, where)
        return from_transformers(loaded, end_ids(folder))

    def _folder(self):
        """What `from_pretrained` takes. A GGUF file's vocabulary is converted once: it takes seconds."""
        if not self.path.endswith(".gguf"):
            return os.path.expanduser(self.path)
        import transformers

        files.open_file(self.path, f"hf(path={self.path!r})").close()
        key = cache.digest(cache.stat_key([os.path.realpath(self.path)]), transformers.__version__, _GGUF_ENDS)
        return cache.entry(cache.root(), f"gguf-tokenizer-{key}", self._convert)

    def _convert(self, folder):
        ends = _gguf_ends(self.path)  # reads the whole header first: the package that transformers takes checks nothing
        where, name = os.path.split(self.path)
        loaded = load_with_transformers(where or ".", f"hf(path={self.path!r})", gguf_file=name)
        loaded.save_pretrained(folder)
        (folder / GENERATION).write_text(json.dumps({"eos_token_id": ends}))


def _check_files(folder, where):
    """Raises UserError for what a reader would wait for: a FIFO or a device where a file of a tokenizer is expected."""
    if os.path.isdir(folder):
        for name in sorted(os.listdir(folder)):
            if name.endswith((".json", ".txt", ".model", ".jinja")):
                files.open_file(os.path.join(folder, name), where).close()


def load_with_transformers(folder: PathLike, where: str, **how: typing.Any) -> typing.Any:
    """Loads the tokenizer of a folder or a repository as transformers does. Raises UserError beginning with `where`."""
    import transformers

    if not how:
        _check_files(folder, where)
    if not how and _needs_sentencepiece(pathlib.Path(folder)):
        raise UserError(f"{where}: holds a tokenizer.model, which sentencepiece reads; pip install sentencepiece")
    try:
        with warnings.catch_warnings():  # torch, where it is installed, imports pynvml by its package's old name
            warnings.filterwarnings("ignore", "The pynvml package is deprecated", FutureWarning)
            return transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False, **how)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # whatever its readers of ten formats, in two languages, raise; Rust's panics too
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"{where}: cannot be loaded ({reason}); name a folder or a repository") from error


def _needs_sentencepiece(folder):
    alone = (folder / "tokenizer.model").is_file() and not (folder / "tokenizer.json").is_file()
    return alone and importlib.util.find_spec("sentencepiece") is None


def _check_ids(loaded, folder, where):
    """Raises UserError for an added token that has lost its id: where no vocabulary holds it, the library `tokenizers`
    numbers it anew, without a hole, and the model would be given another token's embedding."""
    vocabulary = loaded.get_vocab()
    for id, token in _added(folder):
        if vocabulary.get(token, id) != id:
            raise UserError(
                f"{where}: {token!r:.80} has the id {id} in its files and {vocabulary[token]} as transformers reads "
                "them; list it in the vocabulary too"
            )


def _added(folder):
    """`(id, token)` of added tokens by tokenizer.json, or without one by tokenizer_config.json: both were loaded."""
    if file := _file(folder, "tokenizer.json"):
        text = files.read_text(file, _MOST, where=f"{folder}/tokenizer.json")
        place = _ADDED.search(text)
        tokens = json.JSONDecoder().raw_decode(text, place.end())[0] if place else []
        return [(token["id"], token["content"]) for token in tokens]
    tokens = _json(folder, "tokenizer_config.json").get("added_tokens_decoder") or {}
    return [(int(id), token["content"] if isinstance(token, dict) else token) for id, token in tokens.items()]


def end_ids(folder: PathLike) -> tuple[int, ...]:
    """Reads the ids at which transformers ends generation, from generation_config.json, else config.json.

    Returns an empty tuple where neither names any. Raises UserError for values that are no ids.
    """
    for name in (GENERATION, CONFIG):
        if ids := _ids(_json(folder, name).get("eos_token_id"), f"{folder}/{name}"):
            return ids
    return ()


def _ids(value, where):
    values = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(id, int) and not isinstance(id, bool) for id in values):
        raise UserError(f"{where}: eos_token_id = {value!r:.80}: must be a token's id or a list of them")
    return tuple(dict.fromkeys(id for id in values if id >= 0))


def _file(folder, name):
    """Where a file of `folder` is, a folder or the name of a repository that has been loaded; None for none."""
    import transformers

    try:
        return transformers.utils.cached_file(
            folder, name, local_files_only=True, _raise_exceptions_for_missing_entries=False
        )
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}/{name}: cannot be read ({str(error).splitlines()[0]})") from None


def _json(folder, name):
    """Reads the JSON object of a file; {} if there is no file."""
    file = _file(folder, name)
    return json_text.read(file, where=f"{folder}/{name}") if file else {}


def _gguf_ends(file):
    """Reads the end-of-text, end-of-turn and end-of-message ids from the metadata of a GGUF file."""
    values = gguf_header.read_header(file).values
    ids = (values.get(f"tokenizer.ggml.{name}") for name in _GGUF_ENDS)
    return list(dict.fromkeys(value for value in ids if isinstance(value, int)))


def from_transformers(loaded: typing.Any, end_ids: typing.Iterable[int] = ()) -> FastTokenizer:
    """Wraps a tokenizer that `transformers` has loaded, with its chat template; `end_ids` as in `FastTokenizer`."""
    text = loaded.chat_template or ""
    if not isinstance(text, str):  # several by name
        text = json.dumps(text)
    chat = functools.partial(_chat, loaded) if text else None
    return FastTokenizer(
        loaded.backend_tokenizer,
        loaded.eos_token_id,
        chat=chat,
        template=text,
        bos_id=loaded.bos_token_id,
        end_ids=end_ids,
        marked=functools.partial(_marked, loaded) if _GENERATION.search(text) else None,
        save=loaded.save_pretrained,
        splits=loaded.split_special_tokens,
        clean=loaded.clean_up_tokenization if _cleans(loaded) else str,
    )


def _cleans(loaded):
    """Whether a decoded text loses its spaces before punctuation: as transformers, which spares BPE unless forced."""
    forced = getattr(loaded, "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output", False)
    spared = type(loaded.backend_tokenizer.model).__name__ == "BPE" and not forced
    return bool(loaded.clean_up_tokenization_spaces) and not spared


def _chat(loaded, messages, **how):
    """The text of a conversation. Raises UserError where the template takes no such one: it may refuse roles."""
    chosen = _template(loaded, how.get("tools"))
    if not how.pop("continue_final_message", False):
        return template.render(chosen, messages, _WHERE, **loaded.special_tokens_map | how)
    final, mark = messages[-1]["content"], "CONTINUED "
    messages = [*messages[:-1], messages[-1] | {"content": final + mark}]
    text = template.render(chosen, messages, _WHERE, **loaded.special_tokens_map | how)
    before, marker, after = text.rpartition(mark.strip())
    if not marker:
        raise UserError(f"{_WHERE}: leaves out the last message, which is to be continued; take another template")
    return before if after.startswith(" ") else before.rstrip()  # as transformers: a template may trim


def _marked(loaded, messages, tools=None):
    """The text of a conversation and the `(start, end)` of what its template marks by `{% generation %}`; None where
    the template that is chosen for `tools` has no such mark."""
    chosen = _template(loaded, tools)
    if not _GENERATION.search(chosen):
        return None
    return template.render_marked(chosen, messages, _WHERE, tools=tools, **loaded.special_tokens_map)


def _template(loaded, tools):
    """The template's text, of several the one that transformers takes. Raises UserError."""
    try:
        return loaded.get_chat_template(tools=tools)
    except ValueError as error:
        raise UserError(f"{_WHERE}: {error}") from None
