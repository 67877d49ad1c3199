"""Forward, backward and step: DeepSpeed's ZeRO stages 0 to 3, and a plain twin without it.

Both hold fp32 weights and Adam's moments under the parameters' names, whatever the stage and world size, so a state
taken from one engine fits any other.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

Precision = Literal["fp32", "bf16"]
MOMENTS = ("exp_avg", "exp_avg_sq")


class Engine(Protocol):
    """What the training loop needs of an engine."""

    module: nn.Module
    rank: int
    world: int
    device: torch.device

    def __call__(self, *inputs: Any, **options: Any) -> Any: ...
    def evaluate(self, *inputs: Any, **options: Any) -> Any:
        """A forward pass without gradient, in evaluation mode."""

    def backward(self, loss: Tensor, share: Tensor) -> None:
        """Adds the gradient of sum(share * loss): loss [m] per sample, share [m] of the global batch, 0 for padding."""

    def step(self, learning_rate: float) -> None: ...
    def gradient_norm(self) -> float:
        """Norm of the last step's global gradient, before clipping."""

    def named_state(self, owned: bool, live: bool = False) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """weight, exp_avg and exp_avg_sq of each parameter in fp32, by name; the weight alone of a frozen one, and of
        a persistent buffer. All ranks iterate together.

        With ``owned`` a rank is given its own share of the names alone, so that no host needs all of them. With
        ``live`` tensors are the engine's own where they can be, on its device, good until the next step; without,
        copies on the CPU.
        """

    def load_moments(self, moments: dict[str, dict[str, Tensor]], steps: int) -> None:
        """Sets Adam's state; the weights are loaded into the module before the engine is made."""

    def sum(self, values: Tensor) -> Tensor:
        """The sum of a tensor over all ranks."""


class PlainEngine:
    """One process, plain torch: the oracle of the others and the baseline of their overhead."""

    rank, world = 0, 1

    def __init__(
        self,
        module: nn.Module,
        *,
        clip_norm: float | None = None,
        precision: Precision = "fp32",
        device: str = "cpu",
    ) -> None:
        self.device = torch.device(device)
        self.module = module.to(self.device).train()
        self.optimizer = _adam(self.module, self.device)
        self.clip_norm, self.precision = clip_norm, precision
        self._norm: Tensor | None = None

    def __call__(self, *inputs: Any, **options: Any) -> Any:
        with _autocast(self.device, self.precision):
            return self.module(*inputs, **options)

    def evaluate(self, *inputs: Any, **options: Any) -> Any:
        return _evaluate(self, self.module, inputs, options)

    def backward(self, loss: Tensor, share: Tensor) -> None:
        torch.autograd.backward((share * loss).sum())

    def step(self, learning_rate: float) -> None:
        self._norm = nn.utils.clip_grad_norm_(self.module.parameters(), self.clip_norm or float("inf"))
        _set_learning_rate(self.optimizer, learning_rate)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def gradient_norm(self) -> float:
        return float(self._norm) if self._norm is not None else float("nan")

    def named_state(self, owned: bool, live: bool = False) -> Iterator[tuple[str, dict[str, Tensor]]]:
        for name, parameter in self.module.named_parameters():
            yield name, _given(_plain_state(parameter, self.optimizer), live)
        for name, buffer in _buffers(self.module):
            yield name, _given({"weight": buffer.detach()}, live)

    def load_moments(self, moments: dict[str, dict[str, Tensor]], steps: int) -> None:
        _load_plain(self.module, self.optimizer, moments, steps)

    def sum(self, values: Tensor) -> Tensor:
        return values


