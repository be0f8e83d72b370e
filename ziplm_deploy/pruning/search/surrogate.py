"""A cheap stand-in for the loss of a plan: the modules' own measured losses, added up with learnt weights.

What it cannot see is how modules make up for each other; the search measures whole plans for that.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ziplm_deploy.pruning.search.space import Array, Plan


class Surrogate:
    """Σ_l w_l · curve_l(level): weights start at 1 and are ridge-fitted to the plans evaluated so far."""

    def __init__(self, curves: Sequence[Array], ridge: float = 0.3) -> None:
        self.curves = list(curves)
        self.weights = np.ones(len(self.curves))
        self._ridge = ridge

    def costs(self, noise: Array | None = None) -> list[Array]:
        """Predicted loss of every level, L × [S_l]; ``noise`` [L] multiplies the weights."""
        weights = self.weights if noise is None else self.weights * noise
        return [w * curve for w, curve in zip(weights, self.curves, strict=True)]

    def predict(self, plan: Plan) -> float:
        """Predicted loss of a plan."""
        return float(sum(w * c[s] for w, c, s in zip(self.weights, self.curves, plan, strict=True)))

    def fit(self, losses: dict[Plan, float]) -> None:
        """Refit to the better half of what was seen: the surrogate must be right near the optimum, not far from it."""
        seen = sorted((loss, plan) for plan, loss in losses.items() if np.isfinite(loss) and loss > 0)
        seen = seen[: max(8, len(seen) // 2)]
        if len(seen) < 4:
            return
        features = np.array([[c[s] for c, s in zip(self.curves, plan, strict=True)] for _, plan in seen])  # [n, L]
        target = np.array([loss for loss, _ in seen])  # [n]
        emphasis = (target.min() / target)[:, None]  # near-optimal plans count most
        scale = max(float((features.sum(1) * target).sum() / (features.sum(1) ** 2).sum()), 1e-9)
        A = features * emphasis * scale  # [n, L]
        residual = (target - scale * features.sum(1)) * emphasis[:, 0]  # [n]
        penalty = self._ridge * np.mean((A**2).sum(1)) / A.shape[1] * len(seen)
        shift = np.linalg.solve(A.T @ A + penalty * np.eye(A.shape[1]), A.T @ residual)  # [L]
        self.weights = scale * np.maximum(1.0 + shift, 0.1)
