"""The packed product in torch.

Read `tensors` (the layout of a GPU as tensors), `host` (that of a CPU, and its product), `operation` (the
product as an operation of torch), `shared` (one launch for layers with one input) and `launches` (which
layers of a model share one).
"""
