"""Corpus of a data spec: documents split into train and held-out, tokenized once and cached."""

import array
import dataclasses
import functools
import hashlib
import json
import typing

import numpy as np

from efficientllm.data import cache, conversation
from efficientllm.data.base import Source
from efficientllm.data.streams import pieces
from efficientllm.errors import FieldError
from efficientllm.registry import build
from efficientllm.typing import PathLike

SIDES = ("train", "held_out")
_ALL = 1 << 64
_unkeyed: dict[tuple[str, str], dict] = {}  # summaries, for the length of a process, of sources without a key
LEARNT = np.uint32(1 << 31)
CUT = 20  # pieces of a corpus that is one document, so that one can be held out
FORMAT = 2  # of a summary
LEAST_CUT = 64  # characters of such a piece


@dataclasses.dataclass(frozen=True)
class Documents:
    """Tokens of one side, memory-mapped: document i is `ids[ends[i - 1]:ends[i]]`, which opens with BOS where the
    tokenizer adds it, and closes with eos.

    Of records (`records`), the highest bit of an id says that it is to be learnt.
    """

    ids: np.ndarray
    ends: np.ndarray
    records: bool = False

    def __len__(self):
        return len(self.ends)

    def __getitem__(self, index):
        """One document as {"tokens": its ids, "targets": the id that follows each}, int32; the last target is eos.

        Of a record also {"weights": 1.0 for targets that are to be learnt}.
        """
        start = self.ends[index - 1] if index else 0
        ids = self.ids[start : self.ends[index]]
        if not self.records:
            return shifted(ids)
        return {**shifted(ids & ~LEARNT), "weights": (ids[1:] >= LEARNT).astype(np.float32)}

    @property
    def size(self) -> int:
        """Tokens with a target, which is all of them but eos."""
        return len(self.ids) - len(self.ends)

    def longer_than(self, length: int) -> int:
        """Counts the documents of more than `length` tokens with a target."""
        return int(np.sum(np.diff(self.ends, prepend=0) - 1 > length))

    def teaches(self, length: int) -> bool:
        """Returns whether any document has a target to learn among its first `length`."""
        return not self.records or any(self[index]["weights"][:length].any() for index in range(len(self)))


