"""Pure kernels: arrays in, arrays out; letters are those of the papers."""