class DeepSpeedEngine:
    """DeepSpeed over the process group that Ray Train (or torchrun) has made.

    Weights stay fp32 and bf16 is autocast, so gradients accumulate and reduce in fp32. Needs an initialised
    ``torch.distributed``.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        micro_batches: int,
        zero_stage: int,
        clip_norm: float | None = None,
        precision: Precision = "fp32",
        device: str = "cpu",
    ) -> None:
        deepspeed = import_deepspeed(device)
        deepspeed.init_distributed(
            dist_backend=torch.distributed.get_backend(),
            auto_mpi_discovery=False,
            verbose=False,
            dist_init_required=False,
        )
        self.device = torch.device(device)
        self.precision, self.zero_stage, self.micro_batches = precision, zero_stage, micro_batches
        module = module.to(self.device).train()
        config = {
            "train_micro_batch_size_per_gpu": 1,  # DeepSpeed only multiplies it; our micro batches carry weights
            "gradient_accumulation_steps": micro_batches,
            "gradient_clipping": clip_norm or 0.0,
            "zero_allow_untested_optimizer": True,
            "zero_optimization": {
                "stage": zero_stage,
                # the default buckets of 5e8 elements are GiB of buffers
                "reduce_bucket_size": 2**24,
                "allgather_bucket_size": 2**24,
                "stage3_prefetch_bucket_size": 2**24,
            },
            "steps_per_print": 2**31 - 1,
        }
        self.deepspeed, _, _, _ = deepspeed.initialize(
            model=module, optimizer=_adam(module, self.device), config=config, dist_init_required=False
        )
        self.module = module
        self.rank, self.world = torch.distributed.get_rank(), torch.distributed.get_world_size()

    def __call__(self, *inputs: Any, **options: Any) -> Any:
        with _autocast(self.device, self.precision):
            return self.deepspeed(*inputs, **options)

    def evaluate(self, *inputs: Any, **options: Any) -> Any:
        return _evaluate(self, self.deepspeed, inputs, options)

    def backward(self, loss: Tensor, share: Tensor) -> None:
        # DeepSpeed divides the loss by the micro batches and the gradient by the world size.
        self.deepspeed.backward((share * loss).sum() * (self.world * self.micro_batches))
        self._accumulate()

    def _accumulate(self) -> None:
        if not self.deepspeed.is_gradient_accumulation_boundary():
            self.deepspeed.step()  # counts the micro batch; the optimizer steps at the last one

    def step(self, learning_rate: float) -> None:
        if self.zero_stage == 0:  # DeepSpeed keeps no norm here; the gradients are whole on each rank
            gradients = [parameter.grad for parameter in self.module.parameters() if parameter.grad is not None]
            self._norm = nn.utils.get_total_norm(gradients)
        _set_learning_rate(self.deepspeed.optimizer, learning_rate)
        self.deepspeed.step()

    def gradient_norm(self) -> float:
        return float(self._norm if self.zero_stage == 0 else self.deepspeed.get_global_grad_norm())

    def named_state(self, owned: bool, live: bool = False) -> Iterator[tuple[str, dict[str, Tensor]]]:
        number = 0
        for number, (name, parameter) in enumerate(self.module.named_parameters(), start=1):
            state = self._state(parameter)
            if not owned or number % self.world == self.rank:
                yield name, _given({key: value.detach().float() for key, value in state.items()}, live)
        for following, (name, buffer) in enumerate(_buffers(self.module), start=number + 1):
            if not owned or following % self.world == self.rank:
                yield name, _given({"weight": buffer.detach()}, live)

    def _state(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        import deepspeed
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        if self.zero_stage == 0:
            return _plain_state(parameter, self.deepspeed.optimizer)
        if not parameter.requires_grad:  # not the optimizer's, so it does not know it
            with deepspeed.zero.GatheredParameters([parameter], enabled=self.zero_stage == 3):
                return {"weight": parameter.detach().clone()}
        moments = {key: safe_get_full_optimizer_state(parameter, key) for key in MOMENTS}
        return {"weight": safe_get_full_fp32_param(parameter), **moments}

    def load_moments(self, moments: dict[str, dict[str, Tensor]], steps: int) -> None:
        optimizer = self.deepspeed.optimizer
        if self.zero_stage == 0:
            _load_plain(self.module, optimizer, moments, steps)
            return
        # Adam makes its state at the first step: make it here, then fill it.
        partitions = (
            optimizer.fp32_partitioned_groups_flat
            if self.zero_stage == 3
            else optimizer.single_partition_of_fp32_groups
        )
        for partition in partitions:
            optimizer.optimizer.state[partition] = {
                "step": torch.tensor(float(steps), device=self._step_device()),
                **{key: torch.zeros_like(partition) for key in MOMENTS},
            }
        if self.zero_stage < 3:
            optimizer._lazy_init_hp_params_optimizer_state()
        for name, parameter in _trained(self.module):
            for key in MOMENTS:
                self._set_moment(parameter, key, moments[name][key].to(self.device))

    def _set_moment(self, parameter: nn.Parameter, key: str, value: Tensor) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        if self.zero_stage < 3:
            safe_set_full_optimizer_state(parameter, value, key)
            return
        size = -(-value.numel() // self.world)  # stage 3 pads a parameter to equal parts
        padded = nn.functional.pad(value.flatten(), (0, size * self.world - value.numel()))
        safe_set_local_optimizer_state(parameter, padded[self.rank * size : (self.rank + 1) * size], key)

    def _step_device(self) -> torch.device:
        return self.device if self.device.type == "cuda" else torch.device("cpu")

    def sum(self, values: Tensor) -> Tensor:
        total = values.to(self.device, copy=True)
        torch.distributed.all_reduce(total)
        return total.to(values.device)


@torch.no_grad()
def _evaluate(engine: Engine, module: nn.Module, inputs: tuple[Any, ...], options: dict[str, Any]) -> Any:
    module.eval()
    try:
        return engine(*inputs, **options)
    finally:
        module.train()


def import_deepspeed(device: str) -> Any:
    """DeepSpeed, ready for a device; takes seconds, the first time."""
    if not device.startswith("cuda"):
        os.environ["DS_ACCELERATOR"] = "cpu"  # read at import
    mlflow = sys.modules.setdefault("mlflow", None)  # type: ignore[arg-type]
    import deepspeed  # its autotuner would import MLflow, a second that a rank has no use for
    from deepspeed import ops

    if mlflow is None:
        del sys.modules["mlflow"]
    with _nothing_compiled():
        # ZeRO's first step imports it, and it decorates with torch.compile: two seconds for kernels that nobody calls.
        import deepspeed.runtime.zero.muon.muon_optimizer
    if not device.startswith("cuda"):
        ops.__compatible_ops__["deepspeed_shm_comm"] = False  # or it compiles C++ for minutes at first use
    return deepspeed


@contextmanager
def _nothing_compiled() -> Iterator[None]:
    """torch.compile leaves functions as they are, and torch's compiler is not imported."""
    before = os.environ.get("TORCHDYNAMO_DISABLE")
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["TORCHDYNAMO_DISABLE"]
        else:
            os.environ["TORCHDYNAMO_DISABLE"] = before