class Corpus:
    """Corpus of a data spec and its entries in one cache. Building it reads nothing."""

    def __init__(self, spec: str, cache_dir: PathLike | None = None):
        self.spec = spec
        self.source = build("data", spec, where="config.data")
        self.cache = cache.root(cache_dir)
        if self._attribute("modality") not in ("text", "text and images"):
            raise FieldError(
                "data",
                "holds images, and text is needed; write python_docs(), or text(), jsonl(), csv() or parquet() with a "
                "path",
                spec,
            )
        if not hasattr(self.source, "documents"):
            raise FieldError("data", "has no documents(); derive it from efficientllm.data.Source", spec)
        if self.is_stream and not hasattr(self.source, "rows"):
            raise FieldError("data", "only hf(...) can be streamed; leave out streaming", spec)
        if not 0 <= self._attribute("held_out") < 1:
            raise FieldError("data", "held_out must be at least 0 and below 1", spec)

    @functools.cached_property
    def summary(self) -> dict[str, typing.Any]:
        """Counts of both sides, the sha256 of all documents and of what divides them, the hash below which one is held
        out, into how many pieces a corpus of one document is cut (else 1), and notes for the log."""
        key = self._attribute("key")()
        if key is None:
            place = (self.spec, str(self.cache))
            return _unkeyed.get(place) or _unkeyed.setdefault(place, self._summarise())
        name = f"corpus-{cache.digest(FORMAT, key)}"
        folder = cache.entry(
            self.cache, name, lambda new: (new / "summary.json").write_text(json.dumps(self._summarise()))
        )
        return json.loads((folder / "summary.json").read_text())

    def texts(self, side: str) -> typing.Iterator[str]:
        """Yields the documents of one side in their fixed order."""
        for text, group in self._documents(self.summary["cut"]):
            if self.side(group) == side:
                yield text

    def side(self, group: str) -> str:
        """Returns the split, train or held_out, of the documents of `group`."""
        return SIDES[_hash(group) < self.summary["threshold"]]

    def documents(self, tokenizer: typing.Any) -> dict[str, Documents]:
        """Returns `{side: Documents}`, tokenized at the first call and cached."""
        form = "record" if self.has_records else "text"
        name = f"tokens-{cache.digest(self.summary['fingerprint'], tokenizer.fingerprint, form)}"
        folder = cache.entry(self.cache, name, lambda new: self._tokenise(tokenizer, new))
        return {side: _load(folder, side, self.has_records) for side in SIDES}

    @property
    def has_records(self) -> bool:
        """Whether a document is a conversation (`data.conversation`), of which the answers are learnt."""
        return self._attribute("records")

    @property
    def is_stream(self) -> bool:
        """Whether training reads on without end (`data.streaming`)."""
        return self._attribute("streaming")

    def _attribute(self, name):
        """An attribute of the source, else its default: a source need not be derived from Source."""
        value = getattr(self.source, name, None)
        return getattr(Source(), name) if value is None else value

    def _documents(self, cut):
        """Yields (text, group) of every document, or of the `cut` pieces of the only one. Raises UserError."""
        for index, document in enumerate(self.source.documents()):
            text, group = document if isinstance(document, tuple) and len(document) == 2 else (document, document)
            if not isinstance(text, str) or not isinstance(group, str):
                raise FieldError(
                    "data",
                    f"document {index} is {document!r:.60}; documents() yields texts, or pairs of a text and its group",
                    self.spec,
                )
            if cut == 1:
                yield text, group
            else:
                size = -(-len(text) // cut)
                yield from ((piece, piece) for piece in pieces(text, size) if not piece.isspace())

    def _summarise(self):
        """The summary of the documents as they are; of a corpus of one long text, cut."""
        first = self._summary_of(1)
        cut = min(CUT, first["train_bytes"] // LEAST_CUT) if first["train_documents"] == 1 else 1
        if first["distinct"] < 2 and cut > 1 and not self.has_records:
            summary = self._summary_of(cut)
            if summary["distinct"] > 1:
                what = f"one document of {first['train_bytes']:,} bytes, cut into {summary['distinct']} pieces so that"
                summary["notes"].append(f"{what} {summary['held_out_documents']} can be held out")
                return summary
        if first["distinct"] < 2:
            documents = first["train_documents"]
            notes = f" ({'; '.join(first['notes'])})" if first["notes"] else ""
            count = f"none{notes}" if documents == 0 else "one" if documents == 1 else f"one, {documents} times"
            raise FieldError(
                "data",
                "training and held-out text need two different documents, there is "
                f"{count}{'' if self.has_records else ', of too little text to be cut into two' * (documents == 1)}",
                self.spec,
            )
        return first

    def _summary_of(self, cut):
        hashes, sizes, content = array.array("Q"), array.array("q"), hashlib.sha256()
        for text, group in self._documents(cut):
            try:
                data, hashed = text.encode(), _hash(group)
            except UnicodeEncodeError:
                raise FieldError(
                    "data",
                    f"document {len(sizes)} holds half of a surrogate pair, which is no character; take it out",
                    self.spec,
                ) from None
            hashes.append(hashed)
            sizes.append(len(data))
            content.update(len(data).to_bytes(8, "little") + hashed.to_bytes(8, "little") + data)
        divided = self._divide(np.array(hashes, np.uint64), np.array(sizes, np.int64), content)
        return {**divided, "cut": cut, "notes": list(self._attribute("notes")())}

    def _divide(self, hashes, sizes, content):
        distinct, threshold = len(set(hashes.tolist())), split_threshold(hashes, self._attribute("held_out"))
        is_held_out = hashes < threshold
        content.update(threshold.to_bytes(9, "little"))
        counts = {"train": ~is_held_out, "held_out": is_held_out}
        return {
            "fingerprint": content.hexdigest(),
            "threshold": threshold,
            "distinct": distinct,
            **{f"{side}_documents": int(chosen.sum()) for side, chosen in counts.items()},
            **{f"{side}_bytes": int(sizes[chosen].sum()) for side, chosen in counts.items()},
        }

    def _tokenise(self, tokenizer, folder):
        writers = {side: _Writer(folder, side, tokenizer, self.has_records) for side in SIDES}
        if self.has_records:
            for text, group in self._documents(1):
                writers[self.side(group)].append_record(*conversation.encode(tokenizer, text))
            for writer in writers.values():
                writer.close()
            return
        for texts in _chunks(self._documents(self.summary["cut"])):
            encoded = tokenizer.encode_batch([text for text, _ in texts])
            for ids, (_, group) in zip(encoded, texts, strict=True):
                writers[self.side(group)].append(ids)
        for writer in writers.values():
            writer.close()


def split_threshold(hashes: np.ndarray, held_out: float) -> int:
    """Returns the number below which uint64 hashes of contents are held out, about the share `held_out` of them."""
    threshold = int(held_out * _ALL) if len(set(hashes.tolist())) > 1 else 0
    # Of few documents chance might hold out none, or all: then the one that came closest changes its side.
    return min(max(threshold, int(hashes.min()) + 1), int(hashes.max())) if threshold else 0


class _Writer:
    """Appends documents to an .npy file, whose header numpy leaves room to grow in."""

    def __init__(self, folder, side, tokenizer, records=False):
        self.folder, self.side = folder, side
        self.lead, self.eos = np.array(tokenizer.lead_ids, np.uint32), tokenizer.eos_id
        self.dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 and not records else np.uint32)
        self.file, self.ends = open(folder / f"{side}.npy", "wb"), array.array("q")  # noqa: SIM115
        self.total = 0
        self._header()

    def append(self, ids):
        if len(ids) == 0:
            return
        self._write(np.concatenate([self.lead, ids, [self.eos]]))

    def append_record(self, ids, learnt):
        """A document that closes with eos itself."""
        self._write(np.where(learnt, np.array(ids, np.uint32) | LEARNT, ids))

    def _write(self, ids):
        self.file.write(ids.astype(self.dtype).tobytes())
        self.total += len(ids)
        self.ends.append(self.total)

    def close(self):
        self.file.seek(0)
        self._header()
        self.file.close()
        np.save(self.folder / f"{self.side}_ends.npy", np.array(self.ends, np.int64))

    def _header(self):
        header = {"descr": self.dtype.str, "fortran_order": False, "shape": (self.total,)}
        np.lib.format.write_array_header_1_0(self.file, header)


def shifted(ids: typing.Any) -> dict[str, np.ndarray]:
    """Shifts the ids of a document that ends with eos: `{"tokens": ids[:-1], "targets": ids[1:]}`, int32."""
    ids = np.asarray(ids, np.int32)
    return {"tokens": ids[:-1], "targets": ids[1:]}


def _hash(text):
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def _chunks(documents, characters=1 << 20):
    """Lists of documents of about a million characters: enough to keep every core of a tokenizer busy."""
    chunk, size = [], 0
    for document in documents:
        chunk.append(document)
        size += len(document[0])
        if size >= characters:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _load(folder, side, records):
    ends = np.load(folder / f"{side}_ends.npy")
    ids = np.load(folder / f"{side}.npy", mmap_mode="r" if len(ends) else None)
    return Documents(ids, ends, records)
