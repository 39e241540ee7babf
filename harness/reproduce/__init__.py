"""python -m harness.reproduce: the paper's tables and figures, measured on any model.

settings    what the command line chooses
tables      the rows of each table and figure
cells       one measured model each, kept in a file: an interrupted command loses at most one
peers       other people's packages, each in a process of its own
paper       the paper's own values (paper.json)
render      Markdown and CSV
plots       SVG
"""
