"""Ways to damage a file, at random but repeatable: its bytes, its text, its JSON, its tensors, its graph."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable
from typing import Any

Random = random.Random

# Values that readers have stumbled over, here or elsewhere.
NASTY: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2, 0.5, -0.0, 1e308, 1e-320, float("nan"), float("inf"), -float("inf")),
    *(2**31, 2**63, 2**64, 10**9, -(2**63), 10**30, "", "x", "nan", "0", "\0", "é\ud83d", "../../etc/passwd"),
    *("x" * 300, "y" * 100_000, [], {}, [[]], [None], {"": None}, [0] * 1000, "$(touch ran)", "!!python/object:os.x"),
)
SNIPPETS = (
    *(b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b"\r\n", b"{", b"}", b"[" * 3000, b'{"a":' * 3000, b'"', b"'", b"\\", b",,"),
    *(b"NaN", b"Infinity", b"1e999", b"9" * 5000, b"0x" + b"f" * 5000, b"- " * 2000, b"&a [*a]", b"*a", b"<<: *a"),
    *(b"!!python/object/apply:os.system ['touch ran']", b"!!binary x", b"!!timestamp x", b"!!int x", b"%YAML 9.9\n---"),
    *(b"? [1, 2]\n: 3\n", b"2020-13-45", b"99:99:99", b"\t", b"#", b"|", b">", b"\xc3\x28", b"\x00\x00\x00\x80" * 9),
)
DEEP = 400  # levels of a nested value: beyond what recursive readers expect, within what Python writes


def mutated_bytes(content: bytes, rng: Random) -> bytes:
    """One to four changes anywhere in a file."""
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        content = rng.choice(BYTE_CHANGES)(content, rng)
    return content


def _cut(content: bytes, rng: Random) -> bytes:
    return content[: rng.randrange(len(content) + 1)]


def _flip(content: bytes, rng: Random) -> bytes:
    changed = bytearray(content)
    for _ in range(rng.choice((1, 3, 30)) if changed else 0):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _insert(content: bytes, rng: Random) -> bytes:
    at = rng.randrange(len(content) + 1)
    return content[:at] + rng.choice((rng.randbytes(rng.randrange(1, 9)), rng.choice(SNIPPETS))) + content[at:]


def _remove(content: bytes, rng: Random) -> bytes:
    at = rng.randrange(len(content) + 1)
    return content[:at] + content[at + rng.randrange(1, 40) :]


def _repeat(content: bytes, rng: Random) -> bytes:
    at = rng.randrange(len(content) + 1)
    piece = content[at : at + rng.randrange(1, 200)]
    return content[:at] + piece * rng.choice((2, 3, 500)) + content[at:]


def _swap(content: bytes, rng: Random) -> bytes:
    at, other = sorted((rng.randrange(len(content) + 1), rng.randrange(len(content) + 1)))
    return content[other:] + content[at:other] + content[:at]


def _other_encoding(content: bytes, rng: Random) -> bytes:
    return content.decode("utf-8", errors="replace").encode(
        rng.choice(("utf-16", "utf-32", "utf-7", "cp037")), "replace"
    )


BYTE_CHANGES: tuple[Callable[[bytes, Random], bytes], ...] = (
    *(_cut, _flip, _flip, _insert, _insert, _insert, _remove, _repeat, _swap, _other_encoding),
)


def mutated_json(value: Any, rng: Random) -> Any:
    """A copy of a JSON value with one to three of its parts replaced, removed, renamed, doubled or exchanged."""
    value = json.loads(json.dumps(value))
    for _ in range(rng.choice((1, 1, 2, 3))):
        places = list(_places(value))
        if not places:
            return nasty(rng)
        owner, key = rng.choice(places)
        _change(owner, key, places, rng)
    return value


def json_text(value: Any) -> str:
    """A value as JSON, with the NaN and infinity of Python's own dialect."""
    return json.dumps(value)


def nasty(rng: Random) -> Any:
    """A value that no reader expects."""
    if rng.random() < 0.1:
        deep: Any = 0
        for _ in range(DEEP):
            deep = [deep] if rng.random() < 0.5 else {"a": deep}
        return deep
    return rng.choice(NASTY)


