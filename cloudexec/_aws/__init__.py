"""What the launchers and the commands for AWS share. Nothing here is imported by a worker.

``names`` and ``limits`` are pure; ``clients`` is the only module that makes connections, and
translates what the SDK raises; ``profile`` is what ``cloudexec up`` leaves for executors.
"""
