"""generation_config.json and tokenizer_config.json of published models, key by key, against what transformers makes of
them.

`published.jsonl` holds facts of files: `source` is the repository that they are of, `read_in` says what was read, and
where; the rest is recalled. `added_tokens` are the tokens of tokenizer.json that a text or a template spells, by their
ids, special ones of no further attributes where only the content is given. Nothing is downloaded: a vocabulary of ours
fills the ids between them.
"""

import json
import pathlib

import pytest

from data import kinds
from efficientllm.data import hf_tokenizer
from efficientllm.errors import UserError

pytestmark = pytest.mark.quick

LINES = pathlib.Path(__file__).with_name("published.jsonl").read_text().splitlines()
PUBLISHED = [json.loads(line) for line in LINES]
NAMES = [entry["names"][0] for entry in PUBLISHED]
ATTRIBUTES = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
TOKENIZER, GENERATION = "tokenizer_config.json", "generation_config.json"


def added(entry):
    """Added tokens as files list them, by id."""
    tokens = {int(id): token for id, token in entry["added_tokens"].items()}
    return {id: ATTRIBUTES | (token if isinstance(token, dict) else {"content": token}) for id, token in tokens.items()}


@pytest.fixture(scope="module")
def backends():
    return {kind: json.loads(kinds.backend(kind).to_str()) for kind in ("byte_level", "sentencepiece")}


def tokenizer_json(entry, state):
    """`state`, a tokenizer's, with the tokens of an entry at their ids and its own at the others."""
    tokens = added(entry)
    taken = {token["content"] for token in tokens.values()}
    free = (id for id in range(10**6) if id not in tokens)
    old = [token for token in state["model"]["vocab"] if token not in taken | {"<unk>", "<s>", "</s>"}]
    vocab = dict(zip(old, free, strict=False)) | {token["content"]: id for id, token in tokens.items()}
    model = state["model"] | {"vocab": vocab}
    listed = [{"id": id} | token for id, token in sorted(tokens.items())]
    return state | {"model": model, "added_tokens": listed, "post_processor": opens(entry, vocab)}


