"""Launchers: each turns the executor's request for more workers into requests to a platform.

``base`` defines the methods that an executor calls on a launcher, and ``local`` implements them on
its own. All other launchers derive from ``platform_launcher``, which passes the calls on to a
``fleet``. A fleet makes only five kinds of requests to its ``platform``. ``batch`` is such a
launcher, and ``registry`` finds the launchers of other packages.
"""
