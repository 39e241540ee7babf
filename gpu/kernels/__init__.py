"""CUDA kernels, one a file; each is launched by the module of `gpu` whose equations it computes."""
