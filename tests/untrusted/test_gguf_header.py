"""Headers of GGUF files that lie: about counts, lengths, types, places. Nothing is made as large as they say."""

import struct
import tracemalloc

import pytest

from efficientllm.errors import UserError
from efficientllm.untrusted import gguf_header

pytestmark = pytest.mark.quick

BLOCKS = {0: (1, 4), 1: (1, 2), 2: (32, 18)}


def text(value):
    data = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(data)) + data


def key(name, kind, payload):
    return text(name) + struct.pack("<I", kind) + payload


def tensor(name="a", shape=(4,), kind=0, offset=0, axes=None):
    axes = len(shape) if axes is None else axes
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", axes, *shape[::-1], kind, offset)


TENSOR = tensor()
ARCHITECTURE = key("general.architecture", 8, text("llama"))


def file(keys=(ARCHITECTURE,), tensors=(TENSOR,), counts=None, magic=b"GGUF", version=3, room=64):
    counts = counts or (len(tensors), len(keys))
    head = magic + struct.pack("<IQQ", version, *counts) + b"".join(keys) + b"".join(tensors)
    return head + bytes(-len(head) % 32) + bytes(room)


def array(kind, count, payload=b""):
    return struct.pack("<IQ", kind, count) + payload


WRONG = {
    "empty": (b"", "has 0 bytes"),
    "short": (b"GGUF\3\0\0\0", "has 8 bytes"),
    "magic": (file(magic=b"GGML"), "does not begin with GGUF"),
    "version": (file(version=1), "version 1"),
    "big-endian": (file(version=3 << 24), "little-endian"),
    "keys": (file(counts=(1, 2**60)), "1,152,921,504,606,846,976 keys in a file of"),
    "tensors": (file(counts=(2**60, 1)), "tensors in a file of"),
    "more keys": (file(counts=(1, 3)), "no GGUF file that can be read"),
    "name": (file(keys=[struct.pack("<Q", 2**63) + b"x"]), "a text of 9,223,372,036,854,775,808 bytes"),
    "text": (file(keys=[key("a", 8, struct.pack("<Q", 2**20))]), "1,048,576 bytes at byte .* are not there"),
    "utf-8": (file(keys=[key("a", 8, text(b"\xff"))]), "not UTF-8"),
    "type": (file(keys=[key("a", 77, b"")]), "a value of type 77"),
    "twice": (file(keys=[ARCHITECTURE, ARCHITECTURE]), "key 'general.architecture' stands in it twice"),
    "array": (file(keys=[key("a", 9, array(0, 2**60))]), "entries of an array"),
    "texts": (file(keys=[key("a", 9, array(8, 2**60))]), "entries of an array"),
    "nested": (file(keys=[key("a", 9, array(9, 1, array(9, 1)))]), "an array of type 9"),
    "entries": (file(keys=[key("a", 9, array(0, 9 * 2**20, bytes(9 * 2**20)))]), "more than 8,388,608 entries"),
    "alignment": (file(keys=[key("general.alignment", 4, struct.pack("<I", 0))]), "general.alignment = 0"),
    "no power": (file(keys=[key("general.alignment", 4, struct.pack("<I", 24))]), "general.alignment = 24"),
    "large": (file(keys=[key("general.alignment", 4, struct.pack("<I", 2**31))]), "general.alignment"),
    "word": (file(keys=[key("general.alignment", 8, text("32"))]), "general.alignment = '32'"),
    "axes": (file(tensors=[tensor(axes=2**31)]), "tensor 'a' of 2147483648 axes"),
    "no axes": (file(tensors=[tensor(shape=())]), "tensor 'a' of 0 axes"),
    "huge": (file(tensors=[tensor(shape=(2**60, 2**60))]), "ends behind the end"),
    "zero": (file(tensors=[tensor(shape=(0, 4))]), "of shape .0, 4."),
    "kind": (file(tensors=[tensor(kind=99)]), "of type 99"),
    "block": (file(tensors=[tensor(shape=(2, 33), kind=2)]), "blocks of 32 do not make"),
    "offset": (file(tensors=[tensor(offset=2**63)]), "ends behind the end"),
    "unaligned": (file(tensors=[tensor(offset=4)]), "no multiple of 32"),
    "behind": (file(tensors=[tensor(shape=(17,))]), "ends behind the end"),
    "overlap": (file(tensors=[tensor(shape=(16,)), tensor("b", offset=32)]), "'a' and 'b' overlap"),
    "same": (file(tensors=[tensor(), tensor()]), "tensor 'a' stands in it twice"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_header_that_lies_is_one_line(name, tmp_path):
    data, message = WRONG[name]
    (tmp_path / "m.gguf").write_bytes(data)
    tracemalloc.start()
    with pytest.raises(UserError, match=message) as error:
        gguf_header.read(tmp_path / "m.gguf", BLOCKS)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert "\n" not in str(error.value) and "m.gguf: " in str(error.value) and peak < 3e7


def test_what_is_said_is_read(tmp_path):
    numbers = [key("u", 10, struct.pack("<Q", 2**64 - 1)), key("f", 6, struct.pack("<f", 0.5)), key("b", 7, b"\1")]
    arrays = [key("list", 9, array(5, 2, struct.pack("<2i", -1, 7))), key("long", 9, array(0, 1024, bytes(1024)))]
    names = [key("names", 9, array(8, 2, text("x") + text("\u00e9")))]
    tensors = [tensor("w", (2, 4), 0, 0), tensor("q", (3, 64), 2, 32)]
    (tmp_path / "m.gguf").write_bytes(file([ARCHITECTURE, *numbers, *arrays, *names], tensors, room=32 + 6 * 18))
    header = gguf_header.read(tmp_path / "m.gguf", BLOCKS)
    assert header.values == {
        "general.architecture": "llama",
        "u": 2**64 - 1,
        "f": 0.5,
        "b": True,
        "list": [-1, 7],
        "long": None,
        "names": ["x", "\u00e9"],
    }
    assert [header.tensors[name].shape for name in "wq"] == [(2, 4), (3, 64)]
    assert [header.tensors[name].size for name in "wq"] == [32, 108]
    assert header.tensors["q"].offset - header.tensors["w"].offset == 32


def test_it_reads_what_the_package_reads(tmp_path):
    gguf = pytest.importorskip("gguf")
    from convert.files.test_gguf_file import write

    write(tmp_path / "m.gguf", "qwen2", gguf.GGMLQuantizationType.Q8_0)
    sizes = {int(kind): size for kind, size in gguf.GGML_QUANT_SIZES.items()}
    ours, theirs = gguf_header.read(tmp_path / "m.gguf", sizes), gguf.GGUFReader(tmp_path / "m.gguf")
    assert ours.values == {name: f.contents() for name, f in theirs.fields.items() if not name.startswith("GGUF.")}
    expected = {
        t.name: (int(t.tensor_type), tuple(map(int, t.shape[::-1])), int(t.data_offset), int(t.n_bytes))
        for t in theirs.tensors
    }
    assert {n: (t.kind, t.shape, t.offset, t.size) for n, t in ours.tensors.items()} == expected
    assert len(expected) > 10
