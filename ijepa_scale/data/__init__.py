"""How an image gets from any source to a batch, file by file.

Read by index, the usual way:
    sources/inspection.py  what a source is: its kind and its files
    sources/splits.py      its splits, and a table of rows for each: images, or where they lie
    images.py              ImageSet: the encoded image of an index; another in the place of one that is bad
    mixture.py             several sources as one, by weight
Read front to back, with data.streaming:
    streams/opening.py     a source -> its shards
    streams/reading.py     a shard -> its encoded images, from any row on
    streams/shard_stream.py, dealing.py  shuffled streams without an end, one for each loader process
Then, either way:
    order.py               the position in the run -> which image, which random numbers
    transforms.py          RandomCrop: a random square of the image, (3, size, size) uint8
    decoding.py, jpeg.py   which decodes the image, a JPEG only as far down as the crop reaches
    collate.py             crops and the masks that the objective draws for them -> Batch, in loader processes
"""
