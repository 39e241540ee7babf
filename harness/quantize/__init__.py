"""python -m harness.quantize: from the names of a model and a text to a ternary checkpoint.

Read `run`, the run from start to end; `options` is what it is asked for, `prepare` what happens before the
first layer, `estimate` what it will take, `report` what is printed and stored, `resume` how a stopped run
continues.
"""
