"""The one PEFT tuner and layer behind every adapter of weft, and their registration with PEFT."""

from __future__ import annotations

import functools
import importlib
import itertools
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_adapters_to_merge, check_target_module_exists
from peft.utils import register_peft_method
from peft.utils.quantization_utils import QuantizationBackend, get_quantization_kwargs
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from weft.adapters import _sketch
from weft.adapters._config import AdapterConfig, peft_type, tasks_of
from weft.adapters._delta import Blocks, Delta, Experts, Site, leaves, named_leaves
from weft.adapters._kinds import Embedding, Linear, QuantisedLinear, TransposedLinear, kind_of, qkv_sizes
from weft.adapters._quantised import (
    backend_of,
    check_merge,
    dequantised,
    is_plain,
    keeps_dense,
    requantised,
    shape_of,
    times,
)
from weft.adapters._targets import check_targets, tied_weights
from weft.errors import UsageError
from weft.linear._structured import Structured
from weft.registry import card, cards, class_name

logger = logging.getLogger("weft")
FOLDABLE = (nn.Linear, Conv1D, nn.Conv1d, nn.Conv2d, nn.Conv3d)


class _Adapted(BaseTunerLayer):
    """What a wrapped module and a wrapped expert parameter have in common: deltas by adapter, merging, switching."""

    slug: str
    base_layer: nn.Module
    backend: QuantizationBackend | None = None  # PEFT's, where the weight is quantised
    other_param_names = ("controllers",)
    takes_bias = True  # whether the module's result could carry one

    def _init_adapted(self, base_layer: nn.Module, module_name: str) -> None:
        self.base_layer = base_layer
        self.module_name = module_name
        self.controllers: dict[str, Any] = {}
        self.merged_adapters: list[str] = []
        self.merge_error = 0.0  # ‖what was written − (W + ΣΔW)‖ / ‖W + ΣΔW‖
        self.lost_update = 0.0  # the same beside ‖ΣΔW‖
        self._disable_adapters = False
        self._active_adapter: str | list[str] = []
        self._originals: tuple[Any, ...] | None = None  # before merging: weight and bias, or a quantised layer whole
        self._awaited: dict[str, dict[str, tuple[int, int]]] = {}  # by adapter: tensors that a file is to provide
        setattr(self, self.adapter_layer_names[0], nn.ModuleDict())

    @property
    def deltas(self) -> nn.ModuleDict:
        """The adapters on this weight, by name."""
        return getattr(self, self.adapter_layer_names[0])

    def entry(self, adapter: str) -> Any:
        """One adapter: a Delta, or Several."""
        return self.deltas[adapter]

    def original(self) -> nn.Parameter:
        """The wrapped parameter."""
        raise NotImplementedError(f"{type(self).__name__} must define original()")

    @property
    def device(self) -> torch.device:
        return self.original().device

    def unmerged(self) -> tuple[Tensor, Tensor | None]:
        """Weight (in its own layout, dense) and bias as they were before merging, in the model's dtype."""
        if self._originals is not None:
            return self._originals  # type: ignore[return-value]
        bias = self.bias_parameter()
        return self.original().data, None if bias is None else bias.data

    def sketch(self) -> list[float]:
        """A few numbers of the unmerged weight, for a saved adapter to know it by."""
        return _sketch.sketch(self._sketched(), quantised=self.backend is not None)

    def _sketched(self) -> Tensor:
        return self.unmerged()[0]

    def to_native(self, matrix: Tensor) -> Tensor:
        """ΔW (… out × in) in the parameter's own layout."""
        raise NotImplementedError(f"{type(self).__name__} must define to_native()")

    def build(self, config: AdapterConfig, model_config: Any) -> nn.Module:
        """The delta (or deltas) for one adapter on this weight."""
        raise NotImplementedError(f"{type(self).__name__} must define build()")

    def update_layer(self, adapter_name: str, config: AdapterConfig, model_config: Any) -> None:
        if self.merged:
            raise UsageError(f"{self.module_name} is merged; call unmerge_adapter() before adding an adapter")
        saved = (config.base_sketch or {}).get(self.module_name)
        if saved is not None:
            _sketch.check(self.module_name, self._sketched(), saved, self.backend is not None)
        delta = self.build(config, model_config)
        if config.is_stored:
            _await_tensors(delta)
        self.deltas[adapter_name] = delta
        if not self.takes_bias and self.moves_bias(adapter_name):
            del self.deltas[adapter_name]
            raise UsageError(f"{self.slug} moves biases, and {self.module_name} has no place for one")
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def await_tensors(self, adapter: str) -> None:
        """Remember the tensors that a file is to provide as they are now."""
        tensors = self.deltas[adapter].state_dict(keep_vars=True)
        self._awaited[adapter] = {name: (id(t), t._version) for name, t in tensors.items()}

    def _check_arrived(self, adapter: str) -> None:
        """Raise where a tensor never came: transformers' own `load_adapter` only warns of it. Asked once."""
        for name, t in self.deltas[adapter].state_dict(keep_vars=True).items():
            untouched = (id(t), t._version) == self._awaited[adapter].get(name)
            if t.isnan().any() if t.is_floating_point() and t.numel() else untouched:
                raise UsageError(f"the adapter's file misses {self.module_name}.{name}, or holds no number there")
        del self._awaited[adapter]

    def _active(self) -> list[Any]:
        if self._awaited and not torch.compiler.is_compiling():
            for adapter in [name for name in self.active_adapters if name in self._awaited]:
                self._check_arrived(adapter)
        return [self.deltas[name] for name in self.active_adapters if name in self.deltas]

    def _watch(self, deltas: Sequence[nn.Module]) -> None:
        if getattr(self, "training", False) and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            for entry in deltas:
                for delta in leaves(entry):
                    if delta.controller is not None:
                        delta.controller.watch(delta)

    # --- merging ------------------------------------------------------------------------------------------------

    def get_delta_weight(self, adapter: str) -> Tensor:
        """ΔW of evaluation in the parameter's layout, float32 or wider; PEFT's LoRA conversion calls it.

        Whether the model happens to be training must not matter: a drawn rank or gate is nothing to merge.
        """
        if adapter in self._awaited:
            self._check_arrived(adapter)
        entry = self.entry(adapter)
        training = entry.training
        try:
            with torch.no_grad():
                return self.to_native(entry.eval().delta())
        finally:
            entry.train(training)

    def bias_parameter(self) -> nn.Parameter | None:
        return getattr(self.get_base_layer(), "bias", None)

    def moves_bias(self, adapter: str) -> bool:
        return adapter in self.deltas and any(d.bias_delta() is not None for d in leaves(self.deltas[adapter]))

    def check_merge(self, adapters: Sequence[str]) -> None:
        """Raise UsageError where the weight cannot be written, or lacks a bias that an adapter moves."""
        if self.backend is not None:
            check_merge(self.get_base_layer(), self.backend, self.module_name)
        if self.bias_parameter() is None and any(map(self.moves_bias, adapters)):
            raise UsageError(f"{self.module_name} has no bias in the model's config, so Δbias cannot be merged into it")

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Fold the adapters into the weight: one rounding of float32 W + ΣΔW, every ΔW from the original W."""
        names = [n for n in check_adapters_to_merge(self, adapter_names) if n in self.deltas]
        if not names:
            return
        self.check_merge(names)
        w0, b0 = (None if t is None else t.to(self.device) for t in self.unmerged())
        assert w0 is not None
        wide = torch.promote_types(w0.dtype, torch.float32)
        total, shift = w0.to(wide), None
        for name in [*self.merged_adapters, *names]:
            total = total + self.get_delta_weight(name).to(wide)
            moved = self.entry(name).bias_delta()
            if moved is not None:
                shift = moved if shift is None else shift + moved
        merged = total.to(w0.dtype)
        if safe_merge and not torch.isfinite(merged).all():
            raise ValueError(f"merging would write NaN or infinity into {self.module_name}; adapter {names} is broken")
        bias = None if shift is None or b0 is None else (b0.to(wide) + shift.to(wide)).to(b0.dtype)
        error = (self.write(merged, bias).to(wide) - total).norm()
        self.merge_error = float(error / total.norm().clamp_min(1e-30))
        if self.backend is not None:
            self.lost_update = float(error / (total - w0).norm().clamp_min(1e-30))
        self.merged_adapters += names

    def write(self, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Put a weight, and a bias where one moved, in place of the unmerged; returns the weight as it now reads."""
        own = self.bias_parameter()
        if self._originals is None:
            self._originals = self.unmerged()
        self.original().data = weight
        if bias is not None and own is not None:
            own.data = bias
        return weight

    def unmerge(self) -> None:
        """Put the original bits back."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        self._restore()
        self._originals = None
        self.merged_adapters.clear()

    def _restore(self) -> None:
        weight, bias = self.unmerged()
        own = self.bias_parameter()
        self.original().data = weight.to(self.device)
        if own is not None and bias is not None:
            own.data = bias.to(own.device)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return True

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # tensors keep their declared dtype, so only the device follows the weight
        device = device or self.device
        if adapter_name not in self.deltas or device.type == "meta":
            return
        if not any(p.is_meta for p in self.deltas[adapter_name].parameters()):
            self.deltas[adapter_name].to(device)

    def _refuse_mixed_batches(self, kwargs: dict[str, Any]) -> None:
        if kwargs.pop("adapter_names", None) is not None:
            raise ValueError(f"{self.slug} does not serve batches that mix adapters; run one batch an adapter")


class AdaptedModule(nn.Module, _Adapted):
    """A Linear, Conv1D, convolution or Embedding with its adapters."""

    def __init__(self, base_layer: nn.Module, module_name: str, requantise: Callable[[], Any] | None = None) -> None:
        super().__init__()
        self.kind = kind_of(base_layer, module_name)
        self.backend = backend_of(base_layer, requantise)
        self._keeps_dense: bool | None = None if self.backend is not None else False  # seen in the first training step
        self.takes_bias = not isinstance(self.kind, Embedding)
        self._init_adapted(base_layer, module_name)

    def original(self) -> nn.Parameter:
        return self.get_base_layer().weight  # type: ignore[return-value]

    @property
    def device(self) -> torch.device:
        if self.backend is None:
            return super().device
        layer = self.get_base_layer()
        return next(itertools.chain(layer.parameters(), layer.buffers())).device

    def to_native(self, matrix: Tensor) -> Tensor:
        return self.kind.native(matrix)

    def unmerged(self) -> tuple[Tensor, Tensor | None]:
        if self.backend is None:
            return super().unmerged()
        layer = self._unmerged_layer()
        return dequantised(layer, self.backend, self.module_name), self._unmerged_bias()

    def _unmerged_bias(self, rows: slice = slice(None)) -> Tensor | None:
        bias = super().unmerged()[1] if self.backend is None else getattr(self._unmerged_layer(), "bias", None)
        return None if bias is None else bias[rows]

    def _unmerged_layer(self) -> nn.Module:
        return self.get_base_layer() if self._originals is None else self._originals[0]

    def _sketched(self) -> Tensor:
        try:
            return super()._sketched()
        except UsageError:  # the library gives no dense weight: the shape must do
            return torch.empty(shape_of(self._unmerged_layer()), device="meta")

    def write(self, weight: Tensor, bias: Tensor | None) -> Tensor:
        if self.backend is None:
            return super().write(weight, bias)
        if self._originals is None:
            self._originals = (self.get_base_layer(),)
        layer: Any = requantised(self._originals[0], self.backend, weight)
        if bias is not None:
            layer.bias.data = bias
        self._replace_base(layer)
        return dequantised(layer, self.backend, self.module_name)

    def _restore(self) -> None:
        if self.backend is None:
            return super()._restore()
        assert self._originals is not None
        self._replace_base(self._originals[0])

    def _replace_base(self, layer: nn.Module) -> None:
        holder: Any = self
        while hasattr(holder.base_layer, "base_layer"):
            holder = holder.base_layer
        holder.base_layer = layer

    def _rows(self, rows: slice) -> Tensor:
        """Rows of the unmerged W (out × in)."""
        return self.kind.matrix(self.unmerged()[0])[rows]

    def _matrix(self, rows: slice) -> Tensor:
        w = self._rows(rows)
        return w.to(torch.promote_types(w.dtype, torch.float32))

    def build(self, config: AdapterConfig, model_config: Any) -> nn.Module:
        if getattr(config, "dropout", 0) and isinstance(self.kind, Embedding):
            raise UsageError(f"{self.module_name} is an Embedding: its input are indices, so dropout must be 0")
        refused = card(self.slug).refuses.get(self.kind.name)
        if refused:
            raise UsageError(f"{self.slug} cannot adapt {self.module_name}, a {self.kind.name}: {refused}")
        shape = self.kind.matrix(self.original()).shape if self.backend is None else shape_of(self.get_base_layer())
        make = delta_class(self.slug)

        def site(i: int | None, rows: slice) -> Site:
            name = self.module_name if i is None else f"{self.module_name}#{i}"
            out = len(range(*rows.indices(shape[0])))
            return Site(
                name,
                self.kind,
                out,
                shape[1],
                lambda: self._matrix(rows),
                self.device,
                config.is_stored,
                _stored_rank(config, name),
                functools.partial(self._rows, rows),  # no closure: a copied model must read its own weight
                functools.partial(self._unmerged_bias, rows),
            )

        sizes = (
            qkv_sizes(self.module_name, shape[0], model_config)
            if config.split_qkv and type(self.kind) in (Linear, QuantisedLinear, TransposedLinear)
            else None
        )
        if sizes is None:
            return make(config, site(None, slice(None)))
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        return Blocks([make(config, site(i, slice(a, a + n))) for i, (a, n) in enumerate(zip(starts, sizes))])

    def _base_result(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """What the wrapped module makes of x; no dense copy of a quantised weight is kept for the gradient of x."""
        trains = self.backend is not None and x.requires_grad and torch.is_grad_enabled()
        if trains and self._keeps_dense is None and not torch.compiler.is_compiling():
            self._keeps_dense = keeps_dense(self.get_base_layer(), self.backend, self.module_name)  # type: ignore[arg-type]
        if not (trains and self._keeps_dense):
            return self.base_layer(x, *args, **kwargs)
        layer: Any = self.get_base_layer()
        y = times(x, lambda: dequantised(layer, self.backend, self.module_name))  # type: ignore[arg-type]
        return y if layer.bias is None else y + layer.bias

    def _is_bare(self) -> bool:
        """Whether nothing watches the wrapped module's own input and result."""
        base: Any = self.base_layer
        return not (base._forward_hooks or base._forward_pre_hooks or "forward" in base.__dict__)

    def _may_fold(self, delta: Delta) -> bool:
        if self.backend is not None or type(self.base_layer) not in FOLDABLE:
            return False
        w = self.original()
        wide = w.dtype in (torch.float32, torch.float64) and not torch.is_autocast_enabled(w.device.type)
        return wide or delta.folds_narrow

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self._refuse_mixed_batches(kwargs)
        if self.disable_adapters and self.merged:
            self.unmerge()
        deltas = [] if self.disable_adapters or self.merged else self._active()
        if not deltas:
            return self.base_layer(x, *args, **kwargs)
        self._watch(deltas)
        if len(deltas) == 1 and self._is_bare():
            base: Any = self.base_layer
            delta = deltas[0]
            if self._may_fold(delta) and delta.folds(x):
                return delta.fold(x, self.kind.matrix(base.weight), base.bias)
            if self.backend is not None and delta.wraps:
                return delta.wrap(x, self._base_result)
        y = self._base_result(x, *args, **kwargs)
        for delta in deltas:
            y = delta.add(y, x)
        return y


