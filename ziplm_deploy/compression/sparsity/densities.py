"""How dense each linear stays where some tolerate more zeros than others."""

from __future__ import annotations

from collections.abc import Mapping

import torch

# Error falls about with the square of the density, so the least sum of damages Σ s (ρ/d)² for a given Σ n d has
# d ∝ (s/n)^(1/3).
SENSITIVITY_EXPONENT = 1 / 3
DENSITY_RANGE = (0.5, 2.0)  # of the overall density; never above 1


def allocate_densities(
    sensitivities: Mapping[str, float],
    sizes: Mapping[str, int],
    density: float,
    present: Mapping[str, float] | None = None,
) -> dict[str, float]:
    """A density for each linear with, all together, ``density · Σ sizes`` weights left.

    Proportional to the cube root of the sensitivity per weight, s/n, and within half and twice the overall density
    (at most 1): of two linears of one size, the more sensitive one is never the sparser one.

    Args:
        sensitivities: divergence of the model with that linear alone sparse; below 0 counts as 0.
        sizes: weights of each linear.
        density: overall, inside (0, 1).
        present: densities before, which none can rise above; default: 1.
    """
    names = list(sizes)
    n = torch.tensor([sizes[name] for name in names], dtype=torch.float64)
    s = torch.tensor([sensitivities[name] for name in names], dtype=torch.float64).clamp(min=0)
    if float((s / n).max()) == 0:  # also where the quotient is too small for a float
        return dict.fromkeys(names, density)
    # The floor lets the insensitive ones rise as well where all others are at their bound.
    most = torch.tensor([(present or {}).get(name, 1.0) for name in names], dtype=torch.float64)
    high = most.clamp(max=DENSITY_RANGE[1] * density)
    low = high.clamp(max=DENSITY_RANGE[0] * density)
    weights = ((s / n) / (s / n).max()).clamp(min=1e-12) ** SENSITIVITY_EXPONENT
    below, above = 0.0, float(high.max() / weights.min())
    for _ in range(100):  # bisection on the factor: the sum grows with it
        factor = (below + above) / 2
        total = float(n @ (factor * weights).clamp(low, high))
        below, above = (factor, above) if total < density * float(n.sum()) else (below, factor)
    return dict(zip(names, (above * weights).clamp(low, high).tolist(), strict=True))