def opens(entry, vocab):
    """What puts BOS before a text, where the published tokenizer.json has it."""
    if not entry["opens_with_bos"]:
        return None
    bos = content(entry["tokenizer_config"]["bos_token"])
    mark, text = {"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    special = {bos: {"id": bos, "ids": [vocab[bos]], "tokens": [bos]}}
    return {"type": "TemplateProcessing", "single": [mark, text], "pair": [mark, text], "special_tokens": special}


def content(token):
    return token["content"] if isinstance(token, dict) else token


def write(folder, entry, tokenizer, generation):
    files = {"config.json": entry["config"], TOKENIZER: tokenizer, GENERATION: generation}
    for name, values in files.items():
        (folder / name).write_text(json.dumps(values))


def settings(entry):
    """Its tokenizer_config.json whole, with the added tokens."""
    return entry["tokenizer_config"] | {"added_tokens_decoder": {str(id): token for id, token in added(entry).items()}}


def texts(entry):
    spelt = [token["content"] for token in added(entry).values()]
    joined = " ".join(f"{token} the cat{token}\n" for token in spelt)
    return [
        "the cat sat on the mat . It 's here !",
        "  a\n\n",
        "Ünï → 猫",
        joined,
        *(f"a{token}b" for token in spelt[:2]),
    ]


def compare(folder, entry):
    """Ours and transformers' of one folder. None where both refuse it."""
    import transformers

    try:
        theirs = transformers.AutoTokenizer.from_pretrained(folder)
    except Exception:
        with pytest.raises(UserError):
            kinds.ours(folder)
        return
    if theirs.eos_token_id is None:
        with pytest.raises(UserError, match="no eos token"):
            kinds.ours(folder)
        return
    ours = kinds.ours(folder)
    for text in texts(entry):
        ids = theirs(text)["input_ids"]
        assert ours.encode_prompt(text) == ids
        assert ours.encode_template(text) == theirs(text, add_special_tokens=False)["input_ids"]
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    first = theirs("a", add_special_tokens=False)["input_ids"][0]
    whole = theirs("a")["input_ids"]
    assert list(ours.lead_ids) == whole[: whole.index(first)]
    assert (ours.eos_id, ours.bos_id) == (theirs.eos_token_id, theirs.bos_token_id)
    assert ours.end_ids == hf_tokenizer.end_ids(folder)


def ends(folder):
    """Where transformers' `generate` ends, of a folder's files; where generation_config.json names no end it would not
    end at all, and ours ends at config.json's."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder)
    if (folder / GENERATION).exists():
        ids = transformers.GenerationConfig.from_pretrained(folder).eos_token_id
    else:
        ids = transformers.GenerationConfig.from_model_config(config).eos_token_id
    ids = config.eos_token_id if ids is None else ids
    return tuple(ids if isinstance(ids, list) else [ids])


@pytest.fixture
def folder(tmp_path, backends):
    def make(entry):
        state = tokenizer_json(entry, backends[entry["kind"]])
        (tmp_path / "tokenizer.json").write_text(json.dumps(state))
        return tmp_path

    return make


@pytest.mark.parametrize("entry", PUBLISHED, ids=NAMES)
def test_it_is_read_as_transformers_reads_it(entry, folder):
    place = folder(entry)
    write(place, entry, settings(entry), entry["generation_config"])
    compare(place, entry)
    ours = kinds.ours(place)
    assert ours.end_ids == ends(place)
    special_tokens = {name: content(entry["tokenizer_config"].get(f"{name}_token")) for name in ("bos", "eos")}
    ids = {token["content"]: id for id, token in added(entry).items()}
    assert (ours.bos_id, ours.eos_id) == (ids.get(special_tokens["bos"]), ids[special_tokens["eos"]])
    assert ours.lead_ids == ((ours.bos_id,) if entry["opens_with_bos"] else ())
    assert {ours.text_of(id) for id in ids.values()} == set(ids)


@pytest.mark.parametrize("entry", PUBLISHED, ids=NAMES)
def test_generation_ends_likewise_without_a_key_or_the_file(entry, tmp_path):
    generation = entry["generation_config"]
    for key in generation:
        write(tmp_path, entry, settings(entry), {name: value for name, value in generation.items() if name != key})
        assert hf_tokenizer.end_ids(tmp_path) == ends(tmp_path), key
    (tmp_path / GENERATION).unlink()
    assert hf_tokenizer.end_ids(tmp_path) == ends(tmp_path)


def shape(entry):
    """What tells one tokenizer_config.json from another, but for names and ids."""
    tokenizer = {key: type(value).__name__ for key, value in entry["tokenizer_config"].items()}
    truths = {key: value for key, value in entry["tokenizer_config"].items() if isinstance(value, bool)}
    class_name, model_type = entry["tokenizer_config"]["tokenizer_class"], entry["config"]["model_type"]
    return json.dumps([entry["kind"], class_name, model_type, entry["opens_with_bos"], tokenizer, truths])


SHAPES = {shape(entry): entry for entry in PUBLISHED}.values()


@pytest.mark.parametrize("entry", SHAPES, ids=lambda entry: entry["names"][0])
def test_an_omitted_key_and_the_other_of_a_truth_are_read_as_transformers_reads_them(entry, folder):
    place = folder(entry)
    tokenizer, generation = settings(entry), entry["generation_config"]
    for key, value in tokenizer.items():
        write(place, entry, {name: value for name, value in tokenizer.items() if name != key}, generation)
        compare(place, entry)
        if isinstance(value, bool):
            write(place, entry, tokenizer | {key: not value}, generation)
            compare(place, entry)
    (place / TOKENIZER).unlink()
    compare(place, entry)


CHANGES = {
    "class": {"tokenizer_class": "PreTrainedTokenizerFast"},
    "another class": {"tokenizer_class": "Qwen2TokenizerFast"},
    "unknown class": {"tokenizer_class": "OwnTokenizer"},
    "no bos": {"bos_token": None, "add_bos_token": True},
    "no eos": {"eos_token": None},
    "new eos": {"eos_token": "<new>"},
    "new pad": {"pad_token": "[PAD]"},
    "new tokens": {"extra_special_tokens": ["<new>"], "additional_special_tokens": ["<newer>"]},
    "named tokens": {"extra_special_tokens": {"image_token": "<image>"}},
    "bos and eos": {"add_bos_token": True, "add_eos_token": True},
    "short": {"model_max_length": 3, "truncation_side": "left", "padding_side": "left"},
    "forced": {
        "clean_up_tokenization_spaces": True,
        "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output": True,
    },
    "spared": {"clean_up_tokenization_spaces": True},
    "code": {"auto_map": {"AutoTokenizer": ["own.Tokenizer", None]}},
}
CLASSES = {(entry["kind"], entry["tokenizer_config"]["tokenizer_class"]): entry for entry in PUBLISHED}.values()
PADDED = {"strategy": {"Fixed": 8}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0}
CUT = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}


@pytest.mark.parametrize("entry", CLASSES, ids=lambda entry: entry["names"][0])
def test_what_others_change_in_a_published_folder_is_read_likewise(entry, folder):
    place = folder(entry)
    tokenizer, generation = settings(entry), entry["generation_config"]
    for change in CHANGES.values():
        write(place, entry, tokenizer | change, generation)
        compare(place, entry)
    write(place, entry, tokenizer, generation)
    state = json.loads((place / "tokenizer.json").read_text())
    (place / "tokenizer.json").write_text(
        json.dumps(state | {"truncation": CUT, "padding": PADDED | {"pad_token": "x"}})
    )
    compare(place, entry)
    (place / "special_tokens_map.json").write_text(json.dumps({"eos_token": "<new>", "pad_token": "[PAD]"}))
    (place / "added_tokens.json").write_text(json.dumps({"<newest>": 300_000}))
    compare(place, entry)
