"""One run: all that a process holds of it, what it writes, and what can befall it.

setup.py makes a Run, resume.py finds the checkpoint that it goes on from. While train.py trains, late_records.py and
records.py log, progress.py shows, health.py measures, saving.py keeps, data_wait.py and incidents.py speak up.
report.py closes. folder.py says where all of it lies. history.py reads it again, verdict.py and numbers.py make words
of it, and page.py one HTML file.
"""
