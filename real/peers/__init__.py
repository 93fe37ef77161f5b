"""Other ways of running a model whose experts do not fit, in the same run as ours: ``python -m real.peers``."""
