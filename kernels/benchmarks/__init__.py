"""The parts of ``python -m kernels.bench``: what is timed, against what, and how it is told."""
