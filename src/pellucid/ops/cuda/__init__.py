"""Kernels for NVIDIA GPUs in CUDA C++, compiled when they are wanted by the compiler that PyTorch brings (NVRTC)."""