def _places(value: Any) -> Any:
    """Every part of a value, as owner and key."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in list(pairs):
        yield value, key
        yield from _places(part)


def _change(owner: Any, key: Any, places: list[tuple[Any, Any]], rng: Random) -> None:
    kind = rng.choices(range(7), (2, 2, 1, 1, 4, 3, 3))[0]
    part = owner[key]
    if kind == 0:
        del owner[key]
    elif kind == 1 and isinstance(owner, dict):
        owner[rng.choice((f"{key}x", "", "kind", "x" * 5000, str(key).upper()))] = owner.pop(key)
    elif kind == 2 and isinstance(owner, list):
        owner.extend([part] * rng.choice((1, 2, 3000)))
    elif kind == 3:
        other, other_key = rng.choice(places)
        owner[key] = json.loads(json.dumps(other.get(other_key) if isinstance(other, dict) else None))
    elif kind == 4 and isinstance(part, (int, float)) and not isinstance(part, bool):
        owner[key] = rng.choice((-part, part * 10**6, part + 1, part - 1, str(part), [part], part / 7, part * 1e300))
    elif kind == 5 and isinstance(part, str):
        owner[key] = rng.choice((part * 2, part[:-1], part + "\n", part.upper(), [part], {part: part}, len(part)))
    else:
        owner[key] = nasty(rng)


def mutated_safetensors(content: bytes, rng: Random) -> bytes:
    """A safetensors file with another header, other lengths, other numbers, or damaged bytes."""
    kind = rng.randrange(5)
    if kind == 0:
        return mutated_bytes(content, rng)
    (length,) = struct.unpack("<Q", content[:8])
    header, body = content[8 : 8 + length], content[8 + length :]
    if kind == 1:
        wrong = rng.choice((0, 1, length - 1, length + 1, 10**9, 2**63, 2**64 - 1, rng.randrange(2**40)))
        return struct.pack("<Q", max(0, wrong)) + header + body
    if kind == 2:
        changed = bytearray(body)
        for _ in range(rng.choice((1, 20)) if len(changed) >= 4 else 0):
            at = rng.randrange(len(changed) // 4) * 4
            changed[at : at + 4] = struct.pack("<f", rng.choice((float("nan"), float("inf"), 1e38, -1e38, 1e-40, 0.0)))
        return content[: 8 + length] + bytes(changed)
    text = json_text(mutated_json(json.loads(header), rng)).encode("utf-8", errors="surrogatepass")
    return struct.pack("<Q", len(text)) + text + body


def mutated_onnx(content: bytes, rng: Random) -> bytes:
    """An ONNX file with damaged bytes, or with one to three other nodes, shapes, types, places or tensors."""
    import onnx

    if rng.random() < 0.4:
        return mutated_bytes(content, rng)
    model = onnx.load_from_string(content)
    for _ in range(rng.choice((1, 1, 2, 3))):
        rng.choice(GRAPH_CHANGES)(model.graph, rng)
    if rng.random() < 0.1:
        model.opset_import[0].version = rng.choice((0, 1, 99, -1, 2**31))
        model.ir_version = rng.choice((0, 3, 99))
    changed: bytes = model.SerializeToString()
    return changed


def _other_operator(graph: Any, rng: Random) -> None:
    node = rng.choice(graph.node)
    node.op_type = rng.choice(("Relu", "Loop", "If", "Reshape", "ConstantOfShape", "Tile", "Expand", "NoSuchOperator"))
    node.domain = rng.choice(("", "", "com.microsoft", "evil.domain"))


def _other_wires(graph: Any, rng: Random) -> None:
    node, other = rng.choice(graph.node), rng.choice(graph.node)
    names = [*other.output, *other.input, "", "nowhere"]
    (node.input if rng.random() < 0.5 else node.output).append(rng.choice(names))
    if node.input and rng.random() < 0.7:
        node.input[rng.randrange(len(node.input))] = rng.choice(names)  # cycles, too


def _other_shape(graph: Any, rng: Random) -> None:
    value = rng.choice([*graph.input, *graph.output])
    dims = value.type.tensor_type.shape.dim
    if dims:
        dims[rng.randrange(len(dims))].dim_value = rng.choice((0, -1, 1, 3, 10**6, 2**31, 2**40, 2**62))
    value.type.tensor_type.elem_type = rng.choice((1, 1, 6, 7, 9, 10, 8, 14, 99))


def _other_tensor(graph: Any, rng: Random) -> None:
    tensor = rng.choice(graph.initializer)
    kind = rng.randrange(5)
    if kind == 0:
        tensor.raw_data = tensor.raw_data[: rng.randrange(len(tensor.raw_data) + 1)]
    elif kind == 1:
        del tensor.dims[:]
        tensor.dims.extend(rng.choice(([], [0], [-1], [10**6, 10**6], [2**62], [3, 5])))
    elif kind == 2:
        tensor.data_type = rng.choice((0, 1, 6, 7, 8, 16, 99))
    elif kind == 3:  # bytes from anywhere on the disk
        entry = tensor.external_data.add()
        entry.key, entry.value = "location", rng.choice(("/etc/passwd", "../../../etc/passwd", "none.bin", ""))
        tensor.data_location = 1
    else:
        tensor.name = rng.choice(("", "x" * 10_000, graph.initializer[0].name))


def _without_part(graph: Any, rng: Random) -> None:
    part = rng.choice((graph.node, graph.initializer, graph.input, graph.output))
    if len(part):
        del part[rng.randrange(len(part))]


def _large_value(graph: Any, rng: Random) -> None:
    """A few bytes that ask for gigabytes."""
    import numpy as np
    from onnx import helper, numpy_helper

    size = rng.choice(([2**28], [3_000_000_000], [2**20, 2**20], [2**62]))
    graph.initializer.append(numpy_helper.from_array(np.array(size), "large shape"))
    graph.node.insert(0, helper.make_node("ConstantOfShape", ["large shape"], ["large"]))
    graph.node.append(helper.make_node("ReduceSum", ["large"], ["large sum"]))
    graph.output.append(helper.make_tensor_value_info("large sum", 1, None))


GRAPH_CHANGES: tuple[Callable[[Any, Random], None], ...] = (
    *(_other_operator, _other_wires, _other_shape, _other_tensor, _without_part, _large_value),
)
