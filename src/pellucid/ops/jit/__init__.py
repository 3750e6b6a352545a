"""Compiled CPU kernels: plain Python loops that numba compiles when they first run. Imports numba: see `ops.choose_jit`.

PyTorch runs a small model's step as hundreds of calls of a few microseconds each; one loop over a row that stays in
the cache does the same in one call. The readable twin of every kernel is the PyTorch code that it stands in for, and
the tests hold the two equal.
"""
