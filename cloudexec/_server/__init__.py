"""The client's side of the wire, on one thread with an event loop.

    user threads                     loop thread ("cloudexec")                   other threads
    ------------                     -------------------------                   -------------
    submit() -> inbox  --wake-->     engine: event -> machine -> commands
    Future.cancel()                    |            ^
                                       v            |
                                     rpc <==== gRPC ==> workers
                                       |
    Future.result() <---- state -------+----> callbacks: Future.add_done_callback
                                       +----> output: what tasks print
                                       +----> large results are unpickled

Which rule lives where:

- ``portal`` owns the thread and is the only crossing. ``driver`` puts the parts together, starts
  and ends them, and takes in what users submit.
- ``engine`` reads the clock, tells the core what happened, and has its commands carried out:
  ``futures`` those about tasks, ``launches`` those about workers to come, ``workers`` those about
  workers that are there. What happens when a worker connects, is cut off or goes is in ``workers``.
- ``dependencies`` holds tasks that wait for futures, ``keeper`` results that stay on workers,
  ``bucket`` what goes through S3, ``takeover`` what an earlier process has left.
- ``story`` notes what is unusual, and ``explaining`` tells it to the user.
- ``listener`` opens the server: ``plain`` for workers that this process has started on its own
  machine, ``network``, which is gRPC, for all others. ``rpc`` turns their messages into events and
  commands into messages; of the executor it knows what ``service`` has.

Each part is given what it needs and none of them knows the driver; no module here imports itself by
a detour. Everything mutable belongs to the loop thread, except the inbox (a deque, whose append and
popleft are atomic) and the futures (each with its own lock).
"""
