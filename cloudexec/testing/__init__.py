"""Tools for testing what uses or extends cloudexec: workers and launchers without processes.

``ManualLauncher`` starts nothing and lets a test say what happened; ``SimulatedWorker`` speaks the
real protocol to a real executor and answers tasks without running them.
"""

from cloudexec.testing._manual import ManualLaunch, ManualLauncher
from cloudexec.testing._simulated import Answer, SimulatedWorker, answer_none

__all__ = ["Answer", "ManualLaunch", "ManualLauncher", "SimulatedWorker", "answer_none"]