class ParamWrapper(nn.Module, _Adapted):
    """A 3-D expert parameter (experts × a × b) with its adapters; PEFT recognises such wrappers by this class's name.

    One dense ΔE is made a forward, and the wrapped module runs on W + ΔE.
    """

    def __init__(self, base_layer: nn.Module, module_name: str, parameter_name: str) -> None:
        super().__init__()
        self.parameter_name = parameter_name
        self.takes_bias = False
        self._init_adapted(base_layer, module_name)
        shape = tuple(self.original().shape)
        if not is_plain(self.original()):
            raise UsageError(f"{module_name} is quantised; of experts only floating-point weights are served")
        if len(shape) != 3:
            raise UsageError(f"{module_name} has shape {shape}; target_parameters serves experts × a × b")
        # transformers keeps experts × out × in, or experts × in × out where the module says is_transposed
        self.transposed = bool(getattr(self.get_base_layer(), "is_transposed", False))

    def original(self) -> nn.Parameter:
        return getattr(self.get_base_layer(), self.parameter_name)

    def bias_parameter(self) -> None:
        return None

    def to_native(self, matrix: Tensor) -> Tensor:
        return matrix.mT if self.transposed else matrix

    def _expert(self, i: int) -> Tensor:
        """The unmerged W of expert i (out × in), in the model's dtype."""
        return self.to_native(self.unmerged()[0][i])

    def _matrix(self, i: int) -> Tensor:
        w = self._expert(i)
        return w.to(torch.promote_types(w.dtype, torch.float32))

    def build(self, config: AdapterConfig, model_config: Any) -> nn.Module:
        refused = card(self.slug).refuses.get("3-D expert")
        if refused:
            raise UsageError(f"{self.slug} cannot adapt {self.module_name}, a 3-D expert: {refused}")
        if getattr(config, "dropout", 0):
            raise UsageError(f"{self.module_name} is a 3-D expert: ΔE is added to the weight, so dropout must be 0")
        w = self.original()
        count, out, in_ = self.to_native(w).shape
        make = delta_class(self.slug)

        def site(i: int) -> Site:
            name = f"{self.module_name}#{i}"
            return Site(
                name,
                Linear(),
                out,
                in_,
                functools.partial(self._matrix, i),
                w.device,
                config.is_stored,
                _stored_rank(config, name),
                functools.partial(self._expert, i),
                self.bias_parameter,
            )

        return Experts([make(config, site(i)) for i in range(count)])

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self._refuse_mixed_batches(kwargs)
        if self.disable_adapters and self.merged:
            self.unmerge()
        deltas = [] if self.disable_adapters or self.merged else self._active()
        if not deltas:
            return self.base_layer(*args, **kwargs)
        self._watch(deltas)
        w = self.original()
        moved = w + torch.stack([self.to_native(d.delta()) for d in deltas]).sum(0).to(w.dtype)
        inner: Any = self.base_layer
        path = self.parameter_name
        while hasattr(inner, "base_layer"):
            inner, path = inner.base_layer, f"base_layer.{path}"
        return torch.func.functional_call(self.base_layer, {path: moved}, args, kwargs)

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        layer: Any = self
        while isinstance(layer, ParamWrapper):
            if merge:
                layer.merge(safe_merge=safe_merge, adapter_names=adapter_names)
            layer = layer.base_layer
        return layer


