"""GPU kernels in Triton, named by what they compute. Imported at call time only, by impl ``triton``."""
