"""Launchers: each turns "one more worker" into a request to a platform."""
