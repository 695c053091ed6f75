import os
import signal

from opt_deus_jax.training.preemption import EXIT_STATUS, preemption_notice


def test_sigterm_is_noticed_and_only_inside():
    before = signal.getsignal(signal.SIGTERM)
    with preemption_notice() as is_preempted:
        assert not is_preempted(1)
        os.kill(os.getpid(), signal.SIGTERM)
        assert is_preempted(2)
        assert is_preempted(3)
    assert signal.getsignal(signal.SIGTERM) == before
    with preemption_notice() as is_preempted:
        assert not is_preempted(1)
    assert EXIT_STATUS == 143
