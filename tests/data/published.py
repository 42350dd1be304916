"""Other programs' token files by numpy and struct alone, from the layouts that their authors published: no code of ours."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np

Documents = list[list[int]]
LLMC = {"<u2": (20240520, 1), "<u4": (20240801, 7)}


def narrow(vocab_size: int) -> str:
    return "<u2" if vocab_size <= 65536 else "<u4"


def flat(documents: Documents) -> list[int]:
    return [i for d in documents for i in d]


def grouped(documents: Documents, n: int) -> list[Documents]:
    """The documents in at most n runs."""
    size = -(-len(documents) // n) if documents else 1
    return [documents[at : at + size] for at in range(0, len(documents), size)]


def cut(ids: list[int], n: int) -> list[list[int]]:
    size = max(-(-len(ids) // n), 1)
    return [ids[at : at + size] for at in range(0, len(ids), size)]


def write(format: str, folder: Path, split: str, documents: Documents, vocab: int, files: int = 1) -> None:
    """Documents without end-of-text ids, which is `vocab - 1`, in `files` files where the format has several."""
    eot, dtype = vocab - 1, narrow(vocab)
    appended, prepended = [[*d, eot] for d in documents], [[eot, *d] for d in documents]
    if format == "nanogpt":
        np.array(flat(appended), dtype).tofile(folder / f"{split}.bin")
    elif format == "llmc":
        for number, ids in enumerate(cut(flat(prepended), files)):
            header = np.zeros(256, "<i4")
            header[:3] = *LLMC[dtype], len(ids)
            path = folder / f"fineweb_{split}_{number:06d}.bin"
            path.write_bytes(header.tobytes() + np.array(ids, dtype).tobytes())
    elif format == "npy":
        for number, ids in enumerate(cut(flat(prepended), files)):
            np.save(folder / f"edufineweb_{split}_{number:06d}.npy", np.array(ids, dtype))
    elif format == "megatron":
        for number, group in enumerate(grouped(appended, files)):
            write_megatron(folder / f"text_{split}_{number}", group, "<u2" if vocab < 65500 else "<i4")
    elif format == "datatrove":
        for number, group in enumerate(grouped(appended, files)):
            path = folder / f"{number:05d}_{split}_shuffled.ds"
            path.write_bytes(np.array(flat(group), dtype).tobytes())
            ends = np.cumsum([len(d) for d in group])
            Path(f"{path}.index").write_bytes(struct.pack(f"<{len(group)}Q", *ends))
            Path(f"{path}.metadata").write_text(f"Unknown Tokenizer|2|{dtype[-1]}\n{ends[-1]}\n{ends[-1]} T")


def write_megatron(prefix: Path, documents: Documents, dtype: str) -> None:
    lengths = [len(d) for d in documents]
    code, itemsize = {"<u2": (8, 2), "<i4": (4, 4)}[dtype]
    Path(f"{prefix}.bin").write_bytes(np.array(flat(documents), dtype).tobytes())
    header = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, code, len(lengths), len(lengths) + 1)
    pointers = (np.cumsum(lengths) - lengths) * itemsize
    parts = (
        np.array(lengths, "<i4"),
        np.array(pointers, "<i8"),
        np.arange(len(lengths) + 1, dtype="<i8"),
    )
    Path(f"{prefix}.idx").write_bytes(header + b"".join(p.tobytes() for p in parts))


def read(format: str, folder: Path, split: str, vocab: int) -> Documents:
    """The documents of a split, without their end-of-text ids, checked for standing where the format has them."""
    eot, dtype = vocab - 1, narrow(vocab)
    if format == "nanogpt":
        path = folder / f"{split}.bin"
        return appended(np.fromfile(path, dtype).tolist() if path.exists() else [], eot)
    if format == "llmc":
        ids: list[int] = []
        for path in sorted(folder.glob(f"*_{split}_*.bin")):
            header = np.fromfile(path, "<i4", 256)
            assert (header[0], header[1]) == LLMC[dtype] and not header[3:].any()
            own = np.fromfile(path, dtype, offset=1024).tolist()
            assert len(own) == header[2]
            ids += own
        return prepended(ids, eot)
    if format == "megatron":
        return [
            checked(d, eot)
            for path in sorted(folder.glob(f"*{split}*.idx"))
            for d in read_megatron(path.with_suffix(""))
        ]
    assert format == "datatrove"
    documents = []
    for path in sorted(folder.glob(f"*{split}*.ds")):
        every = np.fromfile(path, dtype).tolist()
        ends = np.fromfile(f"{path}.index", "<u8").tolist()
        name, count, _ = Path(f"{path}.metadata").read_text().split("\n")
        assert name.endswith(f"|{dtype[-1]}") and int(count) == len(every) == ends[-1]
        documents += [checked(every[a:b], eot) for a, b in zip([0, *ends], ends, strict=False)]
    return documents


def read_megatron(prefix: Path) -> Documents:
    index, data = Path(f"{prefix}.idx").read_bytes(), Path(f"{prefix}.bin").read_bytes()
    assert index[:9] == b"MMIDIDX\0\0"
    version, code, n, n_documents = struct.unpack_from("<QBQQ", index, 9)
    assert version == 1 and n_documents == n + 1 and len(index) == 34 + 12 * n + 8 * n_documents
    dtype = {8: "<u2", 4: "<i4"}[code]
    lengths = np.frombuffer(index, "<i4", n, 34).tolist()
    pointers = np.frombuffer(index, "<i8", n, 34 + 4 * n).tolist()
    assert np.frombuffer(index, "<i8", n + 1, 34 + 12 * n).tolist() == list(range(n + 1))
    return [np.frombuffer(data, dtype, k, at).tolist() for k, at in zip(lengths, pointers, strict=True)]


def checked(document: Sequence[int], eot: int) -> list[int]:
    assert document[-1] == eot
    return list(document[:-1])


def appended(ids: Sequence[int], eot: int) -> Documents:
    documents: Documents = [[]]
    for i in ids:
        documents[-1].append(i)
        if i == eot:
            documents.append([])
    assert documents.pop() == []
    return [checked(d, eot) for d in documents]


def prepended(ids: Sequence[int], eot: int) -> Documents:
    documents: Documents = []
    for i in ids:
        if i == eot:
            documents.append([])
        else:
            documents[-1].append(i)
    return documents
