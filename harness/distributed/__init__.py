"""Several processes that share a run, through torch.distributed.

Read `ranks`, what processes know of each other and send each other; `meet`, how they find each other;
`launch`, how they join and how they end; `watch`, how they notice that one of them has died.
"""
