"""One file per backend. They never import each other: what they share lives in ``kernels.math``."""
