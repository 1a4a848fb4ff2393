"""Turn a saved adapter into a plain LoRA, a merged model, or a compact adapter; a compressed model into a stock one."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from weft.errors import UsageError


class Form(StrEnum):
    """What an adapter can be turned into, and a compressed model."""

    lora = "lora"
    merged = "merged"
    adapter = "adapter"
    dense = "dense"


def command(
    adapter: Annotated[
        Path, typer.Argument(help="Folder of the saved adapter, or of a compressed model.", show_default=False)
    ],
    out: Annotated[Path, typer.Argument(help="New folder for the result.", show_default=False)],
    to: Annotated[
        Form,
        typer.Option(
            help="lora: PEFT's and vLLM's own form, of a pipeline diffusers'; merged: a whole model; adapter: itself; "
            "dense: a compressed model as a stock one."
        ),
    ],
    rank: Annotated[int | None, typer.Option(min=1, help="The LoRA's rank; by default the lowest exact one.")] = None,
    compact: Annotated[bool, typer.Option("--compact", help="Keep each module's own rank (not for vLLM).")] = False,
    model: Annotated[str | None, typer.Option(help="Base model; by default the one it was trained on.")] = None,
) -> None:
    """Turn a saved adapter into a plain LoRA that PEFT and vLLM load without weft, or into a merged model.

    The error that the conversion cost is printed. A compressed model becomes a stock one with --to dense.
    """
    if to is Form.dense:
        from weft.run.compress import write_dense

        if rank is not None or compact or model is not None:
            raise UsageError("--rank, --compact and --model are for adapters: --to dense takes a model as it is")
        print(write_dense(str(adapter), out))
        return
    from weft.run.models import check_safetensors
    from weft.run.predict import adapter_facts

    facts = adapter_facts(adapter)
    if facts["kind"] != "adapter":
        raise UsageError(f"{str(adapter)!r} holds a whole model: --to dense makes a stock one of a compressed one")
    check_safetensors(adapter)
    from weft.adapters._export import export

    spec = model or facts["base"]
    if spec is not None:
        from weft.run import models, text_to_image

        if facts["task"] == "text-to-image":
            text_to_image.library()  # which is silent from now on
            spec = text_to_image.locate(spec)
        else:
            spec = models.locate(spec)
    print(export(adapter, out, to.value, rank=rank, compact=compact, model=spec))
