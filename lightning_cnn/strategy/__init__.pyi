from ._doctor import diagnose as diagnose
from .async_sgd import AsyncSGD as AsyncSGD
from .delayed_averaging import DelayedAveraging as DelayedAveraging
from .elastic import Elastic as Elastic
from .local_sgd import LocalSGD as LocalSGD
from .sync_ddp import SyncDDP as SyncDDP
