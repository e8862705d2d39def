"""Launchers: each turns "n more workers" into a request to a platform.

``base`` has what an executor asks of a launcher, and ``local`` answers that by itself. All other
launchers derive from ``platform_launcher``, where a ``fleet`` answers for them. It needs no more of
a ``platform`` than five requests. ``batch`` is such a launcher, and ``registry`` finds those of
other packages.
"""
