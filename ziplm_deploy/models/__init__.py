"""Models as modules that can shrink: architectures, levels, resizing, checkpoints, and their ONNX files."""
