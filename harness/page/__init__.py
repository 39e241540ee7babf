"""The report of a run as a page: one HTML file that needs neither network nor other files.

Reading order: `kinds`, how matrices are grouped; `tally`, sums and means of a record; `figures`, the plots;
`page`, which puts both into template.html.
"""