def _adam(module: nn.Module, device: torch.device) -> torch.optim.Adam:
    parameters = [parameter for _, parameter in _trained(module)]
    return torch.optim.Adam(parameters, lr=0.0, betas=(0.9, 0.999), eps=1e-8, fused=True)


def _autocast(device: torch.device, precision: Precision) -> torch.autocast:
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")


def emulation(precision: Precision, device: torch.device) -> str | None:
    """What to say where a device has no instructions for a precision: torch emulates it, slower than fp32."""
    if precision == "fp32":
        return None
    if device.type == "cuda":
        has, name = torch.cuda.is_bf16_supported(including_emulation=False), "GPU"
    else:
        found = torch.cpu.get_capabilities()
        has, name = any(found.get(one) for one in ("avx512_bf16", "amx_bf16", "bf16")), "CPU"  # the last is Arm's
    return None if has else f"parallel.precision: this {name} has no instructions for bf16; fp32 is faster on it"


def _set_learning_rate(optimizer: Any, learning_rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = learning_rate


def _trained(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]


def _buffers(module: nn.Module) -> list[tuple[str, Tensor]]:
    """Those that are state, such as a codebook."""
    persistent = module.state_dict().keys()
    return [(name, buffer) for name, buffer in module.named_buffers() if name in persistent]


def _plain_state(parameter: nn.Parameter, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    moments = {}
    if parameter.requires_grad:
        state = optimizer.state.get(parameter, {})
        moments = {key: state.get(key, torch.zeros_like(parameter)) for key in MOMENTS}
    return {key: value.detach().float() for key, value in {"weight": parameter, **moments}.items()}


def _given(state: dict[str, Tensor], live: bool) -> dict[str, Tensor]:
    return state if live else {key: value.cpu().clone() for key, value in state.items()}


def _load_plain(
    module: nn.Module, optimizer: torch.optim.Optimizer, moments: dict[str, dict[str, Tensor]], steps: int
) -> None:
    for name, parameter in _trained(module):
        optimizer.state[parameter] = {
            "step": torch.tensor(float(steps), device=parameter.device if parameter.is_cuda else "cpu"),
            **{key: moments[name][key].to(parameter.device, copy=True) for key in MOMENTS},
        }
