"""The journal: a record of finished calls, so that a program that is run again skips these calls.

``keys`` computes for each call a key that is the same in every run. The key depends on the code,
which ``program``, ``sources`` and ``distributions`` digest; ``arrivals`` notices modules that
appear while the program runs, and ``changes`` says in a message what differs from an earlier run.
``packing`` turns results into bytes. ``sqlite`` (a file) and ``bucket`` (S3) keep these bytes
behind the interface in ``store``; ``lock`` and ``ownership`` protect the file. ``journal`` connects
an executor with its store: it looks a call up when the call is submitted, and a thread of its own
writes results in batches, in the case of a file before their futures finish.
"""
