"""Code that the launchers and the commands for AWS share. Workers import nothing from here.

``names`` and ``limits`` do no I/O. ``clients`` is the only module that connects to AWS, and it
translates the errors of the SDK. ``profile`` reads and writes the settings that ``cloudexec up``
leaves for executors.
"""
