"""Which linear of the model a node of an exported graph stands for.

torch's exporter names nodes by the path of the module that made them, below the wrappers that models are exported in,
and quantizers append to that::

    /wrapped/encoder/layer.0/output/dense/MatMul          of encoder.layer.0.output.dense
    /wrapped/encoder/layer.0/output/dense/MatMul_quant    the same linear in integers
    /wrapped/wrapped/layers.0/mlp/Wi/MatMul               of layers.0.mlp.Wi, below two wrappers
    /wrapped/model/layers.0/mlp/Wi/MatMul                 of model.layers.0.mlp.Wi, which is a model with a head

Files from before had wrappers called ``model``, and no models in them whose own parts are.

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
# Attribute of what the exporter wraps models in, now and before.
_WRAPPER, _OLD_WRAPPER = "wrapped.", "model."


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
    wrapper = _WRAPPER if path.startswith(_WRAPPER) else _OLD_WRAPPER
    while path.startswith(wrapper):
        path = path.removeprefix(wrapper)
    return path if _IN_LAYER.search(path) else None
