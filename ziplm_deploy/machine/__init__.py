"""The machine that measures: its CPU and memory, processes of a launch, workers, environments of their own."""
