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

- ``portal`` owns the loop's thread, and other threads reach the loop only through it. ``driver``
  creates the other parts, starts and ends them, and takes the tasks that users submit.
- ``engine`` reads the clock, tells the core (the state machine in ``_core``) what happened, and
  passes the core's commands on: commands about tasks to ``futures``, about workers that have not
  connected yet to ``launches``, about connected workers to ``workers``. ``workers`` also handles a
  worker that connects, is cut off or ends.
- ``dependencies`` holds back tasks that wait for futures. ``keeper`` looks after results that stay
  on workers, ``bucket`` sends large blobs through S3, and ``takeover`` takes over the workers of an
  earlier process that was killed.
- ``story`` notes unusual events of tasks and workers, and ``explaining`` reports them to the user.
- ``listener`` opens the server: ``plain`` serves workers that this process has started on its own
  machine, and ``network`` serves all others by gRPC. ``rpc`` turns the workers' messages into
  events for the core, and its commands into messages. It reaches the executor through ``service``
  only.

Each part is given the other parts that it needs, and none of them knows the driver; imports form no
circle. All mutable state belongs to the loop thread, except the inbox (a deque, whose append and
popleft are atomic) and the futures (each with its own lock).
"""
