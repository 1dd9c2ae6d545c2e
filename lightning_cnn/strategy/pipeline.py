"""Pipeline parallelism: each process holds some layers, and micro-batches walk through the processes."""

import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_cnn.errors import ConfigurationError, UnsupportedLayerError, raise_all
from lightning_cnn.nn.stages import evaluating
from lightning_cnn.strategy._average import average
from lightning_cnn.strategy._cut import Chain
from lightning_cnn.strategy._divided import Divided
from lightning_cnn.strategy._doctor import Diagnosis, batch_norms
from lightning_cnn.strategy._owners import Owners, Scattered
from lightning_cnn.strategy._stages import SCHEDULES, Runner, micro_batches_problem, places
from lightning_cnn.strategy._step import Deliver, Reached, bare, loss_of, network_of, quiet

log = logging.getLogger(__name__)


class Pipeline(Scattered, Divided):
    """Cuts the network into stages of equal measured time, one or two a process, and streams `micro_batches` through them.

    The LightningModule stays as it is: its `training_step` runs with the network's answer in the place of the network, for each
    micro-batch on the process with the last stage (whose loss is differentiated) and once for the whole batch on every process (whose
    numbers are logged). Each process keeps weights, gradients and optimizer state of its own stages only; checkpoints hold the whole model.

    `data_parallel=n` makes n such pipelines, each with its share of the batch; gradients are averaged among those with the same stage.

    Source: Huang et al. 2019 (GPipe), arXiv:1811.06965; Narayanan et al. 2021 (1F1B, interleaved), arXiv:2104.04473; Qi et al. 2023
    (zero bubble), arXiv:2401.10241. Runs torch.distributed.pipelining.
    """

    def __init__(
        self,
        *,
        stages: Literal["auto"] | Sequence[str] = "auto",
        schedule: Literal["gpipe", "1f1b", "interleaved", "zb"] = "1f1b",
        micro_batches: int = 4,
        data_parallel: int = 1,
        batch_norm: Literal["refuse", "micro"] = "refuse",
        timeout_s: float = 1800.0,
        **kwargs: Any,
    ) -> None:
        raise_all(
            [f"schedule must be one of {tuple(SCHEDULES)}, got {schedule!r}"] * (schedule not in SCHEDULES)
            + [f"micro_batches must be at least 1, got {micro_batches}"] * (micro_batches < 1)
            + [f"data_parallel must be at least 1, got {data_parallel}"] * (data_parallel < 1)
            + [f"batch_norm must be 'refuse' or 'micro', got {batch_norm!r}"] * (batch_norm not in ("refuse", "micro"))
            + [f"stages must be 'auto' or names of layers, got {stages!r}"] * (isinstance(stages, str) and stages != "auto")
            + [f"timeout_s must be positive, got {timeout_s}"] * (timeout_s <= 0)
        )
        super().__init__(data_parallel=data_parallel, timeout_s=timeout_s, **kwargs)
        self.stages, self.schedule, self.micro_batches, self.batch_norm = stages, schedule, micro_batches, batch_norm
        self._network: nn.Module | None = None
        self._owners: Owners | None = None
        self._cuts: list[str] = []
        self._runners: dict[Any, Runner] = {}
        self._answer: Tensor | Exception | None = None
        self._batch: tuple[Any, Any, int] = ((), {}, 0)

    # -- before ---------------------------------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer) -> None:
        super().setup(trainer)
        if self.world_size > 1:
            self._network = network_of(trainer.lightning_module)
            self._network.forward = self._forward
            self._owners = Owners(trainer.lightning_module, self._place, self._copy)
            self.precision_plugin.clip_grad_by_norm = self._clip  # type: ignore[method-assign]

    def examine(self, trainer: Trainer, model: LightningModule) -> Diagnosis:
        found = super().examine(trainer, model)
        ranks, left = divmod(trainer.world_size, self.data_parallel)
        if left or (ranks == 1 and self.data_parallel > 1):
            found.problems.append(
                f"data_parallel={self.data_parallel} needs a multiple of {self.data_parallel} processes, two or more for each pipeline, and "
                f"the Trainer has {trainer.world_size}"
            )
        if left or ranks == 1:
            return found
        try:
            network_of(model)
        except UnsupportedLayerError as error:
            found.problems.append(str(error))
        if problem := micro_batches_problem(self.schedule, self.micro_batches, ranks):
            found.problems.append(problem)
        if self.stages != "auto" and len(self.stages) + 1 != (wanted := len(places(self.schedule, ranks))):
            found.problems.append(f"stages names {len(self.stages)} beginnings; {wanted} stages need {wanted - 1}")
        if getattr(trainer.precision_plugin, "scaler", None) is not None:
            found.problems.append(
                "precision='16-mixed' scales the loss, which the schedule has differentiated before; use 'bf16-mixed'"
            )
        if trainer.state.fn in (TrainerFn.FITTING, None):
            found.problems.extend(self._training_problems(model))
        return found

    def _training_problems(self, model: LightningModule) -> list[str]:
        problems = []
        if not model.automatic_optimization:
            problems.append("automatic_optimization=False: the schedule differentiates the loss itself; use automatic optimisation")
        if (norms := batch_norms(model)) and self.batch_norm == "refuse" and self.micro_batches > 1:
            problems.append(
                f"BatchNorm ({norms[0]}, ...) would count one micro-batch instead of the batch, so training would differ from one process; "
                "use GroupNorm, or accept that with batch_norm='micro' (as GPipe did)"
            )
        return problems

    # -- the network's place in the LightningModule -----------------------------------------------------------------------------------

    def _forward(self, picture: Tensor) -> Any:
        """Stands where the network's forward was: gives the answer at hand, or has all processes find it together."""
        if isinstance(self._answer, Reached):
            self._answer.picture = picture
            raise self._answer
        if isinstance(self._answer, UnsupportedLayerError):
            raise self._answer
        if self._answer is not None:
            answer, self._answer = (
                self._answer,
                UnsupportedLayerError(
                    "training_step calls the network more than once, and a pipeline can pass once a step; call it once on all pictures."
                ),
            )
            return answer
        self.check_same_batch(picture)
        with torch.no_grad():
            return self._runner(picture, None).evaluate(picture)

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        if self._network is None:
            return super().training_step(*args, **kwargs)
        self.check_same_batch((args, kwargs))
        picture = self._captured(args, kwargs)
        runner = self._runner(picture, self._loss)
        self._batch = args, kwargs, len(picture)
        trained = [p for p in self._all_owners.mine() if p.requires_grad]
        before = [p.grad for p in trained]
        for p in trained:
            p.grad = None
        answer, total = runner.train(picture)
        gradients = [p.grad for p in trained]
        for p, gradient in zip(trained, before, strict=True):
            p.grad = gradient
        with self._answering(answer):
            output = super().training_step(*args, **kwargs)
        return self._delivering(output, total, gradients, trained)

    def _captured(self, args: Any, kwargs: Any) -> Tensor:
        """The pictures as the network gets them: the step is run until it calls the network."""
        try:
            with quiet(self._module), torch.no_grad(), self._answering(Reached()), self.precision_plugin.train_step_context():
                self._module.training_step(*args, **kwargs)
        except Reached as reached:
            return reached.picture
        raise UnsupportedLayerError(f"training_step does not call {type(self._network).__name__}, so there is nothing to pipeline.")

    def _loss(self, answer: Tensor, rows: Tensor) -> Tensor:
        """The share in the batch's loss of the micro-batch that consists of these rows, some of which may be padding."""
        args, kwargs, count = self._batch
        rows = rows[rows < count]
        if not len(rows):
            return answer.sum() * 0

        def part(tensor: Tensor) -> Tensor:
            return tensor[rows] if tensor.dim() and len(tensor) == count else tensor

        args, kwargs = apply_to_collection(args, Tensor, part), apply_to_collection(kwargs, Tensor, part)
        with quiet(self._module), self._answering(answer[: len(rows)]), self.precision_plugin.train_step_context():
            output = self._module.training_step(*args, **kwargs)
        return loss_of(output) * (len(rows) / count)

    def _delivering(self, output: Any, total: float, gradients: list, trained: list) -> Any:
        """The step's output with a loss whose backward pass delivers the gradients that the schedule has found."""
        loss = loss_of(output)
        tolerance = 1e-6 if loss.dtype == torch.float64 else 2e-2
        if abs(float(loss) - total) > tolerance * max(1.0, abs(total)):
            raise ConfigurationError(
                f"the loss of the batch ({float(loss):.6g}) is not the mean of those of its micro-batches ({total:.6g}). A pipeline needs a "
                "loss that is a mean over samples and draws no random numbers outside the network."
            )
        anchor = torch.zeros((), device=self.root_device, requires_grad=True)
        delivered = Deliver.apply(loss, gradients, anchor, *trained)
        return delivered if isinstance(output, Tensor) else {**output, "loss": delivered}

    @contextmanager
    def _answering(self, answer: Any) -> Iterator[None]:
        self._answer = answer
        try:
            yield
        finally:
            self._answer = None

    # -- cutting ----------------------------------------------------------------------------------------------------------------------

    def _runner(self, picture: Tensor, loss: Callable | None) -> Runner:
        network = self._network
        assert network is not None
        key = (tuple(picture.shape), picture.dtype, network.training, loss is None)
        if key not in self._runners:
            chain = Chain.of(bare(network))
            stages = self._stages(chain, picture)
            context = self.precision_plugin.forward_context
            with evaluating(network):  # a trial must not count in BatchNorm
                runner = Runner(stages, picture, self.schedule, self.micro_batches, self.root_device, context, loss, self._copy)
            self._runners[key] = runner
        return self._runners[key]

    def _stages(self, chain: Chain, picture: Tensor) -> list[nn.Module]:
        owners = places(self.schedule, self._copy_size)
        if not self._cuts:
            self._cuts = self._choose(chain, picture, len(owners))
        ends = [None, *self._cuts, None]
        stages: list[nn.Module] = [chain.stage(a, b) for a, b in itertools.pairwise(ends)]
        if not self._all_owners:
            self._all_owners.divide(stages, owners, self.optimizers)
        return stages

    def _choose(self, chain: Chain, picture: Tensor, count: int) -> list[str]:
        if self.stages != "auto":
            return chain.before(self.stages)
        micro = picture[: -(-len(picture) // self.micro_batches)]
        with self.precision_plugin.forward_context():
            found: Any = self.broadcast(chain.balanced(micro, count) if self.is_global_zero else None)
        cuts, seconds = found
        log.info("Pipeline: cut after %s; forward ms %s", ", ".join(cuts), [round(1000 * s, 2) for s in seconds])
        return cuts

    # -- the whole model ----------------------------------------------------------------------------------------------------------------

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The whole model on rank 0; elsewhere this process's part, which Lightning does not write."""
        state = super().lightning_module_state_dict()
        if self._owners and self.global_rank == self._place:  # the first copy
            self._owners.collect(state)
        return state

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        state = super().optimizer_state(optimizer)
        return state if self._owners is None else self._owners.collect_optimizer(state)

    def post_backward(self, closure_loss: Tensor) -> None:
        """Average the gradients of the copies (and what BatchNorm has counted in them) once all batches of a step are in."""
        if self.data_parallel > 1 and not self._module.trainer.fit_loop._should_accumulate():
            gradients = [p.grad for p in self._all_owners.mine() if p.grad is not None]
            average([*gradients, *self._all_owners.my_statistics()], self._peers)

    def _unite(self) -> None:
        """The whole model on every rank again, for whoever uses it after the Trainer."""
        if self._owners is not None:
            self._owners.unite()
        self._runners.clear()

    def teardown(self) -> None:
        if self._network is not None:
            self._network.__dict__.pop("forward", None)
            self.precision_plugin.__dict__.pop("clip_grad_by_norm", None)
            self._network = None
        super().teardown()

    def _clip(self, optimizer: Optimizer, clip_val: float) -> None:
        """By the norm of the whole model's gradient, not of this process's part."""
        parameters = [p for p in self.precision_plugin.main_params(optimizer) if p.grad is not None]
        norm = (
            nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]).double()
            if parameters
            else torch.zeros((), dtype=torch.float64)
        )
        square = norm.to(self.root_device).square()
        dist.all_reduce(square, group=self._copy)
        nn.utils.clip_grads_with_norm_(parameters, clip_val, square.sqrt())

    @property
    def _all_owners(self) -> Owners:
        assert self._owners is not None
        return self._owners

    @property
    def _module(self) -> LightningModule:
        assert self.lightning_module is not None
        return self.lightning_module
