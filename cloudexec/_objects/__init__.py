"""Large arguments and results, which are sent apart from the small pickles that refer to them.

A blob is one large piece of bytes that never changes. ``store`` keeps the client's blobs, each
content once, in the files that ``segments`` makes. ``places`` lets processes of one machine open
each other's blobs, ``transfer`` sends blobs over a connection in chunks, and ``link`` decides
whether these are compressed. ``s3`` sends blobs through a bucket. ``ref`` is the user's handle to a
value, and ``options`` holds the user's settings.
"""
