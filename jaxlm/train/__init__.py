"""Training: a pure step, and a loop that survives being killed."""

from jaxlm.train.checkpoint import CheckpointError
from jaxlm.train.evaluation import RouterLoad
from jaxlm.train.loop import Diverged
from jaxlm.train.loop import train
from jaxlm.train.loop import TrainResult
from jaxlm.train.optimizer import OptimizerConfig
from jaxlm.train.signals import Interrupted
from jaxlm.train.step import Balancing
from jaxlm.train.step import eval_step
from jaxlm.train.step import init_state
from jaxlm.train.step import train_step
from jaxlm.train.step import TrainConfig
from jaxlm.train.step import TrainState