def _stored_rank(config: AdapterConfig, name: str) -> int | None:
    for key, r in config.rank_pattern.items():
        if name == key or name.endswith(f".{key}"):
            return r
    return None


def _await_tensors(delta: nn.Module) -> None:
    """Fill what a file is to provide with NaN, so that a tensor that never came cannot pass unnoticed."""
    kept = delta.state_dict(keep_vars=True).values()
    for t in kept:
        if t.is_floating_point() and not t.is_meta:
            t.data.fill_(float("nan"))


class AdapterModel(BaseTuner):
    """The tuner: finds modules, wraps them, and gives each adapter its controller."""

    slug: str
    layer_cls: type[AdaptedModule]
    linear_cls: type[AdaptedModule]
    wrapper_cls: type[ParamWrapper]
    target_module_mapping: dict[str, list[str]] = {}

    def _check_target_module_exists(self, peft_config: Any, key: str) -> Any:  # type: ignore[override]
        outer = key.rpartition(".")[0]
        if outer in self._structured and check_target_module_exists(peft_config, outer):
            return False  # "all-linear" finds a structured layer, and once more the factors in it
        return check_target_module_exists(peft_config, key)

    def _prepare_adapter_config(self, peft_config: Any, model_config: Any) -> Any:
        # target_parameters alone need no target_modules; nothing is looked up by the model's type
        return peft_config

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        """Refuse before any work what no module could serve."""
        self._tied = tied_weights(model)
        self._structured = {
            name for name, module in model.named_modules() if isinstance(module, Structured) and module.opaque
        }
        check_targets(model, peft_config, self.prefix)
        done = tasks_of(model)
        if peft_config.is_stored and peft_config.merged_tasks != done:
            raise UsageError(
                f"the adapter was trained on weights that held {peft_config.merged_tasks} finished tasks, and those of "
                f"this model hold {done}: put it on the model that it was trained on"
            )
        peft_config.merged_tasks = done

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        model_config = getattr(self.model, "config", None)
        if isinstance(target, self.layer_cls | self.wrapper_cls) and (
            parameter_name is None or target.parameter_name == parameter_name  # type: ignore[union-attr]
        ):
            target.update_layer(adapter_name, peft_config, model_config)
            return
        if parameter_name is None:
            tied = self._tied.get(id(getattr(target, "weight", None)))
            if tied is not None:
                others = " and ".join(n for n in tied if n != f"{current_key}.weight")
                raise UsageError(
                    f"{current_key} shares its weight with {others}, so an adapter on one would silently move the "
                    "other: leave it out, or load the model with tie_word_embeddings=False"
                )
            linear = isinstance(target, Conv1D) or hasattr(target, "in_features")
            requantise = get_quantization_kwargs(self.model).get("get_apply_tensor_subclass")
            layer: nn.Module = (self.linear_cls if linear else self.layer_cls)(target, current_key, requantise)
        else:
            layer = self.wrapper_cls(target, current_key, parameter_name)
        layer.train(target.training)
        layer.update_layer(adapter_name, peft_config, model_config)  # type: ignore[operator]
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        setattr(parent, child_name, new_module)

    def _mark_only_adapters_as_trainable(self, model: nn.Module) -> None:
        """PEFT's last call while attaching: every delta exists, so what they share can be made."""
        super()._mark_only_adapters_as_trainable(model)
        for adapter_name, config in self.peft_config.items():
            layers = [
                m
                for m in model.modules()
                if isinstance(m, self.layer_cls | self.wrapper_cls) and adapter_name in m.deltas
            ]
            if not layers or all(adapter_name in m.controllers for m in layers):
                continue
            deltas = [d for m in layers for d in leaves(m.deltas[adapter_name])]
            type(deltas[0]).finish(config, deltas)
            controller = deltas[0].controller_class()(config, deltas)
            for m in layers:
                m.controllers[adapter_name] = controller
            for d in deltas:
                d.controller = controller
            if config.base_sketch is not None:  # type: ignore[attr-defined]
                self._check_places(model, config, {m.module_name for m in layers})
                for m in layers:
                    m.await_tensors(adapter_name)

    def _check_places(self, model: nn.Module, config: Any, attached: set[str]) -> None:
        """Raise where the adapter was trained on a module that this model lacks."""
        there = {name for name, _ in model.named_modules()} | attached
        lacking = sorted(set(config.base_sketch) - there)
        if lacking:
            raise UsageError(
                f"the adapter was made for another base model: it has {lacking[0]}, which {type(model).__name__} lacks"
            )

    # --- files --------------------------------------------------------------------------------------------------

    @classmethod
    def _layers(cls, model: nn.Module, adapter_name: str) -> Iterator[tuple[str, Any]]:
        for name, module in model.named_modules():
            if isinstance(module, cls.layer_cls | cls.wrapper_cls) and adapter_name in module.deltas:
                yield name, module

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: Any,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        kept = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        released = config.release = {"rank_pattern": {}, "base_sketch": {}, "checksums": {}}
        for name, layer in cls._layers(model, adapter_name):
            released["base_sketch"][layer.module_name] = layer.sketch()
            root = f"{name}.{cls.prefix}delta.{adapter_name}."
            for i, (prefix, delta) in enumerate(named_leaves(layer.deltas[adapter_name]).items()):
                own = {k.removeprefix(root + prefix): v for k, v in kept.items() if k.startswith(root + prefix)}
                compacted, rank = delta.compact(own)
                released["checksums"].update(delta.checksums())
                if rank is not None:
                    released["rank_pattern"][layer.module_name + (f"#{i}" if prefix else "")] = rank
                for k in own:
                    del kept[root + prefix + k]
                kept.update({root + prefix + k: v.contiguous() for k, v in compacted.items()})
        return kept

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        # blocks and experts nest their tensors one level deeper than PEFT expects
        marker = f".{cls.prefix}delta.{adapter_name}."
        if marker in key:
            return key.replace(marker, f".{cls.prefix}delta.")
        return super()._remove_adapter_name_from_key(key, adapter_name)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        marker = f".{cls.prefix}delta."
        wanted: set[str] = set()
        for name, layer in cls._layers(model, adapter_name):
            root = f"{name}{marker}{adapter_name}."
            for prefix, delta in named_leaves(layer.deltas[adapter_name]).items():
                expected = delta.state_dict()
                wanted |= {root + prefix + k for k in expected}
                own = {k: remapped[root + prefix + k] for k in expected if root + prefix + k in remapped}
                if len(own) == len(expected) and any(own[k].shape != v.shape for k, v in expected.items()):
                    remapped.update({root + prefix + k: v for k, v in delta.expand(own).items()})
        missing = sorted(wanted - set(remapped))
        unexpected = sorted(k for k in remapped if marker in k and k not in wanted)
        if missing or unexpected:
            what = f"misses {missing[0]}" if missing else f"has {unexpected[0]}, which the model has no place for"
            more = len(missing) + len(unexpected) - 1
            raise UsageError(f"the adapter's file {what}" + (f" (and {more} more)" if more else ""))
        return remapped

    def _check_merge(self, adapter_names: list[str] | None) -> None:
        """Before any weight is touched, so that a refusal leaves nothing half merged."""
        for m in self.model.modules():
            if isinstance(m, _Adapted):
                m.check_merge(adapter_names or m.active_adapters)

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        self._check_merge(adapter_names)
        super().merge_adapter(adapter_names, safe_merge)
        _log_merge([m for m in self.model.modules() if isinstance(m, _Adapted)])

    def _unload_and_optionally_merge(self, merge: bool = True, *args: Any, **kwargs: Any) -> Any:
        layers = [m for m in self.model.modules() if isinstance(m, _Adapted)]
        if merge:
            self._check_merge(kwargs.get("adapter_names"))
        model = super()._unload_and_optionally_merge(merge, *args, **kwargs)
        if merge:
            _log_merge(layers)
        return model


