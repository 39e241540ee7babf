"""python -m harness.verify: check that a backend computes what the paper says.

Read `cases` (runs the golden cases on a backend) and `tolerances` (the allowed differences, with reasons);
`real_model` compares backends on a whole model, `record` lists the source files that passed on hardware.
"""
