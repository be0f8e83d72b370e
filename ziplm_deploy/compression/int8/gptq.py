"""Weights of few bits that keep what a linear gives: GPTQ (Frantar et al. 2023), OBS on the grid of a block's integers.

======  ==========  ==========================================================================================
symbol  shape       meaning
======  ==========  ==========================================================================================
W       [out, in]   weight; columns are rounded one after the other
H       [in, in]    second moments of the inputs, damped
U       [in, in]    upper Cholesky factor of H⁻¹: row j holds what the columns behind j make up for it
======  ==========  ==========================================================================================

Column j is rounded with the scale of its block, which is that of the weights as they are when the block's turn comes;
what it lost, over U_jj, times row j of U, leaves the columns behind it. The sum of squared errors of the linear's
answers is then lower than with every weight rounded to the nearest, but on the tokens that H was made of: which of the
two changes a model's answers less is measured on others (:mod:`ziplm_deploy.compression.int8.sensitivity`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from exporters.nbits_matmul import BLOCK_SIZE, BlockWeights, block_scales
from ziplm_deploy.compression.int8.fake_quant import quantizable_linears, watch_inputs
from ziplm_deploy.compression.int8.smoothing import smoothing_sites
from ziplm_deploy.errors import NumericalError
from ziplm_deploy.pruning.moments import Moments, moments_bytes

DAMPING = 0.01  # of the mean of H's diagonal, as GPTQ has it
UPDATED_AT_ONCE = 128  # columns; those behind them follow in one product

Batches = Sequence[Mapping[str, Tensor]]


def gptq_blocks(weight: NDArray[np.float32], hessian: Tensor, bits: int) -> BlockWeights:
    """Round a weight ``[out, in]`` whose inputs have these second moments, float64 [in, in].

    Raises:
        NumericalError: no Cholesky factor, for moments that are not finite.
    """
    n_outputs, n_inputs = weight.shape
    limit = 2 ** (bits - 1)
    w = torch.from_numpy(np.array(weight, np.float32))
    upper = _upper(hessian)
    n_blocks = -(-n_inputs // BLOCK_SIZE)
    integers = np.full((n_outputs, n_blocks, BLOCK_SIZE), limit, np.uint8)
    scales = np.zeros((n_outputs, n_blocks), np.float32)
    for first in range(0, n_inputs, UPDATED_AT_ONCE):
        last = min(first + UPDATED_AT_ONCE, n_inputs)
        errors = torch.zeros(n_outputs, last - first)
        for column in range(first, last):
            block, place = divmod(column, BLOCK_SIZE)
            if not place:
                scales[:, block] = block_scales(w[:, column : column + BLOCK_SIZE].numpy(), bits)
                scale = torch.from_numpy(scales[:, block])
                inverse = torch.where(scale != 0, 1 / scale, torch.zeros(()))
            whole = (w[:, column] * inverse).round().clamp(-limit, limit - 1)
            integers[:, block, place] = (whole + limit).to(torch.uint8).numpy()
            error = (w[:, column] - whole * scale) / upper[column, column]
            w[:, column:last] -= error[:, None] * upper[column, column:last]
            errors[:, column - first] = error
        w[:, last:] -= errors @ upper[first:last, last:]
    return BlockWeights(integers, scales, n_inputs, bits)


def _upper(hessian: Tensor) -> Tensor:
    """U of the module docstring, float32; inputs that were always zero stand for themselves."""
    damped = hessian.clone()
    diagonal = damped.diagonal()
    mean = float(diagonal.mean())
    diagonal += DAMPING * mean if mean > 0 else 1.0
    try:
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
        upper: Tensor = torch.linalg.cholesky(inverse, upper=True).float()
    except RuntimeError as error:  # LinAlgError
        raise NumericalError(
            f"expected finite second moments of a linear's inputs, found none with a Cholesky factor ({error}); check "
            "the checkpoint and the calibration data"
        ) from error
    return upper


def input_moments(
    model: nn.Module, batches: Batches, paths: Iterable[str], memory_limit_bytes: int
) -> Iterator[tuple[str, Tensor]]:
    """Second moments, float64 [in, in], of the inputs of linears, by module path; as many at once as the limit allows.

    Linears that read the same tensor share theirs. Every group takes a pass over the batches.

    Raises:
        DataError: no token reached a linear.  NumericalError: NaN or infinite inputs; both name the linear.
    """
    linears = quantizable_linears(model)
    first_of = {reader: site.readers[0] for site in smoothing_sites(model) for reader in site.readers}
    readers: dict[str, list[str]] = {}
    for path in paths:
        readers.setdefault(first_of.get(path, path), []).append(path)
    for group in _groups({name: linears[name].in_features for name in readers}, memory_limit_bytes):
        sums = {name: Moments(name, linears[name].in_features) for name in group}

        def look(name: str, x: Tensor, sums: dict[str, Moments] = sums) -> None:
            sums[name].add(x.detach().reshape(-1, x.shape[-1]))

        watch_inputs(model, batches, {name: linears[name] for name in group}, look)
        for name in group:
            hessian = sums.pop(name).finish().hessian
            for path in readers[name]:
                yield path, hessian


def _groups(widths: Mapping[str, int], limit: int) -> list[list[str]]:
    groups: list[list[str]] = []
    for name, width in widths.items():
        if groups and moments_bytes([*(widths[each] for each in groups[-1]), width]) <= limit:
            groups[-1].append(name)
        else:
            groups.append([name])
    return groups


def rounded_by_gptq(
    model: nn.Module,
    batches: Batches,
    weight_of: Callable[[str], NDArray[np.float32]],
    path_of: Mapping[str, str],
    memory_limit_bytes: int,
) -> dict[str, BlockWeights]:
    """4-bit integers of weights, by name.

    Args:
        weight_of: a weight ``[out, in]``; asked for once, when its turn comes.
        path_of: by name the module path of a linear that reads what the weight is multiplied with.
        memory_limit_bytes: of moments at once; raises as :func:`input_moments`.
    """
    names: dict[str, list[str]] = {}
    for name, path in path_of.items():
        names.setdefault(path, []).append(name)
    found: dict[str, BlockWeights] = {}
    for path, hessian in input_moments(model, batches, names, memory_limit_bytes):
        found |= {name: gptq_blocks(weight_of(name), hessian, 4) for name in names[path]}
    return found
