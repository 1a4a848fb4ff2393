"""From an adapter of weft to files that other programs read: a plain LoRA, a merged model, or the adapter itself.

A LoRA export has one `r` and `lora_alpha = r`; scales are folded into B, smaller ranks are padded with zeros, and
modules of rank 0 are left out of an explicit list of targets, because vLLM reads neither `rank_pattern` nor
`alpha_pattern` (`compact=True` uses both instead of padding). Factors that a method has are copied, never sent through
an SVD.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from peft.config import PeftConfig
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from weft import builtin
from weft.adapters._config import AdapterConfig
from weft.adapters._delta import Delta, Experts, LowRankDelta, leaves
from weft.adapters._diffusers import (
    DENOISER,
    is_denoiser,
    load_denoiser,
    to_lora_weights,
    write_own_lora,
    write_pipeline,
)
from weft.adapters._kinds import Conv, Embedding
from weft.adapters._plugin import ParamWrapper, _Adapted
from weft.algebra.svd import svd_top
from weft.anatomy import auto_config
from weft.errors import UsageError
from weft.files import whole_folder
from weft.registry import card

# What a run leaves beside its adapter and every form of it needs: the classes' names, what a dual encoder reads of
# them, and how images are prepared.
_BESIDE = ("labels.json", "prompts.json", "preprocessor_config.json")

Factors = tuple[Tensor, Tensor]  # B (out × r), A (r × in), with ΔW = B·A


def export(
    adapter: str | Path | PeftModel,
    out: str | Path,
    to: Literal["lora", "merged", "adapter"],
    *,
    rank: int | None = None,
    compact: bool = False,
    model: str | None = None,
) -> str:
    """Write the adapter in another form and return a report of what the conversion cost.

    Args:
        adapter: a folder written by `save_pretrained`, or a live PeftModel.
        out: a folder that does not exist yet; it appears whole or not at all.
        to: "lora" (read by PEFT and vLLM without weft), "merged" (a plain model) or "adapter" (weft's own form). On the
            UNet of a diffusion pipeline a LoRA is what its `load_lora_weights` reads, and a merged model a pipeline.
        rank: keep only this rank; exact for methods trained for it, else the best approximation, its error reported.
        compact: for "lora", ranks and alphas per module instead of padding to the largest.
        model: the base model, where the adapter's own record of it does not lead there.

    Raises UsageError where the form cannot hold the adapter.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out} exists already; name a new folder")
    if to not in ("lora", "merged", "adapter"):
        raise UsageError(f"to={to!r}: use lora, merged or adapter")
    if rank is not None and rank < 1:
        raise UsageError(f"rank={rank}: a rank is at least 1")
    if rank is not None and to == "adapter":
        raise UsageError("--rank cuts an export to lora or merged; an adapter keeps the rank it was trained with")
    live = adapter if isinstance(adapter, PeftModel) else load(adapter, model)
    live.eval()
    with whole_folder(out) as folder:
        if to == "lora":
            own = write_own_lora(live, folder) if is_denoiser(live) and not (rank or compact) else None
            report = own or _write_lora(live, folder, rank, compact)
            if is_denoiser(live):
                report = f"{to_lora_weights(folder)}: {report}"
        elif to == "merged":
            report = _write_merged(live, folder, rank)
        else:
            live.save_pretrained(str(folder), save_embedding_layers=False)
            report = "the adapter in weft's own form; no conversion error"
        if not isinstance(adapter, PeftModel):
            for name in _BESIDE:
                if (Path(adapter) / name).exists():
                    shutil.copy(Path(adapter) / name, folder / name)
    return f"{out}: {report}"


