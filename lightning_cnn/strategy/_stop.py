"""SIGTERM: whichever rank gets it, all stop at the same place, rank 0 saves, and the job ends in good order.

Lightning's own handler broadcasts on the default group from inside the signal handler, wherever the main thread is just then (two ranks
in different collectives wait for each other for ever), and nothing is saved. Here a handler only tells the team; where training can stop
is for the strategy to say.
"""

import logging
import signal
import threading
from pathlib import Path
from typing import NoReturn

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lightning_cnn.strategy._team import Team

log = logging.getLogger(__name__)
FILE = "sigterm.ckpt"


def listen(team: Team) -> None:
    """From now on SIGTERM asks the whole team to stop. Lightning puts the old handlers back when its run ends."""

    def ask(number: int, frame: object) -> None:
        threading.Thread(target=team.stop, daemon=True).start()  # not here: the interrupted main thread may hold the team's lock

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, ask)


def answered() -> bool:
    """Whether a callback answers SIGTERM by itself."""
    return isinstance(getattr(signal.getsignal(signal.SIGTERM), "__self__", None), Callback)


def save_and_stop(trainer: Trainer) -> NoReturn:
    """All ranks are here: save beside the other checkpoints, unless the Trainer is not to write any, and leave training."""
    result = "nothing was saved, because the Trainer has enable_checkpointing=False"
    if trainer.checkpoint_callbacks:
        path = Path(getattr(trainer.checkpoint_callback, "dirpath", None) or trainer.default_root_dir, FILE)
        trainer.save_checkpoint(path, weights_only=False)
        result = f"saved {path}, resume from it"
    if trainer.is_global_zero:
        log.warning("SIGTERM: stopped in epoch %d, step %d; %s", trainer.current_epoch, trainer.global_step, result)
    raise SIGTERMException
