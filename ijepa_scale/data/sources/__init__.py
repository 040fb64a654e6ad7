"""What a source is, and its images by index: a folder, a table of paths, tars, Parquet, a data set of the Hub.

inspection.py tells the kind of a source and lists its files, with folders.py, contents.py, tables.py and columns.py for
what lies in them. splits.py opens the splits of each kind: tars.py indexes tars, clones.py and copies.py take Parquet
and Hub data to the cache. shards.py and remote.py open single files, here or on a server, for streams too.
"""
