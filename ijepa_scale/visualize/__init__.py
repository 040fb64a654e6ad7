"""Arrays -> pictures and pages. None reads a run or a model.

masks, curves (losses and scores), comparison, neighbours: a PNG each. panels: curves of several runs, as a PNG or for a
page; page: sections of words, tables, charts and pictures -> one HTML file, by the template page.html.
"""
