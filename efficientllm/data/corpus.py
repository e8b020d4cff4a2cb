"""The documents a data spec names, divided into train and held-out, and their tokens; read once, then cached."""

import array
import dataclasses
import functools
import hashlib
import json

import numpy as np

from efficientllm.data import cache, conversation
from efficientllm.errors import UserError
from efficientllm.registry import build

SIDES = ("train", "held_out")
_ALL = 1 << 64
LEARNT = np.uint32(1 << 31)


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
    def size(self):
        """Tokens with a target, which is all of them but eos."""
        return len(self.ids) - len(self.ends)

    def longer_than(self, length):
        """How many documents have more than `length` tokens with a target."""
        return int(np.sum(np.diff(self.ends, prepend=0) - 1 > length))

    def teaches(self, length):
        """Whether a document has a target to learn among its first `length`."""
        return not self.records or any(self[index]["weights"][:length].any() for index in range(len(self)))


class Corpus:
    """What `spec` names, as seen by one cache. Building it reads nothing."""

    def __init__(self, spec, cache_dir=None):
        self.spec = spec
        self.source = build("data", spec, where="config.data")
        self.cache = cache.root(cache_dir)
        if not 0 <= self.source.held_out < 1:
            raise UserError(f"config.data = {spec!r}: held_out must be at least 0 and below 1")

    @functools.cached_property
    def summary(self):
        """Counts of both sides, the sha256 of all documents, and the hash below which one is held out."""
        key = self.source.key()
        if key is None:
            return self._summarise()
        name = f"corpus-{cache.digest(key)}"
        folder = cache.entry(
            self.cache, name, lambda new: (new / "summary.json").write_text(json.dumps(self._summarise()))
        )
        return json.loads((folder / "summary.json").read_text())

    def texts(self, side):
        """Yields the documents of one side in their fixed order."""
        for text, group in self.source.documents():
            if self.side(group) == side:
                yield text

    def side(self, group):
        """The side of a document whose side is decided by the text `group`."""
        return SIDES[_hash(group) < self.summary["threshold"]]

    def documents(self, tokenizer):
        """{side: Documents}, tokenised at the first call."""
        form = "record" if self.has_records else "text"
        name = f"tokens-{cache.digest(self.summary['fingerprint'], tokenizer.fingerprint, form)}"
        folder = cache.entry(self.cache, name, lambda new: self._tokenise(tokenizer, new))
        return {side: _load(folder, side, self.has_records) for side in SIDES}

    @property
    def has_records(self):
        """Whether a document is a conversation (`data.conversation`), of which the answers are learnt."""
        return getattr(self.source, "records", False)

    def _summarise(self):
        hashes, sizes, content = array.array("Q"), array.array("q"), hashlib.sha256()
        for text, group in self.source.documents():
            data = text.encode()
            hashes.append(_hash(group))
            sizes.append(len(data))
            content.update(len(data).to_bytes(8, "little") + data)
        return self._divide(np.array(hashes, np.uint64), np.array(sizes), content)

    def _divide(self, hashes, sizes, content):
        if len(set(hashes.tolist())) < 2:
            raise UserError(
                f"config.data = {self.spec!r}: training and held-out text need two different documents, "
                f"there is {'one' if len(hashes) else 'none'}"
            )
        # Of few documents chance might hold out none: then the one that came closest is.
        threshold = int(self.source.held_out * _ALL)
        threshold = max(threshold, int(hashes.min()) + 1) if threshold else 0
        held = hashes < threshold
        content.update(threshold.to_bytes(9, "little"))
        counts = {"train": ~held, "held_out": held}
        return {
            "fingerprint": content.hexdigest(),
            "threshold": threshold,
            **{f"{side}_documents": int(chosen.sum()) for side, chosen in counts.items()},
            **{f"{side}_bytes": int(sizes[chosen].sum()) for side, chosen in counts.items()},
        }

    def _tokenise(self, tokenizer, folder):
        writers = {side: _Writer(folder, side, tokenizer, self.has_records) for side in SIDES}
        if self.has_records:
            for text, group in self.source.documents():
                writers[self.side(group)].append_record(*conversation.encode(tokenizer, text))
            for writer in writers.values():
                writer.close()
            return
        for texts in _chunks(self.source.documents()):
            encoded = tokenizer.encode_batch([text for text, _ in texts])
            for ids, (_, group) in zip(encoded, texts, strict=True):
                writers[self.side(group)].append(ids)
        for writer in writers.values():
            writer.close()


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


def shifted(ids):
    """{"tokens", "targets"} of a document that closes with eos."""
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
