"""Files that keep a part of what they hold beside them."""

from __future__ import annotations

from pathlib import Path

from ziplm_deploy.artifacts import file_bytes, file_hash, parts_of


def test_weights_beside_a_file_are_parts_of_it(tmp_path: Path) -> None:
    path, beside = tmp_path / "model.onnx", tmp_path / "model.onnx.data"
    path.write_bytes(b"graph")
    alone = file_hash(path)
    assert (parts_of(path), file_bytes(path)) == ([path], 5)
    beside.write_bytes(b"weights")
    assert (parts_of(path), file_bytes(path)) == ([path, beside], 12)
    hashes = {alone, file_hash(path)}
    beside.write_bytes(b"WEIGHTS")
    assert len({*hashes, file_hash(path)}) == 3
