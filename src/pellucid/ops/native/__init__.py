"""C++ kernels for CPUs: whole steps of a decoder and its matrix products, in one call with threads that stay (see `library`).

They read `kernels.cpp` (compiled once for each kind of processor) <- `step.h` (a step) <- `products.h` (products) <- `lanes.h`
(vectors); `team.cpp` (threads); `main.cpp` (what Python calls). Built where a C++ compiler is found (`build`). Without them numba's
kernels and PyTorch's products run: the readable twins, which the tests hold them equal to.
"""
