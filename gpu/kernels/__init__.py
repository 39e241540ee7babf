"""CUDA kernels, launched by the modules of `gpu` whose equations they compute; they share `lanes`."""
