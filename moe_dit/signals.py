"""Being told to stop: SIGTERM (a launcher, a preemption) and SIGUSR1 (SLURM's --signal)."""

import signal


class StopRequest:
    """Notes the signals; the training loop asks. A second signal changes nothing: a save under way is finished."""

    SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

    def __init__(self):
        self.asked = False
        for number in self.SIGNALS:
            signal.signal(number, self._note)

    def _note(self, number, frame):
        self.asked = True