def _log_merge(layers: Sequence[_Adapted]) -> None:
    merged = [m for m in layers if m.merged]
    if merged:
        worst = max(merged, key=lambda m: m.merge_error)
        logger.warning(
            "merged %d weights; the largest relative rounding error is %.1e (%s)",
            len(merged),
            worst.merge_error,
            worst.module_name,
        )
    quantised = [m for m in merged if m.backend is not None]
    if quantised:
        worst = max(quantised, key=lambda m: m.lost_update)
        logger.warning(
            "%d of them were quantised anew, which moved them by up to %.2g of their update's norm (%s)",
            len(quantised),
            worst.lost_update,
            worst.module_name,
        )


def delta_class(slug: str) -> Callable[[Any, Site], Delta]:
    return getattr(importlib.import_module(f"weft.adapters.{slug}"), class_name(slug, "Delta"))


def _make_classes(slug: str) -> type[AdapterModel]:
    prefix = f"weft_{slug}_"
    # transformers' load_adapter finds tensors only under an attribute that starts with the registered prefix
    shared = {"slug": slug, "adapter_layer_names": (f"{prefix}delta",), "__module__": __name__}
    layer = type(class_name(slug, "Layer"), (AdaptedModule,), shared)
    wrapper = type("ParamWrapper", (ParamWrapper,), {**shared, "__qualname__": class_name(slug, "ParamWrapper")})
    # "all-linear" finds layers that are adapted already by this word in their class's name
    linear = type(class_name(slug, "Linear"), (layer,), {"__module__": __name__})
    classes = {"tuner_layer_cls": _Adapted, "layer_cls": layer, "linear_cls": linear, "wrapper_cls": wrapper}
    members = {"slug": slug, "prefix": prefix, "__module__": __name__, **classes}
    model = type(class_name(slug, "Model"), (AdapterModel,), members)
    # so that a whole model can be pickled by its owner
    globals().update({cls.__qualname__: cls for cls in (layer, linear, wrapper, model)})
    return model


@functools.cache
def register() -> None:
    """Make every adapter a PEFT method under the name WEFT_<SLUG>."""
    for slug in cards("adapters"):
        peft_type(slug)
        config = getattr(importlib.import_module(f"weft.adapters.{slug}"), class_name(slug, "Config"))
        register_peft_method(
            name=f"weft_{slug}", config_cls=config, model_cls=_make_classes(slug), prefix=f"weft_{slug}_"
        )
