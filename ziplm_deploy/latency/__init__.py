"""Measured latency: tables of sub-blocks that predict a plan, and benchmarks of ONNX files."""
