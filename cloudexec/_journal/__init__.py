"""What a program has finished, so that the same program run again need not do it again.

``keys`` gives each call a name that is the same in every run; ``packing`` lays results out;
``sqlite`` and ``bucket`` keep them, behind the one interface of ``store``; ``journal`` stands
between an executor and its store: it looks calls up when they are submitted, and has results
written, in batches on a thread of its own, before their futures are done.
"""
