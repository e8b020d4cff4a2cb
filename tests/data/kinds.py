"""Tiny tokenizers of the kinds that published models have, saved by transformers, which is the oracle."""

import json

TEXT = ["the cat sat on the mat. The dog barked at the cat, and the cat ran home again"] * 4


def backend(kind):
    """A `tokenizers.Tokenizer`: byte-level as GPT-2's and Llama 3's, or SentencePiece's with byte fallback."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    if kind == "byte_level":
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        options = {"initial_alphabet": sorted(pre_tokenizers.ByteLevel.alphabet())}
        specials = []
    else:
        tokenizer = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
        strip = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        tokenizer.decoder = decoders.Sequence(strip)
        options, specials = {}, ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=specials, show_progress=False, **options)
    tokenizer.train_from_iterator(TEXT, trainer)
    if kind != "byte_level":  # its bytes are no special tokens
        state = json.loads(tokenizer.to_str())
        state["added_tokens"] = [token for token in state["added_tokens"] if not token["content"].startswith("<0x")]
        tokenizer = Tokenizer.from_str(json.dumps(state))
    return tokenizer


def save(folder, kind="byte_level", add=(), bos=None, adds_bos=False, template=None, **tokens):
    """A folder with a tokenizer; `tokens` are transformers' names of special ones. Returns what transformers loads."""
    import transformers
    from tokenizers.processors import TemplateProcessing

    made = backend(kind)
    made.add_special_tokens([token for token in (bos, *tokens.values()) if token])
    made.add_tokens(list(add))
    if adds_bos:
        made.post_processor = TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, made.token_to_id(bos))]
        )
    saved = transformers.PreTrainedTokenizerFast(tokenizer_object=made, bos_token=bos, **tokens)
    saved.chat_template = template
    saved.save_pretrained(folder)
    return transformers.AutoTokenizer.from_pretrained(folder)


def ours(folder):
    """The tokenizer that a run loads from the folder."""
    from efficientllm import data

    return data.build_tokenizer(f"hf(path={str(folder)!r})", "python_docs()")
