"""python -m harness.verify: whether a backend computes the paper.

Read `cases` (golden cases through a backend) and `tolerances` (how near is near enough, and why);
`real_model` compares backends on a whole model, `record` is the list of files that passed on hardware.
"""
