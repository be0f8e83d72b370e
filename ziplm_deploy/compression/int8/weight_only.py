"""Weight-only forms of linears beside INT8: 8 or 4 bits a weight, a scale for each block of inputs.

They suit linears whose inputs are massive: INT8 has one scale for all inputs of a token. See
:mod:`exporters.nbits_matmul` for the operator.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

import onnx
import torch
from torch import nn
from torch.nn import functional

from exporters import ExportError, to_nbits_matmul
from exporters.names import linear_of
from exporters.nbits_matmul import BLOCK_SIZE, OLDEST_ENGINE, OPERATOR, BlockWeights, round_blocks
from ziplm_deploy.compression.onnx_graphs import drop_unread, load_onnx
from ziplm_deploy.errors import EngineError, UsageError

BITS_ASKED = 4  # of `compress.int8.weight_only_4`


def asked_bits(names: Iterable[str], patterns: Sequence[str]) -> dict[str, int]:
    """Bits of the linears of a file that a recipe wants weight-only, by name; a pattern may fit none of them."""
    return {name: BITS_ASKED for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)}


def check_patterns(names: Sequence[str], patterns: Sequence[str]) -> None:
    """Raise :class:`UsageError` for a pattern that fits no linear of the dense model's file."""
    for pattern in patterns:
        if not asked_bits(names, [pattern]):
            raise UsageError(
                f"expected names of linears in compress.int8.weight_only_4, such as {names[0]}, or patterns of them, "
                f"found {pattern!r}, which fits none of {len(names)}; correct it"
            )


def write_weight_only(
    model: onnx.ModelProto,
    linears: Mapping[str, onnx.NodeProto],
    bits: Mapping[str, int],
    rounded: Mapping[str, BlockWeights] | None = None,
) -> None:
    """Give linears weight-only forms, in place.

    Args:
        linears: nodes of the linears, by name.
        bits: 8 or 4, by name; names are among ``linears``.
        rounded: by name what a weight was rounded to; by default to the nearest.

    Raises:
        UsageError: the file has the portable form.
    """
    known = {linears[name].name: rounded[name] for name in bits if name in rounded} if rounded else {}
    try:
        to_nbits_matmul(model, {linears[name].name: count for name, count in bits.items()}, known)
    except ExportError as error:
        raise UsageError(f"linears cannot be weight-only: {error}") from error
    drop_unread(model.graph)


def weight_only_linears(path: Path) -> dict[str, int]:
    """Bits a weight of the weight-only linears of a file, by name.

    Raises:
        CorruptArtifactError: no ONNX file.
    """
    found = {}
    for node in load_onnx(path).graph.node:
        name = linear_of(node.name)
        if node.op_type == OPERATOR and name is not None:
            found[name] = next(attribute.i for attribute in node.attribute if attribute.name == "bits")
    return found


@contextlib.contextmanager
def weights_rounded(
    linears: Sequence[nn.Linear], bits: int, rounded: Sequence[BlockWeights] | None = None
) -> Iterator[None]:
    """Let linears compute as a weight-only form does; afterwards they have their own weights again.

    Its operator rounds inputs to 8 bits, too, with a scale for each block of a token's. ``rounded``: what the weights
    were rounded to; by default to the nearest.
    """
    own = [linear.weight for linear in linears]
    hooks = [linear.register_forward_pre_hook(_with_rounded_blocks) for linear in linears]
    try:
        for place, (linear, weight) in enumerate(zip(linears, own, strict=True)):
            plain = weight.detach().float().cpu().numpy()
            made = round_blocks(plain, bits) if rounded is None else rounded[place]
            # A parameter of its own: a head's may be the embedding, which is not rounded.
            linear.weight = nn.Parameter(torch.from_numpy(made.weight).to(weight), requires_grad=False)
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for linear, weight in zip(linears, own, strict=True):
            linear.weight = weight


def _with_rounded_blocks(_: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """Inputs ``[…, features]`` in blocks as weights have them, each rounded to 127 steps of its largest magnitude."""
    x, *others = args
    padded = functional.pad(x, (0, -x.shape[-1] % BLOCK_SIZE))
    blocks = padded.reshape(*padded.shape[:-1], -1, BLOCK_SIZE)
    scales = blocks.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny) / 127
    rounded = ((blocks / scales).round() * scales).flatten(-2)[..., : x.shape[-1]]
    return rounded, *others


def has_bits(version: str, bits: int) -> bool:
    """Whether a release of ONNX Runtime runs weight-only linears of these bits."""
    return _release(version) >= _release(OLDEST_ENGINE[bits])


def check_bits(version: str, bits: int, field: str) -> None:
    """Raise :class:`EngineError`, naming the field that asks, if :func:`has_bits` says no."""
    if not has_bits(version, bits):
        raise EngineError(
            f"expected onnxruntime >= {OLDEST_ENGINE[bits]} for {field}, found {version}, which has no {bits}-bit "
            "weight-only linears; upgrade it, or leave the field out"
        )


def _release(version: str) -> tuple[int, int]:
    major, minor = version.split(".")[:2]
    return int(major), int(minor)
