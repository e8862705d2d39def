"""The rules of the wire that hold for the client and its workers alike.

``channel`` has the limits and options of a connection and the framing of chunks. ``stream`` has
what makes a session outlive its connections: numbering, acknowledgement and what is sent again.
"""
