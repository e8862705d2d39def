"""The decisions, without I/O.

Nothing in this package has a clock, thread, socket or random number of its own: ``Machine.handle``
takes an event and the time, and returns commands. Events say what happened (``events``), commands
what to do (``commands``); both carry batches, because one object per task at each step would cost
more than the task.

Each rule has one place, and each piece of state one owner. Modules call only those before them:

- ``queue``: the open tasks, which queue they wait in, and their states, which only it changes;
- ``workers``, ``quarantine``, ``pool``: what a worker has, which workers are reserved for tasks
  that may have killed another, and who is there or about to come;
- ``dispatch``: which task goes to which worker;
- ``losses``: what happens when an attempt, a worker or a launch is lost;
- ``answers``: what workers say of tasks otherwise;
- ``scaling``, ``closing``: how many workers are launched and retired, and how all of it ends;
- ``machine``: who takes in which event, and what is looked at when a deadline passes.
"""
