import pytest

from opt_deus_jax.config import TrainingConfig
from opt_deus_jax.errors import UserError
from opt_deus_jax.training.settings import resolve_steps


def test_epochs_become_steps():
    training = TrainingConfig(steps=0, epochs=3, batch_size=8)
    assert resolve_steps(training, 21).steps == 7
    assert resolve_steps(TrainingConfig(steps=5), 1).steps == 5


@pytest.mark.parametrize(("steps", "epochs"), [(0, 0), (3, 2), (-1, 2), (2, -1)])
def test_steps_or_epochs(steps: int, epochs: int):
    with pytest.raises(UserError, match=f"training.epochs={epochs} with training.steps={steps}"):
        resolve_steps(TrainingConfig(steps=steps, epochs=epochs), 21)