def load(adapter: str | Path, model: str | None = None) -> PeftModel:
    """The adapter on its base model, in float32 unless the model's config says otherwise."""
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForImageClassification,
        AutoModelForSemanticSegmentation,
        AutoModelForSequenceClassification,
        AutoModelForZeroShotImageClassification,
    )

    folder = Path(adapter)
    if not (folder / "adapter_config.json").exists():
        raise UsageError(f"{folder} holds no adapter_config.json")
    config = PeftConfig.from_pretrained(str(folder))
    name = model or config.base_model_name_or_path
    if not name:
        raise UsageError(f"{folder} does not name its base model; pass model=")
    path = str(builtin.model_path(name)) if name.startswith("builtin:") else name
    kwargs: dict[str, Any] = {"dtype": "auto"}
    named = (config.auto_mapping or {}).get("base_model_class") or ""  # where PEFT has no word for the task
    if config.task_type == "SEQ_CLS":
        base = AutoModelForSequenceClassification.from_pretrained(path, **_classes(folder), **kwargs)
    elif named == DENOISER:
        base = load_denoiser(path)
    elif named.endswith(("ForImageClassification", "ForSemanticSegmentation")):
        # a head for other classes is replaced, and then read from the adapter
        own = auto_config(path, **_classes(folder))
        if own.model_type == "timm_wrapper" and not own.num_labels:
            own.num_labels = 1  # which cannot be without classes; labels.json says that this one counts for none
        kwargs |= {"ignore_mismatched_sizes": True, "config": own}
        if named.endswith("ForImageClassification"):
            base = AutoModelForImageClassification.from_pretrained(path, **kwargs)
        else:
            own.use_auxiliary_head = False  # as it was adapted
            base = AutoModelForSemanticSegmentation.from_pretrained(path, **kwargs)
    elif (folder / "prompts.json").exists():  # a dual encoder, which goes by what its classes are called
        kwargs["config"] = auto_config(path, **_classes(folder))
        kwargs["config"].weft_prompts = json.loads((folder / "prompts.json").read_text(encoding="utf-8"))
        base = AutoModelForZeroShotImageClassification.from_pretrained(path, **kwargs)
    else:
        base = AutoModelForCausalLM.from_pretrained(path, **kwargs)
    return PeftModel.from_pretrained(base, str(folder))


def _classes(folder: Path) -> dict[str, Any]:
    """The classes of a saved head as fields of a config: their names, or how many they are."""
    if (folder / "labels.json").exists():
        names = json.loads((folder / "labels.json").read_text(encoding="utf-8"))
        numbers = {name: number for number, name in enumerate(names)}
        return {"id2label": dict(enumerate(names)), "label2id": numbers, "num_labels": len(names)}
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        for key in file.keys():  # noqa: SIM118  # safe_open is no mapping
            if re.search(r"(score|classifier|out_proj)(\.\d+)?\.weight$", key):
                return {"num_labels": file.get_slice(key).get_shape()[0]}
    return {}


def _layers(model: nn.Module, adapter: str) -> dict[str, _Adapted]:
    return {m.module_name: m for m in model.modules() if isinstance(m, _Adapted) and adapter in m.deltas}


def _factors(delta: Delta, rank: int | None) -> Factors:
    """B and A of one delta: its own where it has them; cut to `rank` by its own rule or by the best approximation."""
    if isinstance(delta, LowRankDelta):
        b, a = delta.factors() if rank is None else delta.truncated(rank)
    else:
        dense = delta.delta()
        u, s, a = svd_top(dense, min(rank or min(dense.shape), *dense.shape))
        b = u * s
    return b.detach().float(), a.detach().float()


@torch.no_grad()
def _module_factors(layer: _Adapted, adapter: str, rank: int | None) -> list[Factors]:
    """Factors of a layer: one pair, or one an expert. Blocks of a fused projection join block-diagonally."""
    entry = layer.deltas[adapter]
    pairs = [_factors(d, rank) for d in leaves(entry)]
    if isinstance(entry, Experts) or len(pairs) == 1:
        return pairs
    return [(torch.block_diag(*[b for b, _ in pairs]), torch.cat([a for _, a in pairs]))]


def _relative_error(layer: _Adapted, adapter: str, pairs: list[Factors]) -> float:
    """‖B·A − ΔW‖ / ‖ΔW‖ of a layer, in float64."""
    with torch.no_grad():
        dense = layer.entry(adapter).delta().double()
        made = torch.stack([b.double() @ a.double() for b, a in pairs]).view_as(dense)
        return float((made - dense).norm() / dense.norm().clamp_min(1e-30))


