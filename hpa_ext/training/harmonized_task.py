"""A task of a training run that ends with harmonizing: what is remembered when it begins, and what is done then."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from hpa_ext.agreement import Agreement
from hpa_ext.calibration import calibrate
from hpa_ext.compromise import CompromiseConfig
from hpa_ext.compromise.gram_sources import GramSources
from hpa_ext.compromise.layer import refuse_sharded
from hpa_ext.gram import Gram
from hpa_ext.gram_diagonal import AnyGram
from hpa_ext.gram_reduction import reduce_grams
from hpa_ext.harmonizing import AnyReport, Config, harmonize_model
from hpa_ext.hpa.config import HPAConfig
from hpa_ext.models.linear import Linear
from hpa_ext.models.linears import find_linears
from hpa_ext.models.remembered import RememberedWeights
from hpa_ext.models.sharding import local, refuse_other_sharding, reshard
from hpa_ext.models.structure import layer_depth, unwrap, without_data_parallel
from hpa_ext.token_masks import TokenMask

from .grams_on_device import where_weights_are

Batches = Iterable[Any] | Callable[[], Iterable[Any]]


@dataclass(frozen=True)
class TaskSettings:
    """What a task is harmonized with; see `HarmonizeCallback` for the fields."""

    safety: Batches | Mapping[str, AnyGram]
    task: Batches
    config: Config
    modules: str | list[str] | None = None
    token_mask: TokenMask | None = "attended"
    model_old: nn.Module | None = None
    passes: int = 1
    progress: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.config, (HPAConfig, CompromiseConfig)):
            raise TypeError(f"config: expected an HPAConfig or a CompromiseConfig, got {type(self.config).__name__}")
        if isinstance(self.passes, bool) or not isinstance(self.passes, int) or self.passes < 1:
            raise ValueError(f"passes: expected an int of at least 1, got {self.passes!r}")
        if self.passes > 1 and self.takes_whole_grams:
            raise ValueError(f"passes: expected 1 with the compromise, which keeps all Grams, got {self.passes}")
        if self.model_old is not None and not isinstance(self.model_old, nn.Module):
            raise TypeError(f"model_old: expected an nn.Module, got {type(self.model_old).__name__}")
        if not isinstance(self.safety, Mapping):
            _check_batches("safety", self.safety)
        _check_batches("task", self.task)

    @property
    def takes_whole_grams(self) -> bool:
        """Whether the method needs more of a Gram than the diagonal of its inverse."""
        return isinstance(self.config, CompromiseConfig)


@dataclass(frozen=True)
class HarmonizedTask:
    """What is kept of the model from before a task.

    Attributes:
        model: the model that is tuned.
        names: the linears that the task can change.
        old: copies of their weights, or another model; None where the tuned model without its adapters is the old one.
        safety: the safety Grams, or the diagonals of their inverses, by name; a Gram file as it is where the method
            takes whole Grams.
        settings: what it is harmonized with.
    """

    model: weakref.ref[nn.Module]
    names: list[str]
    old: RememberedWeights | nn.Module | None
    safety: Mapping[str, AnyGram]
    settings: TaskSettings

    @classmethod
    def begin(
        cls,
        model: nn.Module,
        settings: TaskSettings,
        *,
        adapters_were_zero: bool | None = None,
        earlier: Mapping[str, Gram] | None = None,
    ) -> HarmonizedTask:
        """Remember what the task will change, and make the safety Grams. Every process must call this.

        Args:
            model: as it will be trained: prepared by accelerate, sharded, wrapped or plain.
            settings: see there.
            adapters_were_zero: for a task that goes on from a checkpoint, whether it began with LoRA whose B was zero
                on weights that are not trained. None: it begins here.
            earlier: Grams of earlier tasks that `end` will be called with: refused here if they do not fit.

        Raises:
            ValueError: no covered linear is trained; an adapter is no plain LoRA; the model is under FSDP1 or ZeRO-3;
                the task goes on, and what was before is not known; Grams that are given do not fit the linears.
            TypeError: they are not whole ones, and the method takes such.
        """
        refuse_other_sharding("model", model)
        reshard(model)
        processes = _all_processes(model)
        with processes.together():
            linears = _trained(find_linears(model, settings.modules))
            if adapters_were_zero is False and settings.model_old is None:
                raise ValueError(
                    "model_old: the training goes on from a checkpoint, so the weights before the task are no longer "
                    "in the model; give model_old, the model that the task began with"
                )
            if settings.takes_whole_grams:
                for name, linear in linears.items():
                    refuse_sharded(f"{name}: model", linear.base_weight())
                # Now, and not when all steps are done.
                _check_given({"safety": settings.safety, "earlier": earlier}, linears)
        names = list(linears)
        is_base = adapters_were_zero
        if is_base is None:
            is_base = processes.highest([not _acts_as_base(linears)]) == [0]
        if settings.model_old is not None:
            old, called, adapters = settings.model_old, settings.model_old, nullcontext()
        elif is_base:
            # Where the task begins they add nothing, and what PEFT and FSDP2 do to switch them off is not called for.
            old, called, adapters = None, model, _adapters_off(model) if adapters_were_zero else nullcontext()
        else:
            old, called, adapters = RememberedWeights.of(model, names), model, nullcontext()
        with adapters:
            safety = _grams(called, settings.safety, names, settings)
        return cls(weakref.ref(model), names, old, safety, settings)

    def end(
        self, model: nn.Module, earlier: Sequence[Mapping[str, Gram]] = ()
    ) -> tuple[AnyReport, Mapping[str, AnyGram]]:
        """Make the task Grams with the tuned model and harmonize it in place. Every process must call this.

        Args:
            model: the one that `begin` got, tuned.
            earlier: Grams of earlier tasks, for a method that takes them.

        Returns:
            The report, and the task's Grams: whole ones if the method takes such, then also of the decoder's other
            linears that `earlier` has.
        """
        settings = self.settings
        # Earlier tasks may have trained more linears than this one: their sum goes on for all of them.
        others = [name for name in find_linears(model) if any(name in grams for grams in earlier)]
        task = _grams(model, settings.task, list(dict.fromkeys([*self.names, *others])), settings)
        reshard(model)
        linears = find_linears(model, self.names)
        safety, used, *others = (
            where_weights_are(grams, linears, settings.config) for grams in (self.safety, task, *earlier)
        )
        old = unwrap(model) if self.old is None else self.old
        with _together_unless_sharded(model):
            report = harmonize_model(
                old, model, safety, used, settings.config,
                earlier=others, modules=self.names, progress=settings.progress,
            )  # fmt: skip
        return report, task


def _grams(
    model: nn.Module, batches: Batches | Mapping[str, AnyGram], names: list[str], settings: TaskSettings
) -> Mapping[str, AnyGram]:
    """What the method needs of the Grams of these linears, of all processes' batches."""
    if isinstance(batches, Mapping):
        missing = [name for name in names if name not in batches]
        if missing:
            raise ValueError(f"safety: no Gram of {missing[0]}, which is trained")
        if settings.takes_whole_grams:
            return batches
        return {name: batches[name] for name in names}
    found: dict[str, AnyGram] = {}
    for part in _parts(names, unwrap(model), settings.passes):
        with _random_numbers_kept(), _together_unless_sharded(model):
            again = batches() if callable(batches) else batches
            grams = calibrate(model, again, part, settings.token_mask, settings.progress)
        if settings.takes_whole_grams:
            if torch.distributed.is_available() and torch.distributed.is_initialized():
                grams.all_reduce_()
            return grams
        found.update(reduce_grams(grams, settings.config.damping, rescue=settings.config.rescue))
    return found


