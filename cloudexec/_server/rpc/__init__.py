"""The methods that workers call, over gRPC or over a plain connection.

``servicer`` has a conversation with each worker: ``enrolment`` lets it in, by way of the ``gate``,
and ``session`` has what is on its way to it and turns what it says into events, ``results`` the
parts of large results. ``transfers`` has the methods that carry blobs. ``calls`` is what they have
in common, ``inspection`` parses what a proven worker sends.
"""
