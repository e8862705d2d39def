"""The methods that workers call, over gRPC or over a plain Unix socket.

``servicer`` serves the long call ``Session``, in which a worker and the client exchange messages.
``enrolment`` lets a worker in after it has proved that it knows the executor's key; ``gate`` limits
how many peers may be enrolling at once. ``session`` then sends the core's commands to the worker
and turns its messages into events; ``results`` collects the parts of its large results.
``transfers`` serves the methods that carry blobs (large pieces of data). ``inspection`` parses
messages of enrolled workers, and ``calls`` holds what all methods have in common.
"""
