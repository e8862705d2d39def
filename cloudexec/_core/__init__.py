"""The decisions, without I/O.

Nothing in this package has a clock, thread, socket or random number of its own: ``Machine.handle``
takes an event and the time, and returns commands. Events say what happened (``events``), commands
what to do (``commands``); both carry batches, because one object per task at each step would cost
more than the task. ``tasks`` and ``workers`` hold the state, ``scheduling`` says which queued task
goes to which worker, ``quarantine`` which tasks run apart because one of them may have killed a
worker, ``scaling`` how many workers to launch or stop, ``machine`` joins them. What always holds is
in ``invariants``, for tests.
"""
