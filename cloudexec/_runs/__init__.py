"""``cloudexec run``: a program on one machine in AWS, which outlives the client that started it.

``plan`` is what a run is, ``files`` what is sent along, ``bucket`` where that lies. A ``Place``
(``places``) has the machine; ``runs`` is the client's side, ``inside`` the program on the machine,
and ``run`` the interface for programs.

Another place is a file like ``on_batch``, ``on_ec2`` and ``on_fargate``, and a line in ``places``.
Where its machines can be told as jobs, ``job_place`` finds, prices and ends them. A place that has
no time limits and no further attempts leaves these to the machine (``succession``), and what it
forgets is in the bucket (``known``).

A run has a prefix of its own in the profile's bucket:

    cloudexec/runs/<name>/run.json       what is to be run
    cloudexec/runs/<name>/files.tar.gz   the files that were sent
    cloudexec/runs/<name>/variables-<start>.json  variables of the environment, until the end
    cloudexec/runs/<name>/job-<start>.json        which job runs the program, which ones did so
        before, and what those have cost that are forgotten soon
    cloudexec/runs/<name>/stop-<start>.json       why there is to be no further attempt
    cloudexec/runs/<name>/started-<start>.json    when the first attempt began
    cloudexec/runs/<name>/outputs.json   names and digests of the files that came back so far
    cloudexec/runs/<name>/outputs/...    these files, at names that begin with their digests
    cloudexec/runs/<name>/result.json    how the program ended
    cloudexec/runs/<name>/journal/...    the journal of executors in it, if they keep one there

A run that is started again under its name, with ``--resume``, is another start with an id of its
own: what belongs to one start names it.

AWS may start two jobs for one request, if its answer was lost and its list of jobs is late. The
first one that ``job-<start>.json`` names runs the program, whether the client or the machine has
written it. The client asks for that job by its id, and needs no list.

The bucket's lifecycle rule deletes objects one by one, days after each was written. The machine
writes anew what is needed longer, and a start deletes what is left of an earlier run of its name.

Whether the machine waits, runs or has ended is asked of its place, so that nothing has to be
written when a client dies.
"""