def _write_lora(model: PeftModel, folder: Path, rank: int | None, compact: bool) -> str:
    adapter = model.active_adapters[0]
    config = model.peft_config[adapter]
    if not isinstance(config, AdapterConfig):
        raise UsageError(f"{config.peft_type} is not one of weft's methods; PEFT's own convert_to_lora serves it")
    method = card(config.slug())
    if method.exports == "refused":
        raise UsageError(f"{method.slug} has no plain LoRA form: {method.reasons.get('exports', method.limitations)}")
    layers = _layers(model, adapter)
    found: dict[str, list[Factors]] = {}
    shifts: dict[str, Tensor] = {}
    worst = 0.0
    for name, layer in layers.items():
        kind = getattr(layer, "kind", None)
        if isinstance(kind, Conv) and (odd := _unlike_peft(kind)):
            raise UsageError(f"{name} is a {odd}, which PEFT's LoRA does not repeat: export to merged")
        shift = layer.entry(adapter).bias_delta()
        if shift is not None:
            shifts[name] = shift.float()
        pairs = _module_factors(layer, adapter, rank)
        worst = max(worst, _relative_error(layer, adapter, pairs))
        if shift is not None or any(b.shape[1] for b, _ in pairs):
            found[name] = pairs
    if not found:
        raise UsageError("every module has rank 0, so there is nothing to export; the base model is the result")
    if shifts:
        _check_biases(method.slug, {name: layers[name] for name in found}, adapter)
    ranks = {name: max(1, *(b.shape[1] for b, _ in pairs)) for name, pairs in found.items()}
    r = max(ranks.values())
    tensors: dict[str, Tensor] = {}
    for name, pairs in found.items():
        width = ranks[name] if compact else r
        layer = layers[name]
        root = (
            f"base_model.model.{_expert_path(name, layer, layers, found) if isinstance(layer, ParamWrapper) else name}"
        )
        tensors.update(_lora_tensors(root, layer, [_padded(p, width) for p in pairs]))
        if shifts:  # PEFT then expects one of every module
            tensors[f"{root}.lora_B.bias"] = shifts.get(name, pairs[0][0].new_zeros(len(pairs[0][0])))
    marker = f"weft_{method.slug}_delta"
    tensors.update(
        {
            k: v.contiguous()
            for k, v in get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False).items()
            if marker not in k
        }
    )
    _save_lora_config(folder, config, found, model, ranks if compact else {}, r, bool(shifts))
    save_file(
        {k: v.contiguous() for k, v in tensors.items()}, folder / "adapter_model.safetensors", metadata={"format": "pt"}
    )
    form = f"ranks {min(ranks.values())}..{r} in rank_pattern" if compact else f"r = lora_alpha = {r}"
    biased = "; with biases (lora_bias), which PEFT reads and vLLM does not" if shifts else ""
    return f"a plain LoRA of {len(found)} modules, {form}; largest relative error of a ΔW: {worst:.1e}{biased}"


def _check_biases(slug: str, layers: dict[str, _Adapted], adapter: str) -> None:
    """Raise UsageError where PEFT's LoRA has no place for a bias, in any module: it has them in all or in none."""
    for name, layer in layers.items():
        if isinstance(layer, ParamWrapper) or isinstance(layer.kind, Embedding):  # type: ignore[attr-defined]
            moved = next(n for n, other in layers.items() if other.moves_bias(adapter))
            raise UsageError(
                f"{slug} moves the bias of {moved}, and a LoRA that holds {name} too cannot: export to merged"
            )


def _padded(pair: Factors, r: int) -> Factors:
    b, a = pair
    extra = r - b.shape[1]
    return nn.functional.pad(b, (0, extra)), nn.functional.pad(a, (0, 0, 0, extra))


def _unlike_peft(kind: Conv) -> str | None:
    """What PEFT's LoRA would compute otherwise in a convolution: it hands on kernel, stride and padding only."""
    if kind.groups > 1:
        return "grouped convolution"
    if any(d != 1 for d in kind.dilation):
        return "dilated convolution"
    return f"convolution that pads by {kind.mode}" if kind.mode != "zeros" else None


