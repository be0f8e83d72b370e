"""Which linear of the model a node of an exported graph stands for.

torch's exporter names nodes by the path of the module that made them, below the wrappers that models are exported in,
and quantizers append to that::

    /model/encoder/layer.0/output/dense/MatMul          of encoder.layer.0.output.dense
    /model/encoder/layer.0/output/dense/MatMul_quant    the same linear in integers

Graphs of causal language models are written with such names, by the parts of :mod:`exporters.decoder_parts`::

    /layers.3/feed_forward/down/MatMul                  of layers[3].feed_forward.down
    /layers.3/attention/qkv/MatMul                      of queries, keys and values of layers[3] in one product
    /head/Gemm                                          of the head over the vocabulary
"""

from __future__ import annotations

import re

_PRODUCT = re.compile(r"/(?:MatMul|Gemm)(?:_quant)?$")
# Layers are the only numbered modules of a model: embeddings, poolers and heads are outside.
_IN_LAYER = re.compile(r"(?:^|\.)[^.]+\.\d+\.")
HEAD = "head"  # of a causal language model
_WRAPPER = "model."  # attribute of what the exporter wraps models in


def linear_of(node_name: str) -> str | None:
    """Module path of the linear whose product a node of this name computes; None for all other nodes.

    Linears are those of layers and the head of a causal language model; other heads and poolers are none.

    Products of two activations are named after the attention block that they stand in, which is no linear.
    """
    product = _PRODUCT.search(node_name)
    if product is None:
        return None
    path = node_name[: product.start()].strip("/").replace("/", ".")
    if path == HEAD:
        return HEAD
    while path.startswith(_WRAPPER):
        path = path.removeprefix(_WRAPPER)
    return path if _IN_LAYER.search(path) else None
