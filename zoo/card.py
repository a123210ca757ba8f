"""The model card: what the model is, in figures that follow from the model itself."""

from collections.abc import Mapping
from typing import Any

from seqzoo.layers import mixer_class
from seqzoo.zoo.model import ZooForCausalLM, ZooForSequenceClassification, ZooPreTrainedModel

TEMPLATE = """---
library_name: transformers
tags:
{tags}
{task}---

# {title}

A stack of {entries} entries of width {width}, {parameters} parameters, made with seqzoo.
The code travels with the weights: seqzoo need not be installed.

```python
from transformers import {auto}

model = {auto}.from_pretrained("{title}", trust_remote_code=True)
```

| entry | mixer | paper |
|---|---|---|
{stack}
{facts}"""


def card(model: ZooPreTrainedModel, title: str, facts: Mapping[str, Any]) -> str:
    """README.md of an exported model.

    Args:
        model: what is exported.
        title: its name.
        facts: anything worth a line in a table: scores, seeds, the configuration's digest.
    """
    entries = model.config.spec.resolve()
    mixers = sorted({entry.mixer for entry in entries})
    task, auto = "", "AutoModel"
    if isinstance(model, ZooForCausalLM):
        task, auto = "pipeline_tag: text-generation\n", "AutoModelForCausalLM"
    elif isinstance(model, ZooForSequenceClassification):
        task, auto = "pipeline_tag: text-classification\n", "AutoModelForSequenceClassification"
    rows = "\n".join(f"| {_cell(name)} | {_cell(value)} |" for name, value in facts.items())
    return TEMPLATE.format(
        tags="\n".join(f'- "{tag}"' for tag in ["seqzoo", *mixers]),
        task=task,
        title=title,
        entries=len(entries),
        width=model.config.spec.d_model,
        parameters=f"{sum(p.numel() for p in model.parameters()):,}",
        auto=auto,
        stack="\n".join(
            f"| {i} | {_cell(entry.mixer)} | {_cell(mixer_class(entry.mixer).paper)} |"
            for i, entry in enumerate(entries)
        ),
        facts=f"\n| fact | value |\n|---|---|\n{rows}\n" if rows else "",
    )


def _cell(value: object) -> str:
    """Text that cannot break out of a table."""
    return " ".join(str(value).split()).replace("|", "\\|").replace("<", "&lt;")
