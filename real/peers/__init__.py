"""Other ways of running a model whose experts do not fit, on the same weights, prompts and device bytes: ``python -m real.peers``."""
