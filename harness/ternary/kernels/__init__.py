"""The packed product in torch.

Read `tensors` (the kernels' layout as tensors), `operation` (the product as an operation of torch),
`shared` (one launch for layers with one input) and `launches` (which layers of a model share one).
"""
