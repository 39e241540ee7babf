"""python -m harness.quantize: quantize a model and write a ternary checkpoint.

Read `run`, the run from start to end. `options` defines the command line, `prepare` loads model and text,
`estimate` predicts memory and time, `sink` takes finished layers, `record` and `report` collect the figures,
`resume` continues an interrupted run.
"""
