"""INT8 files: scales, sensitivities, the accuracy budget, two quantizers, and training with their rounding."""
