"""All decisions of an executor, without I/O.

Nothing in this package has a clock, thread, socket or random number of its own: ``Machine.handle``
takes an event and the time, and returns commands. Events say what happened (``events``), commands
say what to do (``commands``). Both carry batches, because one object per task at each step would
cost more than the task. ``facts`` say what became of tasks, for the story that ``explain()`` tells.

Each rule has one place, and each piece of state one owner. A module calls only those before it:

- ``queue``: the open tasks, the queues that they wait in, and their states, which only it changes;
- ``workers``, ``quarantine``, ``pool``: the tasks and resources of a worker, the workers that are
  reserved for tasks which may have killed a worker, and all workers and launches;
- ``dispatch``: which task goes to which worker;
- ``losses``: what happens when an attempt, a worker or a launch is lost;
- ``ends``: when a worker is lost, by the ends of its connection and of its process;
- ``answers``: all other reports of workers about tasks;
- ``scaling``, ``closing``: how many workers are launched and retired, and how an executor ends;
- ``machine``: which module handles which event, and what is checked when a deadline passes.
"""
