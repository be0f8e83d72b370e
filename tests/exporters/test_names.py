"""Nodes of an exported graph are found by the linear that they stand for, and nothing else is taken for one."""

from __future__ import annotations

import pytest

from exporters.names import linear_of

DENSE = "encoder.layer.0.output.dense"


@pytest.mark.parametrize(
    ("node_name", "path"),
    [
        ("/wrapped/encoder/layer.0/output/dense/MatMul", DENSE),
        ("/wrapped/wrapped/layers.0/mlp/Wi/MatMul", "layers.0.mlp.Wi"),
        ("/wrapped/model/layers.0/mlp/Wi/MatMul", "model.layers.0.mlp.Wi"),
        ("/model/encoder/layer.0/output/dense/MatMul", DENSE),
        ("/model/model/encoder/layer.0/output/dense/MatMul", DENSE),
        ("/model/encoder/layer.0/output/dense/MatMul_quant", DENSE),
        ("/encoder/layer/0/output/dense/Gemm", DENSE),
        ("/model/bert/encoder/layer.11/output/dense/MatMul", "bert.encoder.layer.11.output.dense"),
        ("/model/transformer/layer.0/ffn/lin1/MatMul", "transformer.layer.0.ffn.lin1"),
        ("/model/decoder/blocks.3/up/MatMul", "decoder.blocks.3.up"),
        ("/layers.3/feed_forward/down/MatMul", "layers.3.feed_forward.down"),
        ("/layers.11/attention/qkv/MatMul_quant", "layers.11.attention.qkv"),
    ],
)
def test_products_are_named_after_their_linear(node_name: str, path: str) -> None:
    assert linear_of(node_name) == path


@pytest.mark.parametrize(
    "node_name",
    [
        "",
        "MatMul",
        "/model/classifier/MatMul",
        "/model/bert/pooler/dense/Gemm",
        "/model/encoder/layer.0/output/dense/Add",
        "/model/encoder/layer.0/output/dense/MatMul_quant_scales_mul",
        "/model/encoder/layer.0/attention/self/MatMul_1",
        "/wrapped/model/layers.0/attn/MatMul_1",
    ],
)
def test_other_nodes_are_none_of_them(node_name: str) -> None:
    assert linear_of(node_name) is None