def _expert_path(name: str, layer: ParamWrapper, layers: dict[str, _Adapted], found: dict[str, Any]) -> str:
    """Where PEFT puts the LoRA of an expert parameter: those of one module are nested, the first innermost."""
    same = [n for n in found if layers[n].get_base_layer() is layer.get_base_layer()]
    outside = sum(_depth(layers[n]) > _depth(layer) for n in same)
    return name.rpartition(".")[0] + ".base_layer" * outside


def _depth(layer: Any) -> int:
    return 1 + _depth(layer.base_layer) if isinstance(layer, ParamWrapper) else 0


def _lora_tensors(root: str, layer: _Adapted, pairs: list[Factors]) -> dict[str, Tensor]:
    """The tensors under PEFT's names."""
    if isinstance(layer, ParamWrapper):
        stacked_a = torch.cat([a for _, a in pairs])  # experts·r × in
        stacked_b = torch.stack([b for b, _ in pairs], dim=-1).flatten(1)  # out × r·experts, experts innermost
        return {f"{root}.lora_A.weight": stacked_a, f"{root}.lora_B.weight": stacked_b}
    b, a = pairs[0]
    kind = layer.kind  # type: ignore[attr-defined]
    if isinstance(kind, Embedding):
        return {f"{root}.lora_embedding_A": a, f"{root}.lora_embedding_B": b}
    if isinstance(kind, Conv):
        return {
            f"{root}.lora_A.weight": kind.native(a),
            f"{root}.lora_B.weight": b.reshape(*b.shape, *[1] * len(kind.kernel)),
        }
    return {f"{root}.lora_A.weight": a, f"{root}.lora_B.weight": b}


def _save_lora_config(
    folder: Path,
    config: AdapterConfig,
    found: dict[str, Any],
    model: PeftModel,
    ranks: dict[str, int],
    r: int,
    lora_bias: bool,
) -> None:
    wrapped = {n for n, m in _layers(model, model.active_adapters[0]).items() if isinstance(m, ParamWrapper)}
    lora = LoraConfig(
        r=r,
        lora_alpha=r,
        target_modules=sorted(set(found) - wrapped),
        target_parameters=sorted(set(found) & wrapped) or None,
        rank_pattern=ranks,
        alpha_pattern=ranks,
        lora_bias=lora_bias,
        task_type=config.task_type,
        auto_mapping=config.auto_mapping,
        modules_to_save=config.modules_to_save,
        base_model_name_or_path=config.base_model_name_or_path,
        inference_mode=True,
    )
    lora.save_pretrained(str(folder))
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()), indent=2, sort_keys=True))


def _write_merged(model: PeftModel, folder: Path, rank: int | None) -> str:
    adapter = model.active_adapters[0]
    layers = list(_layers(model, adapter).values())
    cost = 0.0
    if rank is not None:
        for layer in layers:
            pairs = _module_factors(layer, adapter, rank)
            cost = max(cost, _relative_error(layer, adapter, pairs))
            with torch.no_grad():
                made = torch.stack([b @ a for b, a in pairs])
                weight, _ = layer.unmerged()
                moved = layer.to_native(made if isinstance(layer, ParamWrapper) else made[0])
                layer.write((weight.float() + moved).to(weight.dtype), None)
        merged: Any = model.unload()
    else:
        merged = model.merge_and_unload(safe_merge=True)
    source = getattr(model.peft_config[adapter], "base_model_name_or_path", None)
    if is_denoiser(model):
        write_pipeline(merged, source, folder)
        copied = " in its pipeline"
    else:
        merged.save_pretrained(str(folder))
        copied = _copy_tokenizer(source, folder)
    rounding = max((layer.merge_error for layer in layers), default=0.0)
    cut = f"; cutting to rank {rank} cost a relative error of {cost:.1e}" if rank is not None else ""
    return f"a plain model{copied}; largest relative rounding error of a merged weight: {rounding:.1e}{cut}"


def _copy_tokenizer(name: str | None, folder: Path) -> str:
    if not name:
        return ""
    source = builtin.model_path(name) if name.startswith("builtin:") else Path(name)
    beginnings = ("tokenizer", "special_tokens", "vocab", "merges", "preprocessor_config")
    files = [f for f in source.glob("*") if f.name.startswith(beginnings)] if source.is_dir() else []
    for file in files:
        shutil.copy(file, folder / file.name)
    return " with its tokenizer" if files else ""
