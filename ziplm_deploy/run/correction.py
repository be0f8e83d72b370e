"""TODO run.correction."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Correction:
    """State of the closed loop for one member: the predicted speedup to aim for, and what earlier aims measured.

    ``slowdown``: how much slower the member's last file was than the one that the loop measures, because linears stayed
    in float32; ``rooms``: how often the loop has begun again for that. ``sidesteps``: how often it aimed a little
    higher because the engine could not run the member's file; ``floor``: predicted speedup of the last such plan.
    """

    predicted_target: float
    count: int = 0
    history: list[tuple[float, float]] = field(default_factory=list)  # (aim, measured speedup)
    slowdown: float = 1.0
    rooms: int = 0
    sidesteps: int = 0
    floor: float = 0.0
