"""Kernels for a GPU, written in Triton. `language.choose_triton` says whether they run, and why not where they do not.

Nothing here is imported before a kernel is wanted; without Triton the modules can be imported, and their kernels not be called.
"""