def _check_given(given: Mapping[str, Any], linears: dict[str, Linear]) -> None:
    """Refuse whole Grams by argument that are not there, not whole, empty, or of another width than these linears."""
    for argument, grams in given.items():
        if isinstance(grams, Mapping) and grams:
            missing = [name for name in linears if name not in grams]
            if missing:
                raise ValueError(f"{argument}: no Gram of {missing[0]}, which is trained")
            GramSources({argument: grams}).check({n: linear.base_weight().shape[1] for n, linear in linears.items()})


def _check_batches(argument: str, batches: object) -> None:
    if isinstance(batches, Iterator):
        raise TypeError(
            f"{argument}: expected batches that can be gone through again, or a function that returns them, "
            f"got an iterator ({type(batches).__name__})"
        )
    if not callable(batches) and (not isinstance(batches, Iterable) or isinstance(batches, (str, Tensor, Mapping))):
        raise TypeError(f"{argument}: expected an iterable of batches or a function, got {type(batches).__name__}")


def _all_processes(model: nn.Module) -> Agreement:
    """All processes of torch.distributed, whose Grams are added up; this one alone where there is none."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return Agreement()
    device = next((local(parameter).device for parameter in model.parameters()), torch.device("cpu"))
    if torch.distributed.get_backend() == "nccl" and device.type == "cpu":  # offloaded weights
        device = torch.device("cuda", torch.cuda.current_device())
    return Agreement.of_group(None, device)


@contextmanager
def _together_unless_sharded(model: nn.Module) -> Iterator[None]:
    """Within the context work is local, or that of a sharded model, which looks after its processes itself."""
    if not Agreement.of_model(model).is_alone:
        yield
        return
    with _all_processes(model).together():
        yield


def _trained(linears: dict[str, Linear]) -> dict[str, Linear]:
    """Those that training changes: with trainable weights, trained copies or LoRA."""
    found = {}
    for name, linear in linears.items():
        if linear.base.weight.requires_grad or linear.has_pending_adapters() or linear.original is not None:
            linear.refuse_unsupported()
            found[name] = linear
    if not found:
        raise ValueError(f"modules: none of the {len(linears)} linears that are covered is trained")
    return found


def _acts_as_base(linears: dict[str, Linear]) -> bool:
    """Whether the model is its base with adapters that add nothing yet, and the base stays what it is.

    Of sharded adapters, as far as this process holds them.
    """
    frozen = not any(linear.base.weight.requires_grad and linear.original is None for linear in linears.values())
    return frozen and not any(bool(local(b).any()) for linear in linears.values() for b in linear.pending_factors())


@contextmanager
def _adapters_off(model: nn.Module) -> Iterator[None]:
    """Within the context a PeftModel acts like its base."""
    plain = without_data_parallel(model)
    with plain.disable_adapter() if hasattr(plain, "disable_adapter") else nullcontext():
        yield


@contextmanager
def _random_numbers_kept() -> Iterator[None]:
    """Within the context random numbers are drawn that the training does not miss: it goes as it would without."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() and torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        yield


def _parts(names: list[str], model: nn.Module, count: int) -> list[list[str]]:
    """The names in so many parts, or fewer; linears of one layer stay together, because they share inputs."""
    layers: dict[float, list[str]] = {}
    for name in names:
        layers.setdefault(layer_depth(model, name), []).append(name)
    groups = list(layers.values())
    count = min(count, len(groups))
    bounds = [len(groups) * index // count for index in range(count + 1)]
    return [[name for group in groups[start:stop] for name in group] for start, stop in pairwise(bounds)]
